"""Stage `extract`. Reads crops, writes the feature store; skips the chunks that are there.

A frame whose crop cannot be decoded is a row in `status.csv`: its embedding is zero, its `valid` is False, and a rerun
tries its chunk again. The bytes of a store do not depend on how many processes or threads made it: a chunk is always
cut into the same batches, and on a CPU each forward pass runs on one core while several run side by side.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.crops.source import VideoCrops, decode_crop, open_listed_crops
from vnaw_pipeline.errors import DataError, StoreError
from vnaw_pipeline.features.encoder import Encoder, Preprocessing, load_encoder, resolve_precision
from vnaw_pipeline.features.store import PLAIN, FeatureStore, Unit, create_store
from vnaw_pipeline.layouts import crop_set_name
from vnaw_pipeline.manifests import read_manifest
from vnaw_pipeline.processes import cpu_share, gather_all, process_state
from vnaw_pipeline.provenance import environment, utc_now, write_json, write_text
from vnaw_pipeline.stages import Failure, StageReport, progress_bar

Encode = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float16]]
"""uint8 (B, S, S, 3) -> float16 (B, D)."""


@dataclass(frozen=True)
class EncodedUnit:
    """A finished chunk: embeddings float16 (T, D), valid bool (T,), and the crops that could not be read."""

    unit: Unit
    embeddings: npt.NDArray[np.float16]
    valid: npt.NDArray[np.bool_]
    failures: list[Failure]


def extract_features(
    manifest: Path | pd.DataFrame,
    crops_root: Path,
    store_path: Path,
    config: PipelineConfig,
    *,
    allow_pickle: bool = False,
) -> StageReport:
    """Encode every frame of every video of the manifest, once, into the feature store.

    Under several processes each takes its share of the missing chunks; all return the report of the whole.

    Raises:
        StoreError: the store belongs to other crops, weights or settings.
        ConfigError, CheckpointError: the encoder cannot be built or its weights not be read.
    """
    started = time.monotonic()
    state = process_state()
    videos = read_manifest(manifest) if isinstance(manifest, Path) else manifest
    encoder = load_encoder(config.encoder, config.seed, allow_pickle)
    precision = resolve_precision(config.extract.precision, state.device)
    fingerprint = {
        **encoder.fingerprint(),
        "precision": precision,
        "crops": config.extract.crop_set or crop_set_name(crops_root, videos.crops),
        "views": [PLAIN],
    }
    if state.is_main_process:
        store = create_store(store_path, fingerprint, encoder.embedding_dim)
        store.remove_partial_files()
        for video_id, num_frames in zip(videos.video_id, videos.num_frames, strict=True):
            store.add_video(video_id, num_frames)
        write_text(store_path / "config.yaml", dump_config(config))
    state.wait_for_everyone()
    store = create_store(store_path, fingerprint, encoder.embedding_dim)
    crops_of = dict(zip(videos.video_id, videos.crops, strict=True))
    units = [unit for video_id in crops_of for unit in _units_to_do(store, video_id)]
    total = sum(len(store.units(video_id)) for video_id in crops_of)
    state.wait_for_everyone()  # no process writes before all have seen what is missing

    mine = share_of(units, state.process_index, state.num_processes)
    frames = sum(unit.stop - unit.start for unit in mine)
    with (
        one_core_per_forward(state.device) as forwards,
        progress_bar("extract", frames, shown=state.is_main_process) as bar,
    ):
        encode = make_encode(encoder, precision, state.device, forwards)
        workers = max(config.extract.decode_threads, forwards)
        for result in encode_units(
            mine,
            crops_root,
            crops_of,
            encoder.preprocessing,
            encode,
            encoder.embedding_dim,
            config.extract.batch_frames,
            workers,
        ):
            _keep(store, result)
            bar.advance(result.unit.stop - result.unit.start)

    frames = sum(gather_all([frames]))  # after this, every process has written its chunks
    failures = [failure for unit in units for failure in _recorded_failures(store, unit)]
    report = StageReport(
        "extract",
        units="chunks",
        done=len(units) - sum(failure.frame_index is None for failure in failures),
        skipped=total - len(units),
        frames=frames,
        seconds=time.monotonic() - started,
        failures=failures,
        status_path=store_path / "status.csv",
    )
    if state.is_main_process:
        report.write_status(store_path / "status.csv")
        made = {"written": utc_now(), "environment": environment(), "device": str(state.device), "seed": config.seed}
        write_json(store_path / "record.json", made)
    return report


def share_of(units: list[Unit], process_index: int, num_processes: int) -> list[Unit]:
    """The units of one process: largest first, each to the process with the fewest frames so far."""
    load = [0] * num_processes
    mine = []
    for unit in sorted(units, key=lambda u: (u.start - u.stop, u.video_id, u.start)):
        least = load.index(min(load))
        load[least] += unit.stop - unit.start
        if least == process_index:
            mine.append(unit)
    return mine


def encode_units(
    units: Iterable[Unit],
    crops_root: Path,
    crops_of: Mapping[str, str],
    preprocessing: Preprocessing,
    encode: Encode,
    embedding_dim: int,
    batch_frames: int,
    workers: int,
) -> Iterator[EncodedUnit]:
    """Decode and encode chunk by chunk, in order, `workers` batches at a time; memory does not grow with the video.

    `crops_of` names each video's crops below `crops_root`. A chunk of a video without crops that can be opened has no
    valid frame, and one failure for the whole of it.
    """
    buffers = threading.local()
    side = preprocessing.input_px

    def run_batch(crops: VideoCrops, result: EncodedUnit, start: int, stop: int) -> None:
        if not hasattr(buffers, "batch"):
            buffers.batch = np.zeros((batch_frames, side, side, 3), dtype=np.uint8)
        batch = buffers.batch
        for position, frame_index in enumerate(range(start, stop)):
            try:
                (jpeg,) = crops.read(frame_index, frame_index + 1)
                if jpeg is None:
                    continue
                batch[position] = preprocessing.of_crop(decode_crop(jpeg))
            except (DataError, OSError) as error:
                result.failures.append(Failure(result.unit.video_id, frame_index, str(error)))
            else:
                result.valid[frame_index - result.unit.start] = True
        rows = slice(start - result.unit.start, stop - result.unit.start)
        if (found := result.valid[rows]).any():
            result.embeddings[rows] = np.where(found[:, None], encode(batch)[: stop - start], np.float16(0))

    pending: deque[tuple[VideoCrops | None, EncodedUnit, list[Future[None]]]] = deque()

    def finish() -> EncodedUnit:
        crops, result, futures = pending.popleft()
        for future in futures:
            future.result()
        if crops is not None:
            crops.close()
        result.failures.sort(key=lambda failure: failure.frame_index or 0)
        return result

    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for unit in units:
            length = unit.stop - unit.start
            result = EncodedUnit(
                unit, np.zeros((length, embedding_dim), np.float16), np.zeros(length, np.bool_), failures=[]
            )
            crops, futures = None, []
            try:
                crops = open_listed_crops(crops_root, crops_of[unit.video_id])
            except (DataError, OSError) as error:
                result.failures.append(Failure(unit.video_id, None, str(error)))
            else:
                starts = range(unit.start, unit.stop, batch_frames)
                futures = [pool.submit(run_batch, crops, result, s, min(s + batch_frames, unit.stop)) for s in starts]
            pending.append((crops, result, futures))
            while sum(len(waiting) for _, _, waiting in pending) > 4 * workers + len(futures):
                yield finish()
        while pending:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


def make_encode(encoder: Encoder, precision: str, device: torch.device, forwards: int) -> Encode:
    """The encoder as a function on frames; at most `forwards` passes run at a time."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = encoder.model.to(device, dtype).to(memory_format=torch.channels_last)
    slots = threading.Semaphore(forwards)

    @torch.inference_mode()
    def encode(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        with slots:
            images = encoder.preprocessing.normalise(torch.from_numpy(frames).to(device))
            embeddings: npt.NDArray[np.float16] = model(images.to(dtype)).to(torch.float16).cpu().numpy()
        if not np.isfinite(embeddings).all():
            raise StoreError(
                f"{encoder.name} gives embeddings that float16 cannot hold (beyond 65504, or not a number). "
                "Check its weights and precision; another layer's output or a normalised head is needed."
            )
        return embeddings

    return encode


@contextmanager
def one_core_per_forward(device: torch.device) -> Iterator[int]:
    """On a CPU, run each forward pass on one core, as many at a time as there are cores (yielded).

    Splitting one pass over cores may change the order of its sums, and so the bytes.
    """
    if device.type != "cpu":
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cpu_share()
    finally:
        torch.set_num_threads(before)


def _failures_path(store: FeatureStore, unit: Unit) -> Path:
    return store.path / "failures" / f"{unit.video_id}.{unit.start}.json"


def _recorded_failures(store: FeatureStore, unit: Unit) -> list[Failure]:
    path = _failures_path(store, unit)
    if not path.is_file():
        return []
    return [Failure(unit.video_id, frame_index, reason) for frame_index, reason in json.loads(path.read_text())]


def _units_to_do(store: FeatureStore, video_id: str) -> list[Unit]:
    """Chunks that are missing, and those with crops that could not be read the last time."""
    missing = set(store.missing_units(video_id))
    return [unit for unit in store.units(video_id) if unit in missing or _failures_path(store, unit).is_file()]


def _keep(store: FeatureStore, result: EncodedUnit) -> None:
    """Write a chunk. Its failures go first, so that a kill in between cannot lose them."""
    path = _failures_path(store, result.unit)
    if result.failures:
        write_json(path, [(failure.frame_index, failure.reason) for failure in result.failures])
    store.write_unit(result.unit, result.embeddings, result.valid)
    if not result.failures:
        path.unlink(missing_ok=True)
