"""Reading crops: a folder of JPEG images as Aff-Wild2 ships, or an HDF5 pack, by frame_index.

A pack `<video_id>.h5` holds `jpeg` (bytes of all images, one after the other, uint8) and `offset` (T + 1, int64):
frame k is jpeg[offset[k]:offset[k + 1]], and nothing there means no crop. A run of frames is so one contiguous
read; HDF5's variable-length strings would be one look-up each. Beside them, per frame: `box` (T, 4) float32
x0, y0, x1, y1 and `landmarks` (T, 5, 2) float32 in pixels of the video, `score` (T,) float32, all NaN without a
face; `time_s` (T,) float64; `valid` (T,) bool.
"""

from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import h5py
import numpy as np
import numpy.typing as npt
import simplejpeg

from vnaw_pipeline.annotations import frame_index_of, image_name
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import DataError


class VideoCrops(Protocol):
    """The crops of one video. `read` may be called from several threads; open it anew in each process."""

    num_frames: int
    """Frames the source knows of; a folder knows no further than its last image."""

    def read(self, start: int, stop: int) -> list[bytes | None]:
        """JPEG bytes of frames start to stop - 1, None where there is no image; past the end there is none."""

    def present(self, num_frames: int) -> npt.NDArray[np.bool_]:
        """Which of the first `num_frames` frames have an image, bool (num_frames,), without reading one."""

    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_video_crops(path: Path) -> VideoCrops:
    """Open the crops of one video.

    Args:
        path: a folder of 00001.jpg, 00002.jpg ...; a pack `<video_id>.h5`; or a pack's path without `.h5`.

    Raises:
        DataError: nothing there, or the pack is not one or is damaged.
    """
    if path.is_dir():
        return JpegFolder(path)
    pack_path = path if path.suffix == ".h5" else path.with_name(f"{path.name}.h5")
    if pack_path.is_file():
        return CropPack(pack_path)
    raise DataError(f"No crops at {path}: neither a folder of images nor a pack {pack_path.name}.")


def open_listed_crops(crops_root: Path, crops: str) -> VideoCrops:
    """Open the crops that a manifest names: a path below the root, '' if the video has none.

    Raises:
        DataError: none are named, or as `open_video_crops`.
    """
    if not crops:
        raise DataError("the manifest names no crops for this video; crop it and build the manifest again")
    return open_video_crops(crops_root / crops)


class JpegFolder(VideoCrops):
    """A folder of 00001.jpg, 00002.jpg ...; other files in it are ignored. It is listed once, when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._present = {index for entry in path.iterdir() if (index := _frame_index_or_none(entry.name)) is not None}
        self.num_frames = max(self._present, default=-1) + 1

    def read(self, start: int, stop: int) -> list[bytes | None]:
        return [
            (self.path / image_name(index)).read_bytes() if index in self._present else None
            for index in range(start, stop)
        ]

    def present(self, num_frames: int) -> npt.NDArray[np.bool_]:
        return np.fromiter((index in self._present for index in range(num_frames)), np.bool_, num_frames)

    def close(self) -> None:
        """Nothing is held open."""


class CropPack(VideoCrops):
    """An HDF5 pack. h5py lets one thread at a time into HDF5, so threads may share it; forked processes may not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise DataError(f"{path} cannot be read as HDF5 ({error}). Make it again with `vnaw crop`.") from error
        missing = [name for name in ("jpeg", "offset") if name not in self._file]
        if missing:
            self._file.close()
            raise DataError(f"{path} is not a pack of crops: it has no {' and no '.join(missing)}.")
        self._offset = self._file["offset"][:]
        self.num_frames = len(self._offset) - 1

    def read(self, start: int, stop: int) -> list[bytes | None]:
        last = min(stop, self.num_frames)
        images: list[bytes | None] = []
        if start < last:
            bounds = self._offset[start : last + 1]
            jpeg = self._file["jpeg"][bounds[0] : bounds[-1]].tobytes()
            inner = (bounds - bounds[0]).tolist()
            images = [jpeg[a:b] or None for a, b in pairwise(inner)]
        return images + [None] * (stop - start - len(images))

    def present(self, num_frames: int) -> npt.NDArray[np.bool_]:
        found = np.diff(self._offset)[:num_frames] > 0
        return np.pad(found, (0, num_frames - len(found)))

    def close(self) -> None:
        self._file.close()


def decode_crop(jpeg: bytes) -> Rgb:
    """Decode a JPEG, whole or not at all; a grey one becomes RGB.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: empty, not a JPEG, or damaged; says which, not where.
    """
    if not jpeg:
        raise DataError("the image is empty (zero bytes)")
    if jpeg.startswith(b"\x89PNG"):
        raise DataError("the image is a PNG under a JPEG's name; convert it, renaming is not enough")
    if not jpeg.startswith(b"\xff\xd8"):
        raise DataError(f"the image is not a JPEG: it begins with {jpeg[:4]!r}")
    try:
        return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB", strict=True))
    except ValueError as error:
        raise DataError(f"the JPEG is damaged or cut off: {error}") from error


def _frame_index_or_none(name: str) -> int | None:
    try:
        return frame_index_of(name)
    except DataError:
        return None
