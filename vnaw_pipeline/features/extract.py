"""Stage `extract`. Reads crops, writes the feature store; skips the chunks that are there.

A frame whose crop cannot be decoded is a row in `status.csv`: its embedding is zero, its `valid` is False, and a rerun
tries its chunk again. The bytes of a store do not depend on how many processes or threads made it, nor on which views
were made when.
"""

import json
import socket
import time
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.features.backends import make_encode, one_core_per_forward, resolve_arithmetic
from vnaw_pipeline.features.encode import Chunk, EncodedChunk, encode_chunks
from vnaw_pipeline.features.encoder import load_encoder
from vnaw_pipeline.features.store import FeatureStore, Unit, create_store, open_store
from vnaw_pipeline.features.views import PLAIN, view_recipes
from vnaw_pipeline.layouts import crop_set_name
from vnaw_pipeline.locations import Location, files_below, location
from vnaw_pipeline.manifests import read_manifest
from vnaw_pipeline.processes import agree, gather_all, meet, process_state
from vnaw_pipeline.provenance import differences, digest_bytes, environment, utc_now, write_json, write_text
from vnaw_pipeline.stages import Failure, StageReport, progress_bar

_FAILURES = "failures"
"""Folder of what could not be read, a file a chunk."""


def extract_features(
    manifest: Path | pd.DataFrame,
    crops_root: Path,
    store_path: str | Location,
    config: PipelineConfig,
    *,
    allow_pickle: bool = False,
) -> StageReport:
    """Encode every frame of every video of the manifest, once, into the feature store, a folder or `s3://...`.

    Under several processes each takes its share of the missing chunks; all return the report of the whole.

    Raises:
        StoreError: the store belongs to other crops, weights or settings, or a view in it does; a process does not see
            the store of the others; S3 fails for good.
        ConfigError, CheckpointError: the encoder cannot be built, its weights not be read, or its backend is not there.
        ProcessError: processes that differ in program, config, manifest or weights.
    """
    started = time.monotonic()
    state = process_state()
    videos = read_manifest(manifest)
    encoder = load_encoder(config.encoder, config.seed, allow_pickle)
    arithmetic = resolve_arithmetic(config.extract.backend, config.extract.precision, state.device)
    fingerprint = {
        **encoder.fingerprint(),
        **arithmetic.fingerprint(),
        "crops": config.extract.crop_set or crop_set_name(crops_root, videos.crops),
    }
    views = config.extract.views
    recipes = view_recipes(views, config.extract.erase_span_frames, config.seed)
    settings = config.model_dump(mode="json", include={"encoder", "extract", "seed"})
    agree({"manifest": digest_bytes(videos.to_csv().encode()), "fingerprint": fingerprint, **settings})
    if state.is_main_process:
        store = create_store(store_path, fingerprint, encoder.embedding_dim, recipes)
        store.remove_partial_files()
        for video_id, num_frames in zip(videos.video_id, videos.num_frames, strict=True):
            store.add_video(video_id, num_frames, views)
        write_text(store.path / "config.yaml", dump_config(config))
    meet()
    store = _open_made(store_path, fingerprint, list(videos.video_id), views)
    crops_of = dict(zip(videos.video_id, videos.crops, strict=True))
    failed_before = files_below(store.path / _FAILURES)
    chunks = _chunks_to_do(store, list(crops_of), views, failed_before)
    total = sum(len(store.units(video_id)) for video_id in crops_of) * len(views)
    # No process writes before all have seen what is missing; shared file systems may show it later to some.
    agree({"missing": digest_bytes(repr([(of.video_id, of.start, *of.recipes) for of in chunks]).encode())})

    mine = share_of(chunks, state.process_index, state.num_processes)
    frames = sum(chunk.stop - chunk.start for chunk in mine)
    with (
        one_core_per_forward(arithmetic.device) as forwards,
        progress_bar("extract", frames, shown=state.is_main_process) as bar,
    ):
        batch_frames, workers = config.extract.batch_frames, max(config.extract.decode_threads, forwards)
        encode = make_encode(encoder, arithmetic, forwards, batch_frames)
        for result in encode_chunks(mine, crops_root, crops_of, encoder, encode, batch_frames, workers):
            _keep(store, result, failed_before)
            bar.advance(result.chunk.stop - result.chunk.start)

    frames = sum(gather_all([frames]))  # after this, every process has written its chunks
    failed = files_below(store.path / _FAILURES)
    failures_of = [(chunk, _recorded_failures(store, chunk, failed)) for chunk in chunks]
    asked = sum(view in views for chunk in chunks for view in chunk.recipes)
    report = StageReport(
        "extract",
        units="chunks",
        done=sum(len(chunk.recipes) for chunk, failures in failures_of if _is_done(chunk, failures)),
        skipped=total - asked,
        frames=frames,
        seconds=time.monotonic() - started,
        failures=[failure for _, failures in failures_of for failure in failures],
        status_path=store.path / "status.csv",
    )
    if state.is_main_process:
        report.write_status(store.path / "status.csv")
        made = {
            "written": utc_now(),
            "environment": environment(),
            "device": str(arithmetic.device),
            "seed": config.seed,
        }
        write_json(store.path / "record.json", made)
    return report


