"""The feature store: embeddings of every frame of every video, made once, in Zarr v3.

Layout: `<store>/<view>/<video_id>` float16 (T, D) and `<store>/valid/<video_id>` bool (T,), uncompressed, in chunks of
up to 4096 frames. The root's attributes hold the fingerprint of what made the embeddings. One chunk of one video is a
work unit: it is written whole, `valid` first, by one process; it is done if and only if its embeddings are there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.provenance import differences

CHUNK_FRAMES = 4096
PLAIN = "plain"
_VALID = "valid"
_FORMAT = 1


@dataclass(frozen=True)
class Unit:
    """One chunk of one video: frames [start, stop)."""

    video_id: str
    start: int
    stop: int


class FeatureStore:
    """An open store. Use `open_store` to read one and `create_store` to make one or go on with one."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        attributes: dict[str, Any] = group.attrs.asdict()
        self.fingerprint: dict[str, Any] = attributes["fingerprint"]
        self.embedding_dim: int = attributes["embedding_dim"]

    def add_video(self, video_id: str, num_frames: int) -> None:
        """Make room for a video. Doing it again is allowed; with another number of frames it is an error."""
        if self.has_video(video_id):
            if (found := self.num_frames(video_id)) != num_frames:
                raise StoreError(
                    f"{self.path} holds '{video_id}' with {found} frames, the manifest says {num_frames}. "
                    f"Remove {self.path / PLAIN / video_id} and {self.path / _VALID / video_id} to extract it again."
                )
            return
        rows = min(num_frames, CHUNK_FRAMES)
        for name, shape, dtype, chunks in (
            (f"{_VALID}/{video_id}", (num_frames,), "bool", (rows,)),
            (f"{PLAIN}/{video_id}", (num_frames, self.embedding_dim), "float16", (rows, self.embedding_dim)),
        ):
            # A chunk of zeros must be written like any other: that it is there is what says 'done'.
            options: Any = {"write_empty_chunks": True}
            self._group.create_array(
                name, shape=shape, dtype=dtype, chunks=chunks, compressors=None, config=options, overwrite=True
            )

    def has_video(self, video_id: str) -> bool:
        """Whether the video has its place in the store (its embeddings may still be missing)."""
        return f"{PLAIN}/{video_id}" in self._group

    def num_frames(self, video_id: str) -> int:
        """Frames of a video in the store."""
        return self._array(PLAIN, video_id).shape[0]

    def units(self, video_id: str) -> list[Unit]:
        """All chunks of a video, in order."""
        array = self._array(PLAIN, video_id)
        starts = range(0, array.shape[0], array.chunks[0])
        return [Unit(video_id, start, min(start + array.chunks[0], array.shape[0])) for start in starts]

    def missing_units(self, video_id: str) -> list[Unit]:
        """The chunks of a video that are not there, or not there in full (a copy that was cut off)."""
        array = self._array(PLAIN, video_id)
        rows = array.chunks[0]
        chunk_bytes = rows * self.embedding_dim * array.dtype.itemsize  # the last chunk is stored padded
        return [
            unit
            for unit in self.units(video_id)
            if self._object_bytes(f"{array.path}/c/{unit.start // rows}/0") != chunk_bytes
        ]

    def write_unit(self, unit: Unit, embeddings: npt.NDArray[np.float16], valid: npt.NDArray[np.bool_]) -> None:
        """Write one chunk: embeddings (stop - start, D), valid (stop - start,). Each object is renamed into place."""
        for view, rows in ((_VALID, valid), (PLAIN, embeddings)):
            array = self._array(view, unit.video_id).with_config({"write_empty_chunks": True})
            array[unit.start : unit.stop] = rows

    def embeddings(self, video_id: str) -> npt.NDArray[np.float16]:
        """All embeddings of a video, (T, D); rows of frames without a usable crop are zero.

        Raises:
            StoreError: the video is not in the store, or not complete.
        """
        self.require([video_id])
        return np.asarray(self._array(PLAIN, video_id)[:])

    def valid(self, video_id: str) -> npt.NDArray[np.bool_]:
        """Which frames of a video have an embedding, (T,)."""
        self.require([video_id])
        return np.asarray(self._array(_VALID, video_id)[:])

    def read_into(self, video_id: str, embeddings: npt.NDArray[np.float16], valid: npt.NDArray[np.bool_]) -> None:
        """Read a video into rows of larger arrays: embeddings (T, D), valid (T,). The video must be complete."""
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            embeddings[:] = self._array(PLAIN, video_id)[:]
            valid[:] = self._array(_VALID, video_id)[:]

    def require(self, video_ids: list[str]) -> None:
        """Raise StoreError unless every one of the videos is there in full."""
        missing = [video_id for video_id in video_ids if not self.has_video(video_id) or self.missing_units(video_id)]
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {len(video_ids)} videos, or parts of them: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Run `vnaw extract` (again)."
            )

    def video_ids(self) -> list[str]:
        """All videos that have a place in the store, sorted."""
        group = self._group.get(PLAIN)
        return sorted(group.array_keys()) if isinstance(group, zarr.Group) else []

    def remove_partial_files(self) -> None:
        """Remove what a killed run left of objects that it was writing. Not while another run writes into the store."""
        for partial in self.path.rglob("*.partial"):
            partial.unlink(missing_ok=True)

    def _array(self, view: str, video_id: str) -> zarr.Array[Any]:
        array = self._group.get(f"{view}/{video_id}")
        if not isinstance(array, zarr.Array):
            raise StoreError(
                f"{self.path} has no video '{video_id}'. Run `vnaw extract` with a manifest that names it."
            )
        return array

    def _object_bytes(self, key: str) -> int | None:
        try:
            return sync(self._group.store.getsize(key))
        except FileNotFoundError:
            return None


def create_store(path: Path, fingerprint: Mapping[str, Any], embedding_dim: int) -> FeatureStore:
    """Open the store at `path` to write into it; make it if nothing is there.

    Raises:
        StoreError: `path` is something else, or a store with another fingerprint (it says what differs).
    """
    found = [entry for entry in path.iterdir() if entry.suffix != ".partial"] if path.exists() else []
    if found and not (path / "zarr.json").exists():
        raise StoreError(f"{path} is not empty and is not a feature store. Give a new folder.")
    if not (path / "zarr.json").exists():
        attributes = {"format": _FORMAT, "embedding_dim": embedding_dim, "fingerprint": dict(fingerprint)}
        path.parent.mkdir(parents=True, exist_ok=True)
        zarr.create_group(LocalStore(path), attributes=attributes)
    store = open_store(path, read_only=False)
    if unlike := differences(store.fingerprint, fingerprint):
        raise StoreError(
            f"The features in {path} were made in another way: {'; '.join(unlike)}. "
            "Extract into a new store, or use the config that made this one."
        )
    return store


def open_store(path: str | Path, read_only: bool = True) -> FeatureStore:
    """Open a feature store.

    Raises:
        StoreError: nothing there, or not a feature store.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise StoreError(f"There is no feature store at {path}. Make one with `vnaw extract`.")
    try:
        group = zarr.open_group(LocalStore(path, read_only=read_only), mode="r" if read_only else "r+")
        known = group.attrs.get("format")
    except Exception as error:
        raise StoreError(f"{path} cannot be opened as a Zarr group: {error}") from error
    if known != _FORMAT:
        raise StoreError(f"{path} is a Zarr group, but not a feature store of this program (format {known!r}).")
    return FeatureStore(path, group)
