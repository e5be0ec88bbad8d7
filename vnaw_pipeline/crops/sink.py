"""Writing one video's crops, whole or not at all: a JPEG folder with its table of detections, or an HDF5 pack.

Both are made beside their final place under a hidden name and moved when complete. The table, and the pack
itself, are what marks a video as done; what a broken video lost is kept with them.
"""

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from vnaw_pipeline.annotations import image_name
from vnaw_pipeline.crops.detect import Face
from vnaw_pipeline.crops.video import VideoReader
from vnaw_pipeline.provenance import write_text

_POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
DETECTION_COLUMNS = (
    *("frame_index", "time_s", "valid", "score", "x", "y", "width", "height"),
    *(f"{point}_{axis}" for point in _POINTS for axis in "xy"),
)
"""The table of detections: pixels of the video; left and right as seen in the image; empty without a face."""

_PACK_CHUNK = 1 << 18
_FLUSH_BYTES = 8 << 20


class Crop(NamedTuple):
    """One frame's outcome: the main person's face and its aligned crop as JPEG; both None without a face."""

    frame_index: int
    time_s: float
    face: Face | None
    jpeg: bytes | None


class Written(NamedTuple):
    """What one video came to. `loss` says what could not be decoded, None if all was."""

    num_frames: int
    num_faces: int
    loss: str | None


def detections_path(out_dir: Path, video_id: str) -> Path:
    """The table of a video's detections, beside a JPEG tree."""
    return out_dir / "detections" / f"{video_id}.csv"


def pack_path(out_dir: Path, video_id: str) -> Path:
    """The HDF5 pack of a video."""
    return out_dir / f"{video_id}.h5"


def find_tree(out_dir: Path, video_id: str) -> Written | None:
    """What an earlier run wrote as a JPEG folder; None if it did not finish or its images are gone."""
    table_path = detections_path(out_dir, video_id)
    if not table_path.is_file():
        return None
    with table_path.open(newline="", encoding="utf-8") as table:
        valid = [row.get("valid") == "1" for row in csv.DictReader(table)]
    if any(valid) and not (out_dir / video_id).is_dir():
        return None
    loss_path = _loss_path(table_path)
    loss = loss_path.read_text(encoding="utf-8").strip() if loss_path.is_file() else None
    return Written(len(valid), sum(valid), loss)


def find_pack(out_dir: Path, video_id: str) -> Written | None:
    """What an earlier run wrote as a pack; None if it did not finish or the pack was damaged since."""
    path = pack_path(out_dir, video_id)
    if not path.is_file():
        return None
    try:
        with h5py.File(path, "r") as pack:
            valid = pack["valid"][:]
            return Written(len(valid), int(valid.sum()), pack.attrs["loss"] or None)
    except (OSError, KeyError):
        return None


def write_tree(
    out_dir: Path, video_id: str, crops: Iterable[Crop], video: VideoReader, settings: Mapping[str, Any]
) -> Written:
    """Write <out>/<video_id>/00001.jpg ... and then the table that marks it as done; no folder without a face.

    `settings` are not repeated here: `crops.json` beside the tree has them.
    """
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(DETECTION_COLUMNS)
    num_frames = num_faces = 0
    with _partial_dir(out_dir / f".{video_id}.partial") as partial:
        for crop in crops:
            rows.writerow(_table_row(crop))
            num_frames += 1
            if crop.jpeg is not None:
                (partial / image_name(crop.frame_index)).write_bytes(crop.jpeg)
                num_faces += 1
        loss = video.loss()
        table_path = detections_path(out_dir, video_id)
        table_path.unlink(missing_ok=True)
        if (out_dir / video_id).is_dir():
            shutil.rmtree(out_dir / video_id)
        if num_faces:
            partial.rename(out_dir / video_id)
    _loss_path(table_path).unlink(missing_ok=True)
    if loss is not None:
        write_text(_loss_path(table_path), loss + "\n")
    write_text(table_path, table.getvalue())
    return Written(num_frames, num_faces, loss)


