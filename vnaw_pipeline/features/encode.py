"""From crops to embeddings: chunk by chunk, many batches at a time, every view from one decoding.

The bytes do not depend on how many threads made them: a chunk is always cut into the same batches.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.source import VideoCrops, decode_crop, open_listed_crops
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.features.backends import Encode
from vnaw_pipeline.features.encoder import Encoder
from vnaw_pipeline.features.views import Recipe, frames_in_view
from vnaw_pipeline.stages import Failure


@dataclass(frozen=True)
class Chunk:
    """What is to be encoded of the frames [start, stop) of a video: the views in `recipes`.

    `known_valid` bool (stop - start,): the frames that other views of this chunk have, which are there already; None
    if there are none, and the crops decide.
    """

    video_id: str
    start: int
    stop: int
    recipes: Mapping[str, Recipe]
    known_valid: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """A finished chunk: embeddings float16 (T, D) by view, valid bool (T,), and the crops that could not be read."""

    chunk: Chunk
    embeddings: dict[str, npt.NDArray[np.float16]]
    valid: npt.NDArray[np.bool_]
    failures: list[Failure]


@dataclass
class _Pending:
    """A chunk in work. `crops` is closed with it; None if another chunk goes on reading from it."""

    result: EncodedChunk
    crops: VideoCrops | None
    futures: list[Future[None]]


def encode_chunks(
    chunks: Iterable[Chunk],
    crops_root: Path,
    crops_of: Mapping[str, str],
    encoder: Encoder,
    encode: Encode,
    batch_frames: int,
    workers: int,
) -> Iterator[EncodedChunk]:
    """Decode and encode chunk by chunk, in order, `workers` batches at a time; of a video, memory grows only with the
    names of its images. Crops are opened, and a folder of them listed, once for chunks of a video in a row.

    `crops_of` names each video's crops below `crops_root`. A chunk of a video without crops that can be opened has no
    valid frame, and one failure for the whole of it. A frame of `known_valid` that has no crop any more is a failure.
    """
    buffers = threading.local()
    side = encoder.preprocessing.input_px

    def run_batch(crops: VideoCrops, result: EncodedChunk, start: int, stop: int) -> None:
        chunk = result.chunk
        if not hasattr(buffers, "batch"):
            buffers.batch = np.zeros((batch_frames, side, side, 3), dtype=np.uint8)
        batch = buffers.batch[: stop - start]
        for position, frame_index in enumerate(range(start, stop)):
            if chunk.known_valid is not None and not chunk.known_valid[frame_index - chunk.start]:
                continue
            try:
                crop = _read_crop(crops, frame_index, is_needed=chunk.known_valid is not None)
            except (DataError, OSError) as error:
                result.failures.append(Failure(chunk.video_id, frame_index, str(error)))
                continue
            if crop is not None:
                batch[position] = encoder.preprocessing.of_crop(crop)
                result.valid[frame_index - chunk.start] = True
        rows = slice(start - chunk.start, stop - chunk.start)
        if not (found := result.valid[rows]).any():
            return
        for view, recipe in chunk.recipes.items():
            embeddings = encode(*frames_in_view(view, recipe, batch, chunk.video_id, start))
            result.embeddings[view][rows] = np.where(found[:, None], embeddings, np.float16(0))

    pending: deque[_Pending] = deque()

    def finish() -> EncodedChunk:
        done = pending.popleft()
        for future in done.futures:
            future.result()
        if done.crops is not None:
            done.crops.close()
        done.result.failures.sort(key=lambda failure: failure.frame_index or 0)
        return done.result

    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for chunk in chunks:
            shape = (chunk.stop - chunk.start, encoder.embedding_dim)
            embeddings = {view: np.zeros(shape, np.float16) for view in chunk.recipes}
            result = EncodedChunk(chunk, embeddings, np.zeros(shape[0], np.bool_), failures=[])
            crops, futures = None, []
            if pending and pending[-1].result.chunk.video_id == chunk.video_id:
                crops, pending[-1].crops = pending[-1].crops, None
            try:
                crops = crops or open_listed_crops(crops_root, crops_of[chunk.video_id])
            except (DataError, OSError) as error:
                result.failures.append(Failure(chunk.video_id, None, str(error)))
            else:
                starts = range(chunk.start, chunk.stop, batch_frames)
                futures = [pool.submit(run_batch, crops, result, s, min(s + batch_frames, chunk.stop)) for s in starts]
            pending.append(_Pending(result, crops, futures))
            while sum(len(waiting.futures) for waiting in pending) > 4 * workers + len(futures):
                yield finish()
        while pending:
            yield finish()
    finally:
        pool.shutdown(cancel_futures=True)


def _read_crop(crops: VideoCrops, frame_index: int, is_needed: bool) -> Rgb | None:
    (jpeg,) = crops.read(frame_index, frame_index + 1)
    if jpeg is None and is_needed:
        raise DataError("the image that the other views were made from is not there any more")
    return None if jpeg is None else decode_crop(jpeg)
