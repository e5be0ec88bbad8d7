"""Stages `import` and `export`: embeddings of other programs into a feature store, and a store's embeddings out of it.

Import reads files, writes whole chunks, and skips those that are there; a chunk with a file that cannot be used is not
written. Export writes whole videos and skips those that are there. The layouts are in `foreign.py`.
"""

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.features.foreign import (
    ForeignVideo,
    Layout,
    find_layout,
    open_foreign_video,
    path_of,
    write_foreign_video,
)
from vnaw_pipeline.features.store import IMPORTED, FeatureStore, Unit, create_store, open_store
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import read_manifest
from vnaw_pipeline.provenance import differences, digest_bytes, environment, utc_now, write_json
from vnaw_pipeline.stages import StageReport, progress_bar

_READERS = 16
"""Threads that read files: on a network each one mostly waits."""
_RECORD_NAME = "features.json"


def import_features(manifest: Path | pd.DataFrame, features_dir: Path, store_path: str | Location) -> StageReport:
    """Take over the embeddings of every video of the manifest into a feature store.

    The store's fingerprint says that they are imported, from a folder of which layout and name, and a digest over the
    first and last embedding of each video, which is read in moments and which no two encoders share; so a run that was
    trained on these features refuses others, and so does the store: import the videos of a manifest together. A chunk
    that has other frames now than when it was imported, since more files came or some went, is imported again.

    Raises:
        DataError: files that are missing or cannot be used, all of them at once; the chunks without such are written.
        StoreError: the store holds other features.
    """
    started = time.monotonic()
    videos = read_manifest(manifest)
    num_frames = dict(zip(videos.video_id, videos.num_frames.tolist(), strict=True))
    layout = find_layout(features_dir)
    foreign = _open_videos(features_dir, layout, num_frames)
    embedding_dim = _common_width(features_dir, foreign)
    digests = (f"{video_id} {foreign[video_id].digest}\n".encode() for video_id in sorted(foreign))
    fingerprint = {IMPORTED: layout, "name": features_dir.resolve().name, "digest": digest_bytes(*digests)}
    store = create_store(store_path, fingerprint, embedding_dim)
    store.remove_partial_files()
    for video_id, count in num_frames.items():
        store.add_video(video_id, count)
    units = _units_to_import(store, foreign)
    total = sum(len(store.units(video_id)) for video_id in foreign)
    frames = sum(unit.stop - unit.start for unit in units)
    done, num_valid, problems = 0, 0, []
    with ThreadPoolExecutor(_READERS, thread_name_prefix="import") as pool, progress_bar("import", frames) as bar:
        for unit in units:
            try:
                embeddings, valid = foreign[unit.video_id].read(unit.start, unit.stop, embedding_dim, pool)
            except DataError as error:
                problems += str(error).splitlines()
            else:
                store.write_unit(unit, embeddings, valid)
                done += 1
                num_valid += int(valid.sum())
            bar.advance(unit.stop - unit.start)
    if problems:
        raise DataError(
            f"{listing(problems)}\n{done} of {len(units)} chunks are written. Mend these files and run again."
        )
    write_json(store.path / "record.json", {"written": utc_now(), "environment": environment()})
    return StageReport(
        "import",
        units="chunks",
        done=done,
        skipped=total - done,
        frames=frames,
        seconds=time.monotonic() - started,
        notes=[f"{num_valid} of {frames} frames are valid"] if frames else [],
    )


def export_features(
    store_path: str | Location, out_dir: Path, layout: Layout = "tree", manifest: Path | pd.DataFrame | None = None
) -> StageReport:
    """Write the plain embeddings of a store, or of the manifest's videos in it, as files that `import_features` reads.

    `features.json` beside them holds the fingerprint of the store.

    Raises:
        StoreError: a video is missing or not complete.
        DataError: the folder holds something else, or other features.
    """
    started = time.monotonic()
    store = open_store(store_path)
    video_ids = store.video_ids() if manifest is None else list(read_manifest(manifest).video_id)
    store.require(video_ids)
    _begin_export(store, out_dir, layout)
    to_write = [video_id for video_id in video_ids if not path_of(out_dir, layout, video_id).exists()]
    frames = sum(store.num_frames(video_id) for video_id in to_write)
    with progress_bar("export", frames) as bar:
        for video_id in to_write:
            rows = store.embeddings(video_id), store.valid(video_id)
            write_foreign_video(out_dir, layout, video_id, rows)
            bar.advance(len(rows[1]))
    return StageReport(
        "export",
        done=len(to_write),
        skipped=len(video_ids) - len(to_write),
        frames=frames,
        seconds=time.monotonic() - started,
    )


def _units_to_import(store: FeatureStore, foreign: Mapping[str, ForeignVideo]) -> list[Unit]:
    """The chunks that are missing, and those whose frames are not those that the files have now; these are removed."""
    missing = set(store.missing_units(list(foreign)))
    units = []
    for unit in (unit for video_id in foreign for unit in store.units(video_id)):
        if unit not in missing:
            if np.array_equal(store.valid_in(unit), foreign[unit.video_id].valid(unit.start, unit.stop)):
                continue
            store.remove_unit(unit)
        units.append(unit)
    return units


def _open_videos(features_dir: Path, layout: Layout, num_frames: dict[str, int]) -> dict[str, ForeignVideo]:
    if not any(path_of(features_dir, layout, video_id).exists() for video_id in num_frames):
        found = sorted(entry.name for entry in features_dir.iterdir())
        raise DataError(
            f"{features_dir} holds none of the manifest's {len(num_frames)} videos (it holds {', '.join(found[:5])}"
            f"{', ...' if len(found) > 5 else ''}). Give the folder in which the videos lie."
        )
    foreign, problems = {}, []
    for video_id, count in num_frames.items():
        try:
            foreign[video_id] = open_foreign_video(features_dir, layout, video_id, count)
        except DataError as error:
            problems += str(error).splitlines()
    if problems:
        raise DataError(f"{listing(problems)}\nNothing is written. Mend these files and run again.")
    return foreign


def _common_width(features_dir: Path, foreign: dict[str, ForeignVideo]) -> int:
    """The embedding width of all videos."""
    widths = {video.path: video.embedding_dim for video in foreign.values() if video.embedding_dim is not None}
    if not widths:
        raise DataError(f"{features_dir} holds no embedding of any frame.")
    first, wanted = next(iter(widths.items()))
    others = [f"{path} has embeddings of width {width}" for path, width in widths.items() if width != wanted]
    if others:
        raise DataError(f"{listing(others)}\nexpected {wanted}, as {first} has it.")
    return wanted


def _begin_export(store: FeatureStore, out_dir: Path, layout: Layout) -> None:
    """Make the folder, or check that it holds an export of the same features."""
    record: dict[str, Any] = {"layout": layout, **store.fingerprint}
    path = out_dir / _RECORD_NAME
    if out_dir.is_dir() and any(out_dir.iterdir()) and not path.is_file():
        raise DataError(f"{out_dir} is not empty and holds no export of features. Give a new folder.")
    if not path.is_file():
        write_json(path, record)
    elif unlike := differences(json.loads(path.read_text(encoding="utf-8")), record):
        raise DataError(f"{out_dir} holds an export of other features: {'; '.join(unlike)}. Give a new folder.")