def _open_made(
    store_path: str | Location, fingerprint: Mapping[str, Any], video_ids: list[str], views: tuple[str, ...]
) -> FeatureStore:
    """Open the store that the main process has made room in. No process makes one of its own: where the place is not
    shared, that would be a stray one on each machine.

    Raises:
        StoreError: this process sees another store there, or none.
    """
    path = location(store_path)
    if (path / "zarr.json").is_file():
        store = open_store(path, read_only=False)
        has_all = all(store.has_video(video_id, view) for view in views for video_id in video_ids)
        if has_all and not differences(store.fingerprint, fingerprint):
            return store
    state = process_state()
    raise StoreError(
        f"Process {state.process_index} of {state.num_processes} on {socket.gethostname()} does not see the store that "
        f"process 0 made at {path}. Give a folder on a file system that all processes share, or s3://bucket/folder."
    )


def share_of(chunks: list[Chunk], process_index: int, num_processes: int) -> list[Chunk]:
    """The chunks of one process: largest first, each to the process with the fewest frames to encode so far."""
    load = [0] * num_processes
    mine = []
    for chunk in sorted(chunks, key=lambda c: (-_cost(c), c.video_id, c.start)):
        least = load.index(min(load))
        load[least] += _cost(chunk)
        if least == process_index:
            mine.append(chunk)
    return mine


def _cost(chunk: Chunk) -> int:
    return (chunk.stop - chunk.start) * len(chunk.recipes)


def _chunks_to_do(
    store: FeatureStore, video_ids: list[str], views: tuple[str, ...], failed: Container[str]
) -> list[Chunk]:
    """Chunks of which views are missing, and those with crops that could not be read the last time.

    Which frames are valid is decided with the plain view. So where that one has to be made, every view that the store
    has of the chunk is made again: the crops may be others by now.
    """
    held = {view: [video_id for video_id in video_ids if store.has_video(video_id, view)] for view in store.views}
    missing = {view: set(store.missing_units(held[view], view)) for view in held}
    chunks = []
    for unit in (unit for video_id in video_ids for unit in store.units(video_id)):
        chunk = Chunk(unit.video_id, unit.start, unit.stop, {})
        in_views = [replace(unit, view=view) for view in held if store.has_video(unit.video_id, view)]
        made = [in_view.view for in_view in in_views if in_view not in missing[in_view.view]]
        afresh = PLAIN not in made or _failures_name(chunk) in failed
        to_make = dict.fromkeys([*views, *made]) if afresh else [view for view in views if view not in made]
        if to_make:
            recipes = {view: store.views[view] for view in to_make}
            chunks.append(replace(chunk, recipes=recipes, known_valid=None if afresh else store.valid_in(unit)))
    return chunks


def _failures_name(chunk: Chunk) -> str:
    """Failures of views that are added stand apart: they are no reason to make the plain view again."""
    added = "" if chunk.known_valid is None else ".added"
    return f"{chunk.video_id}.{chunk.start}{added}.json"


def _recorded_failures(store: FeatureStore, chunk: Chunk, failed: Container[str]) -> list[Failure]:
    name = _failures_name(chunk)
    rows = json.loads((store.path / _FAILURES / name).read_bytes()) if name in failed else []
    return [Failure(chunk.video_id, frame_index, reason) for frame_index, reason in rows]


def _is_done(chunk: Chunk, failures: list[Failure]) -> bool:
    """Crops that cannot be read leave frames that are not valid; but views that are added need all valid frames."""
    return not failures or (chunk.known_valid is None and all(failure.frame_index is not None for failure in failures))


def _keep(store: FeatureStore, result: EncodedChunk, failed_before: Container[str]) -> None:
    """Write a chunk. Its failures go first, so that a kill in between cannot lose them, and the plain view last, so
    that after one all are made again."""
    chunk = result.chunk
    name = _failures_name(chunk)
    path = store.path / _FAILURES / name
    if result.failures:
        write_json(path, [(failure.frame_index, failure.reason) for failure in result.failures])
        if chunk.known_valid is not None:
            return  # what other views have of these frames stays as it is
    for view in sorted(result.embeddings, key=lambda view: view == PLAIN):
        unit = Unit(chunk.video_id, chunk.start, chunk.stop, view)
        store.write_unit(unit, result.embeddings[view], result.valid)
    if not result.failures and name in failed_before:
        path.unlink(missing_ok=True)
