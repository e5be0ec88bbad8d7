"""Embeddings as other programs keep them, read and written.

`tree`: `<root>/<video_id>/00001.npy`, one file a frame, (1, D) or (D,), float16, 32 or 64, as the published features of
Random Masking (`features_mean/`, `features_cls/`). Numbers are those of the crops: 00001.npy is frame_index 0. A frame
without a file is not valid.

`hdf5`: `<root>/<video_id>.h5` with the datasets `embeddings` (T, D), float16, 32 or 64, and `valid` (T,), bool or 0 and
1. Rows of frames that are not valid are not looked at.
"""

import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from vnaw_pipeline.annotations import frame_index_of, image_name
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.provenance import digest_bytes, write_bytes

Layout = Literal["tree", "hdf5"]
Rows = tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]
"""Embeddings (n, D), zero where not valid, and valid (n,)."""

_SUFFIX = {"tree": "", "hdf5": ".h5"}
_FLOATS = ("f2", "f4", "f8")


class ForeignVideo(Protocol):
    """The embeddings of one video. `embedding_dim` is None if it has no valid frame; `digest` is that of its first and
    last valid frames, which are checked when it is opened: so what is mended between them does not change it.
    `frames` are the valid ones, ascending."""

    path: Path
    embedding_dim: int | None
    digest: str
    frames: npt.NDArray[np.integer[Any]]

    def valid(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which of the frames [start, stop) there are."""
        return np.isin(np.arange(start, stop), self.frames)

    def read(self, start: int, stop: int, embedding_dim: int, pool: Executor) -> Rows:
        """Frames [start, stop).

        Raises:
            DataError: every file that cannot be used, a line each.
        """


def find_layout(root: Path) -> Layout:
    """How the embeddings below a folder are kept.

    Raises:
        DataError: there are none, or both folders and HDF5 files.
    """
    found = [entry for entry in root.iterdir() if not entry.name.startswith(".")] if root.is_dir() else []
    layouts: list[Layout] = []
    if any(entry.is_dir() for entry in found):
        layouts.append("tree")
    if any(entry.suffix == _SUFFIX["hdf5"] for entry in found):
        layouts.append("hdf5")
    if len(layouts) != 1:
        seen = "both folders and .h5 files" if layouts else "neither folders nor .h5 files"
        raise DataError(f"{root} holds {seen}; expected a folder a video with .npy files, or one .h5 file a video.")
    return layouts[0]


def path_of(root: Path, layout: Layout, video_id: str) -> Path:
    """Where a video's embeddings lie."""
    return root / f"{video_id}{_SUFFIX[layout]}"


def open_foreign_video(root: Path, layout: Layout, video_id: str, num_frames: int) -> ForeignVideo:
    """Open a video of so many frames; its files are listed, and its first and last embedding read.

    Raises:
        DataError: it is not there; a numbering, shape or type that does not fit; a line for each fault.
    """
    path = path_of(root, layout, video_id)
    if not path.exists():
        raise DataError(f"{path} is not there; the manifest names the video '{video_id}'.")
    return NpyFolder(path, num_frames) if layout == "tree" else Hdf5File(path, num_frames)


class NpyFolder(ForeignVideo):
    """A folder of 00001.npy, 00002.npy, ...; other files in it are ignored."""

    def __init__(self, path: Path, num_frames: int) -> None:
        self.path = path
        frames: list[int] = []
        problems = []
        for name in _npy_names(path):
            try:
                frame_index = frame_index_of(name.replace(".npy", ".jpg"))
            except DataError:
                hint = "; numbers start at 00001, not at 0" if name == "00000.npy" else ""
                problems.append(f"{path / name} is not named as a frame is: expected 00001.npy, 00002.npy ...{hint}.")
                continue
            if frame_index >= num_frames:
                problems.append(f"{path / name} is beyond the video's end: the manifest says {num_frames} frames.")
            frames.append(frame_index)
        if problems:
            raise DataError("\n".join(problems))
        self.frames = np.sort(np.array(frames, dtype=np.int32))
        self.embedding_dim = None
        ends = self.frames[[0, -1]].tolist() if frames else []
        rows = []
        for frame_index in ends:
            rows.append(read_npy(self._file(frame_index), self.embedding_dim))
            self.embedding_dim = len(rows[0])
        self.digest = _digest_of(ends, rows)

    def read(self, start: int, stop: int, embedding_dim: int, pool: Executor) -> Rows:
        low, high = np.searchsorted(self.frames, [start, stop])
        embeddings = np.zeros((stop - start, embedding_dim), np.float16)
        valid = np.zeros(stop - start, np.bool_)

        def read_one(frame_index: int) -> DataError | None:
            try:
                embeddings[frame_index - start] = read_npy(self._file(frame_index), embedding_dim)
            except DataError as error:
                return error
            valid[frame_index - start] = True
            return None

        problems = [str(error) for error in pool.map(read_one, self.frames[low:high].tolist()) if error is not None]
        if problems:
            raise DataError("\n".join(problems))
        return embeddings, valid

    def _file(self, frame_index: int) -> Path:
        return self.path / _npy_name(frame_index)


class Hdf5File(ForeignVideo):
    """One HDF5 file; it is opened for each read, since HDF5 lets one thread in at a time anyway."""

    def __init__(self, path: Path, num_frames: int) -> None:
        self.path = path
        with self._opened() as file:
            missing = [name for name in ("embeddings", "valid") if not isinstance(file.get(name), h5py.Dataset)]
            if missing:
                raise DataError(f"{path} has no dataset {' and no '.join(missing)}; expected embeddings and valid.")
            embeddings, valid = file["embeddings"], file["valid"]
            shape, dtype = embeddings.shape, embeddings.dtype
            if len(shape or ()) != 2 or shape[0] != num_frames or dtype.str[1:] not in _FLOATS:
                raise DataError(
                    f"{path}: embeddings are {shape} of {dtype}; expected ({num_frames}, D), the frames that the "
                    "manifest says, of float16, float32 or float64."
                )
            if valid.shape != (num_frames,) or valid.dtype.kind not in "biu" or not np.isin(valid[:], (0, 1)).all():
                raise DataError(
                    f"{path}: valid is {valid.shape} of {valid.dtype}; expected ({num_frames},) of bool, or of 0 and 1."
                )
            found = np.flatnonzero(valid[:])
            ends = found[[0, -1]].tolist() if len(found) else []
            rows = [_as_float16(embeddings[frame_index], f"{path}, frame {frame_index}") for frame_index in ends]
        self.embedding_dim = shape[1] if ends else None
        self.digest = _digest_of(ends, rows)
        self.frames = found

    def read(self, start: int, stop: int, embedding_dim: int, pool: Executor) -> Rows:
        with self._opened() as file:
            given, valid = file["embeddings"][start:stop], file["valid"][start:stop].astype(np.bool_)
        embeddings = np.zeros((stop - start, embedding_dim), np.float16)
        if valid.any():
            embeddings[valid] = _as_float16(given[valid], f"{self.path}, frames {start} to {stop - 1}")
        return embeddings, valid

    @contextmanager
    def _opened(self) -> Iterator[h5py.File]:
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        except (OSError, KeyError, RuntimeError) as error:  # what h5py raises for damage, by where it is
            raise DataError(f"{self.path} cannot be read as HDF5: {error}.") from error


def read_npy(path: Path, embedding_dim: int | None = None) -> npt.NDArray[np.float16]:
    """The embedding of one frame, (D,). Pickles are never loaded.

    Raises:
        DataError: not an .npy file, another width or type, cut off, a value that float16 cannot hold.
    """
    try:
        content = path.read_bytes()
        length_bytes = 2 if content[6:7] == b"\x01" else 4  # of the number that says how long the header is
        end = 8 + length_bytes + int.from_bytes(content[8 : 8 + length_bytes], "little")
        shape, dtype = _npy_header(content[:end])
    except (OSError, ValueError, TokenError) as error:  # what NumPy raises for a damaged header, by where it is
        raise DataError(f"{path} cannot be read as an .npy file: {error}.") from error
    is_embedding = shape and shape[:-1] in ((), (1,)) and dtype.str[1:] in _FLOATS
    if not is_embedding or embedding_dim not in (None, shape[-1]):
        wanted = embedding_dim or "D"
        raise DataError(
            f"{path} holds {shape} of {dtype}; expected (1, {wanted}) or ({wanted},) of float16, float32 or float64."
        )
    if len(content) - end != shape[-1] * dtype.itemsize:
        raise DataError(f"{path} is cut off or too long: it holds {len(content) - end} bytes of {shape} of {dtype}.")
    return _as_float16(np.frombuffer(content, dtype, offset=end), str(path))


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type. Kept, since millions of files have the same header and reading it is half of the work."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def write_foreign_video(root: Path, layout: Layout, video_id: str, rows: Rows) -> None:
    """Write a video's embeddings, whole or not at all: `tree` in float32, as the published trees are; `hdf5` in
    float16. Both hold the same numbers."""
    embeddings, valid = rows
    path = path_of(root, layout, video_id)
    if layout == "hdf5":
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file["embeddings"], file["valid"] = embeddings, valid
        write_bytes(path, buffer.getvalue())
        return
    partial = root / f".{video_id}.partial"
    if partial.is_dir():  # left by a kill
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for frame_index in np.flatnonzero(valid).tolist():
        np.save(partial / _npy_name(frame_index), embeddings[frame_index : frame_index + 1].astype(np.float32))
    partial.rename(path)


def _digest_of(frames: list[int], rows: list[npt.NDArray[np.float16]]) -> str:
    return digest_bytes(str(frames).encode(), *(row.tobytes() for row in rows))


def _npy_name(frame_index: int) -> str:
    return image_name(frame_index).replace(".jpg", ".npy")


def _npy_names(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 - Path.iterdir makes an object per file, of which there are millions
    except OSError as error:
        raise DataError(f"The folder {folder} cannot be listed: {error.strerror}.") from error
    return [name for name in names if name.endswith(".npy") and not name.startswith(".")]


def _as_float16(values: npt.NDArray[np.floating], where: str) -> npt.NDArray[np.float16]:
    if not (np.abs(values) <= np.finfo(np.float16).max).all():
        raise DataError(f"{where}: values that are not numbers, or beyond 65504, which float16 cannot hold.")
    return values.astype(np.float16)
