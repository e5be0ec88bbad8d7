"""The feature store: embeddings of every frame of every video, made once, in Zarr v3.

Layout: `<store>/<view>/<video_id>` float16 (T, D) and `<store>/valid/<video_id>` bool (T,), uncompressed, in chunks of
up to 4096 frames. The root's attributes hold the fingerprint of what made the plain embeddings, and for each view the
recipe that made it from the same input; a view may be added later. One chunk of one view of one video is a work unit:
it is written whole, `valid` first, by one process; it is done if and only if its embeddings are there.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.features.views import PLAIN, Recipe
from vnaw_pipeline.provenance import differences

CHUNK_FRAMES = 4096
IMPORTED = "imported"
"""Key of a fingerprint whose embeddings no encoder of ours made."""
VALID = "valid"
"""Folder of what tells which frames have an embedding; read like a view."""
_FORMAT = 2


@dataclass(frozen=True)
class Unit:
    """One chunk of one view of one video: frames [start, stop)."""

    video_id: str
    start: int
    stop: int
    view: str = PLAIN


class FeatureStore:
    """An open store. Use `open_store` to read one and `create_store` to make one or go on with one."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        attributes: dict[str, Any] = group.attrs.asdict()
        self.fingerprint: dict[str, Any] = attributes["fingerprint"]
        self.embedding_dim: int = attributes["embedding_dim"]
        self.views: dict[str, Recipe] = attributes["views"]

    def add_views(self, views: Mapping[str, Recipe]) -> None:
        """Make room for views, beside those that are there.

        Raises:
            StoreError: a view is there already, and was made by another recipe.
        """
        for view in views.keys() & self.views.keys():
            if unlike := differences(self.views[view], views[view]):
                raise StoreError(
                    f"View '{view}' in {self.path} was made in another way: {'; '.join(unlike)}. Extract a view of "
                    "another name, or use the config that made this one."
                )
        if views.keys() - self.views.keys():
            self.views = {**self.views, **views}
            self._group.attrs["views"] = self.views

    def add_video(self, video_id: str, num_frames: int, views: Sequence[str] = (PLAIN,)) -> None:
        """Make room for a video. Doing it again is allowed; with another number of frames it is an error."""
        rows, dim = min(num_frames, CHUNK_FRAMES), self.embedding_dim
        held = [view for view in self.views if self.has_video(video_id, view)]
        if found := {self.num_frames(video_id, view) for view in held} - {num_frames}:
            folders = ", ".join(str(self.path / folder / video_id) for folder in (VALID, *held))
            raise StoreError(
                f"{self.path} holds '{video_id}' with {found.pop()} frames, the manifest says {num_frames}. "
                f"Remove {folders} to make it again."
            )
        if PLAIN not in held:
            self._make_array(f"{VALID}/{video_id}", (num_frames,), "bool", (rows,))
        for view in views:
            if view not in held:
                self._make_array(f"{view}/{video_id}", (num_frames, dim), "float16", (rows, dim))

    def has_video(self, video_id: str, view: str = PLAIN) -> bool:
        """Whether the video has its place in the store (its embeddings may still be missing)."""
        return f"{view}/{video_id}" in self._group

    def num_frames(self, video_id: str, view: str = PLAIN) -> int:
        """Frames of a video in the store."""
        return self._array(view, video_id).shape[0]

    def units(self, video_id: str, view: str = PLAIN) -> list[Unit]:
        """All chunks of a view of a video, in order; those of its other views are cut at the same frames."""
        array = self._array(view, video_id)
        starts = range(0, array.shape[0], array.chunks[0])
        return [Unit(video_id, start, min(start + array.chunks[0], array.shape[0]), view) for start in starts]

    def missing_units(self, video_id: str, view: str = PLAIN) -> list[Unit]:
        """The chunks of a view of a video that are not there, or not there in full (a copy that was cut off)."""
        array = self._array(view, video_id)
        rows = array.chunks[0]
        chunk_bytes = rows * self.embedding_dim * array.dtype.itemsize  # the last chunk is stored padded
        return [
            unit
            for unit in self.units(video_id, view)
            if self._object_bytes(f"{array.path}/c/{unit.start // rows}/0") != chunk_bytes
        ]

    def write_unit(self, unit: Unit, embeddings: npt.NDArray[np.float16], valid: npt.NDArray[np.bool_]) -> None:
        """Write one chunk: embeddings (stop - start, D), valid (stop - start,). Each object is renamed into place."""
        for view, rows in ((VALID, valid), (unit.view, embeddings)):
            array = self._array(view, unit.video_id).with_config({"write_empty_chunks": True})
            array[unit.start : unit.stop] = rows

    def embeddings(self, video_id: str, view: str = PLAIN) -> npt.NDArray[np.float16]:
        """All embeddings of a video, (T, D); rows of frames without a usable crop are zero.

        Raises:
            StoreError: the video is not in the store, or not complete.
        """
        self.require([video_id], [view])
        return np.asarray(self._array(view, video_id)[:])

    def valid(self, video_id: str) -> npt.NDArray[np.bool_]:
        """Which frames of a video have an embedding, (T,); in all its views."""
        self.require([video_id])
        return np.asarray(self._array(VALID, video_id)[:])

    def valid_in(self, unit: Unit) -> npt.NDArray[np.bool_]:
        """Which frames of a chunk that is there have an embedding, (stop - start,)."""
        return np.asarray(self._array(VALID, unit.video_id)[unit.start : unit.stop])

    def lengths(self, video_ids: Sequence[str], views: Iterable[str] = (PLAIN,)) -> list[int]:
        """Frames of each of the videos, from the text of the arrays' descriptions: to open hundreds of arrays takes
        longer than to read what is in them.

        Raises:
            StoreError: a video is not there in all of the views.
        """
        try:
            of_views = [
                [
                    json.loads((self.path / view / video_id / "zarr.json").read_bytes())["shape"][0]
                    for video_id in video_ids
                ]
                for view in views
            ]
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} has no {error.filename}. Run `vnaw extract` (again).") from error
        return of_views[0]

    def read_into(self, video_id: str, rows: npt.NDArray[Any], view: str = PLAIN) -> None:
        """Read a view of a video into rows of a larger array: float16 (T, D), or of `VALID` bool (T,).

        What is not compressed lies in a chunk's file as it does in memory, so it is read to its place at the speed of a
        copy; Zarr reads into an array of its own first.

        Raises:
            StoreError: a chunk is not there, or not there in full.
        """
        step = min(len(rows), CHUNK_FRAMES)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            chunk = self.path / view / video_id / "c" / "/".join([str(start // step), *["0"] * (rows.ndim - 1)])
            try:
                with chunk.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != step * rows[0].nbytes:  # the last chunk is stored padded
                        raise StoreError(f"{chunk} has {size} bytes, expected {step * rows[0].nbytes}. Extract again.")
                    file.readinto(part.data)
            except FileNotFoundError as error:
                raise StoreError(f"{chunk} is missing. Extract again.") from error

    def require(self, video_ids: Sequence[str], views: Iterable[str] = (PLAIN,)) -> None:
        """Raise StoreError unless every one of the videos is there in full, in every one of the views."""
        for view in views:
            if view not in self.views:
                raise StoreError(
                    f"{self.path} has no view '{view}', only {', '.join(self.views)}. Add it to extract.views and run "
                    "`vnaw extract` again, which keeps what is there; imported features have no other views."
                )
            missing = [v for v in video_ids if not self.has_video(v, view) or self.missing_units(v, view)]
            if missing:
                raise StoreError(
                    f"{self.path} lacks {len(missing)} of {len(video_ids)} videos in view '{view}', or parts of them: "
                    f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
                    f"Run `vnaw {'import' if IMPORTED in self.fingerprint else 'extract'}` (again)."
                )

    def video_ids(self) -> list[str]:
        """All videos that have a place in the store, sorted."""
        group = self._group.get(PLAIN)
        return sorted(group.array_keys()) if isinstance(group, zarr.Group) else []

    def remove_partial_files(self) -> None:
        """Remove what a killed run left of objects that it was writing. Not while another run writes into the store."""
        for partial in self.path.rglob("*.partial"):
            partial.unlink(missing_ok=True)

    def _make_array(self, name: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]) -> None:
        # A chunk of zeros must be written like any other: that it is there is what says 'done'.
        options: Any = {"write_empty_chunks": True}
        self._group.create_array(
            name, shape=shape, dtype=dtype, chunks=chunks, compressors=None, config=options, overwrite=True
        )

    def _array(self, view: str, video_id: str) -> zarr.Array[Any]:
        array = self._group.get(f"{view}/{video_id}")
        if not isinstance(array, zarr.Array):
            raise StoreError(
                f"{self.path} has no video '{video_id}' in '{view}'. Run `vnaw extract` with a manifest that names it."
            )
        return array

    def _object_bytes(self, key: str) -> int | None:
        try:
            return sync(self._group.store.getsize(key))
        except FileNotFoundError:
            return None


def create_store(
    path: Path, fingerprint: Mapping[str, Any], embedding_dim: int, views: Mapping[str, Recipe] | None = None
) -> FeatureStore:
    """Open the store at `path` to write these views into it (None: plain); make it if nothing is there.

    Raises:
        StoreError: `path` is something else, or a store with another fingerprint or recipe (it says what differs).
    """
    found = [entry for entry in path.iterdir() if entry.suffix != ".partial"] if path.exists() else []
    if found and not (path / "zarr.json").exists():
        raise StoreError(f"{path} is not empty and is not a feature store. Give a new folder.")
    if not (path / "zarr.json").exists():
        attributes = {
            "format": _FORMAT,
            "embedding_dim": embedding_dim,
            "fingerprint": dict(fingerprint),
            "views": {PLAIN: {}},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        zarr.create_group(LocalStore(path), attributes=attributes)
    store = open_store(path, read_only=False)
    if (IMPORTED in store.fingerprint) != (IMPORTED in fingerprint):
        found_by, wanted_by = ("import", "extract") if IMPORTED in store.fingerprint else ("extract", "import")
        raise StoreError(
            f"The features in {path} were made by `vnaw {found_by}`; `vnaw {wanted_by}` does not add to them. "
            "Give a new folder."
        )
    if unlike := differences(store.fingerprint, fingerprint):
        raise StoreError(
            f"The features in {path} were made in another way: {'; '.join(unlike)}. "
            "Make a new store, or use what made this one."
        )
    store.add_views(views or {})
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
        raise StoreError(
            f"{path} is a Zarr group, but not a feature store of this version of the program (format {known!r}, "
            f"expected {_FORMAT}). Make a new one."
        )
    return FeatureStore(path, group)