def write_pack(
    out_dir: Path, video_id: str, crops: Iterable[Crop], video: VideoReader, settings: Mapping[str, Any]
) -> Written:
    """Write <out>/<video_id>.h5 as `source.py` describes it, with fps, the source's name and the settings."""
    seen: list[Crop] = []
    sizes: list[int] = [0]
    with _partial_file(out_dir / f".{video_id}.partial.h5") as partial:
        with _ErrorKeeper(partial, "w+b") as file, h5py.File(file, "w") as pack:
            jpeg = pack.create_dataset("jpeg", (0,), np.uint8, maxshape=(None,), chunks=(_PACK_CHUNK,))
            waiting = bytearray()
            for crop in crops:
                waiting += crop.jpeg or b""
                sizes.append(len(crop.jpeg or b""))
                seen.append(crop._replace(jpeg=None))
                if len(waiting) >= _FLUSH_BYTES:
                    _append(jpeg, waiting)
                    file.raise_kept()
            _append(jpeg, waiting)
            pack["offset"] = np.cumsum(sizes, dtype=np.int64)
            pack["box"] = np.array([_or_nan(crop.face and crop.face.box, (4,)) for crop in seen])
            pack["landmarks"] = np.array([_or_nan(crop.face and crop.face.landmarks, (5, 2)) for crop in seen])
            pack["score"] = np.array([crop.face.score if crop.face else math.nan for crop in seen], np.float32)
            pack["time_s"] = np.array([crop.time_s for crop in seen])
            pack["valid"] = valid = np.array([crop.face is not None for crop in seen])
            loss = video.loss()
            pack.attrs.update(num_frames=len(seen), fps=video.fps, source=video.path.name, loss=loss or "")
            pack.attrs["settings"] = json.dumps(settings)
        file.raise_kept()
        partial.replace(pack_path(out_dir, video_id))
    return Written(len(seen), int(valid.sum()), loss)


def _table_row(crop: Crop) -> list[str]:
    time_s = "" if math.isnan(crop.time_s) else f"{crop.time_s:.6f}"
    if crop.face is None:
        return [str(crop.frame_index), time_s, "0", *[""] * (len(DETECTION_COLUMNS) - 3)]
    x, y, right, bottom = crop.face.box.tolist()
    pixels = [x, y, right - x, bottom - y, *crop.face.landmarks.ravel().tolist()]
    return [str(crop.frame_index), time_s, "1", f"{crop.face.score:.4f}", *(f"{value:.2f}" for value in pixels)]


def _loss_path(table_path: Path) -> Path:
    return table_path.with_name(f"{table_path.stem}.loss.txt")


def _append(dataset: Any, waiting: bytearray) -> None:
    """Move the waiting bytes to the end of the dataset."""
    end = dataset.shape[0]
    dataset.resize((end + len(waiting),))
    dataset[end:] = np.frombuffer(bytes(waiting), np.uint8)
    waiting.clear()


def _or_nan(values: Any, shape: tuple[int, ...]) -> Any:
    return np.full(shape, np.nan, np.float32) if values is None else values


class _ErrorKeeper(io.FileIO):
    """A file for HDF5 to write to that does not fail, but keeps its first error.

    When a write fails, say on a full disk, while HDF5 closes a file, the process ends in a segmentation fault. So
    HDF5 is told that all went well, what it still writes is dropped, and the error is raised by us.
    """

    _kept: OSError | None = None

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left and self._kept is None:
                left = left[super().write(left) :]
        except OSError as error:
            self._kept = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._kept = self._kept or error
            return self.tell()

    def raise_kept(self) -> None:
        """Raise the first error, if there was one."""
        if self._kept is not None:
            raise self._kept


@contextmanager
def _partial_dir(path: Path) -> Iterator[Path]:
    """An empty folder that is gone after the block, unless it was renamed; so is what a kill left of it."""
    if path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """A path to write to that is gone after the block, unless it was renamed."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
