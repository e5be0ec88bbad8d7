"""The feature store: embeddings of every frame of every video, made once, in Zarr v3, in a folder or on S3.

Layout: `<store>/<view>/<video_id>` float16 (T, D) and `<store>/valid/<video_id>` bool (T,), uncompressed, in chunks of
up to 4096 frames. The root's attributes hold the fingerprint of what made the plain embeddings, and for each view the
recipe that made it from the same input; a view may be added later. One chunk of one view of one video is a work unit:
it is written whole, `valid` first, by one process; it is done if and only if its embeddings are there.
"""

import json
import os
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayMetadata
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.features.fingerprints import feature_differences
from vnaw_pipeline.features.views import PLAIN, Recipe
from vnaw_pipeline.locations import Location, files_below, location, reach
from vnaw_pipeline.provenance import differences, is_partial, write_bytes

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
    """An open store. Use `open_store` to read one and `create_store` to make one or go on with one.

    It knows the videos that a view had when it was first asked for, and those added through it since.
    """

    def __init__(self, path: Location, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self._arrays: dict[str, dict[str, zarr.Array[Any]]] = {}
        self._found_whole: set[tuple[str, str]] = set()
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
            reach(self.path, lambda: self._group.update_attributes({"views": self.views}))

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
            self._make_array(VALID, video_id, (num_frames,), "bool", (rows,))
        for view in views:
            if view not in held:
                self._make_array(view, video_id, (num_frames, dim), "float16", (rows, dim))

    def has_video(self, video_id: str, view: str = PLAIN) -> bool:
        """Whether the video has its place in the store (its embeddings may still be missing)."""
        return video_id in self._arrays_of(view)

    def num_frames(self, video_id: str, view: str = PLAIN) -> int:
        """Frames of a video in the store."""
        return self._array(view, video_id).shape[0]

    def units(self, video_id: str, view: str = PLAIN) -> list[Unit]:
        """All chunks of a view of a video, in order; those of its other views are cut at the same frames."""
        array = self._array(view, video_id)
        starts = range(0, array.shape[0], array.chunks[0])
        return [Unit(video_id, start, min(start + array.chunks[0], array.shape[0]), view) for start in starts]

    def missing_units(self, video_ids: Sequence[str], view: str = PLAIN) -> list[Unit]:
        """The chunks of a view of videos that are not there, or not there in full (a copy that was cut off). Those of
        the plain view want their part of `VALID` too.

        The store is listed once a view, and not asked chunk by chunk.
        """
        size_of = self._object_bytes(video_ids, view)
        valid_size_of = self._object_bytes(video_ids, VALID) if view == PLAIN else None
        missing = []
        for video_id in video_ids:
            array = self._array(view, video_id)
            rows = array.chunks[0]
            chunk_bytes = rows * self.embedding_dim * array.dtype.itemsize  # the last chunk is stored padded
            for unit in self.units(video_id, view):
                chunk = f"{video_id}/c/{unit.start // rows}"
                is_whole = size_of.get(f"{chunk}/0") == chunk_bytes
                if not is_whole or (valid_size_of is not None and valid_size_of.get(chunk) != rows):
                    missing.append(unit)
        return missing

    def write_unit(self, unit: Unit, embeddings: npt.NDArray[np.float16], valid: npt.NDArray[np.bool_]) -> None:
        """Write one chunk: embeddings (stop - start, D), valid (stop - start,). Each object is there whole or not."""
        for view, rows in ((VALID, valid), (unit.view, embeddings)):
            # A chunk of zeros must be written like any other: that it is there is what says 'done'.
            array = self._array(view, unit.video_id).with_config({"write_empty_chunks": True})
            reach(self.path, partial(array.__setitem__, slice(unit.start, unit.stop), rows))

    def remove_unit(self, unit: Unit) -> None:
        """Take the embeddings of a chunk away, so that it counts as missing until it is written again."""
        number = unit.start // self._array(unit.view, unit.video_id).chunks[0]
        (self.path / unit.view / unit.video_id / "c" / str(number) / "0").unlink(missing_ok=True)

    def embeddings(self, video_id: str, view: str = PLAIN) -> npt.NDArray[np.float16]:
        """All embeddings of a video, (T, D); rows of frames without a usable crop are zero.

        Raises:
            StoreError: the video is not in the store, or not complete.
        """
        self.require([video_id], [view])
        return np.asarray(self._rows(view, video_id, slice(None)))

    def valid(self, video_id: str) -> npt.NDArray[np.bool_]:
        """Which frames of a video have an embedding, (T,); in all its views."""
        self.require([video_id])
        return np.asarray(self._rows(VALID, video_id, slice(None)))

    def valid_in(self, unit: Unit) -> npt.NDArray[np.bool_]:
        """Which frames of a chunk that is there have an embedding, (stop - start,)."""
        return np.asarray(self._rows(VALID, unit.video_id, slice(unit.start, unit.stop)))

    def lengths(self, video_ids: Sequence[str], views: Iterable[str] = (PLAIN,)) -> list[int]:
        """Frames of each of the videos; on S3, where Zarr reads zeros for a missing chunk, all of them are looked for.

        Raises:
            StoreError: a video is not there in all of the views.
        """
        if not isinstance(self.path, Path):
            self.require(video_ids, views)
            return [self.num_frames(video_id) for video_id in video_ids]
        of_views = [[self._length(view, video_id) for video_id in video_ids] for view in views]
        return of_views[0]

    def require_lengths(self, video_ids: Sequence[str], found: Sequence[int], wanted: Sequence[int]) -> None:
        """Raise StoreError if a video has another number of frames here than it should."""
        for video_id, here, there in zip(video_ids, found, wanted, strict=True):
            if here != there:
                raise StoreError(
                    f"{self.path} holds {here} frames of '{video_id}', the manifest {there}. Extract again."
                )

    def _length(self, view: str, video_id: str) -> int:
        try:  # to open hundreds of arrays takes longer than to read what is in them
            length: int = json.loads((self.path / view / video_id / "zarr.json").read_bytes())["shape"][0]
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} has no {error.filename}. Run `vnaw extract` (again).") from error
        return length

    def read_into(self, video_id: str, rows: npt.NDArray[Any], view: str = PLAIN) -> None:
        """Read a view of a video into rows of a larger array: float16 (T, D), or of `VALID` bool (T,).

        What is not compressed lies in a chunk's file as it does in memory, so it is read to its place at the speed of a
        copy; Zarr, which reads from S3, reads into an array of its own first.

        Raises:
            StoreError: a chunk in a folder is not there, or not there in full; `lengths` looks for those on S3.
        """
        if not isinstance(self.path, Path):
            rows[:] = self._rows(view, video_id, slice(None))
            return
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
        """Raise StoreError unless every one of the videos is there in full, in every one of the views.

        On S3, where this takes long, what was found so once is not looked for again.
        """
        for view in views:
            if view not in self.views:
                raise StoreError(
                    f"{self.path} has no view '{view}', only {', '.join(self.views)}. Add it to extract.views and run "
                    "`vnaw extract` again, which keeps what is there; imported features have no other views."
                )
            unknown = [video_id for video_id in video_ids if (view, video_id) not in self._found_whole]
            there = [video_id for video_id in unknown if self.has_video(video_id, view)]
            whole = set(there) - {unit.video_id for unit in self.missing_units(there, view)}
            missing = [video_id for video_id in unknown if video_id not in whole]
            if missing:
                raise StoreError(
                    f"{self.path} lacks {len(missing)} of {len(video_ids)} videos in view '{view}', or parts of them: "
                    f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
                    f"Run `vnaw {'import' if IMPORTED in self.fingerprint else 'extract'}` (again)."
                )
            if not isinstance(self.path, Path):
                self._found_whole |= {(view, video_id) for video_id in whole}

    def video_ids(self) -> list[str]:
        """All videos that have a place in the store, sorted."""
        if isinstance(self.path, Path):  # to open hundreds of arrays takes as long as to read a quarter of them
            return sorted(metadata.parent.name for metadata in (self.path / PLAIN).glob("*/zarr.json"))
        return sorted(self._arrays_of(PLAIN))

    def remove_partial_files(self) -> None:
        """Remove what a killed run left of files that it was writing. Not while another run writes into the store.

        On S3, where an object is there whole or not at all, there is nothing to look for.
        """
        for name in files_below(self.path) if isinstance(self.path, Path) else ():
            if is_partial(name):
                (self.path / name).unlink(missing_ok=True)

    def _make_array(
        self, view: str, video_id: str, shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...]
    ) -> None:
        """Write the metadata that zarr would, and nothing else: zarr also writes those of the groups above, and relies
        on a server that does not let it overwrite them."""
        if not self._arrays_of(view):
            self._write_metadata(f"{view}/zarr.json", GroupMetadata())
        for name in files_below(self.path / view / video_id):  # chunks of another length
            (self.path / view / video_id / name).unlink(missing_ok=True)
        metadata = zarr.create_array(MemoryStore(), shape=shape, dtype=dtype, chunks=chunks, compressors=None).metadata
        self._write_metadata(f"{view}/{video_id}/zarr.json", metadata)
        place = self._group.store_path / view / video_id
        self._arrays_of(view)[video_id] = zarr.Array(zarr.AsyncArray(metadata, place))

    def _write_metadata(self, name: str, metadata: GroupMetadata | ArrayMetadata) -> None:
        write_bytes(self.path / name, metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes())

    def _arrays_of(self, view: str) -> dict[str, zarr.Array[Any]]:
        """A view's arrays by video, read all at once, since each one is a file, or a request."""
        if view not in self._arrays:
            group = reach(self.path, lambda: self._group.get(view))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ZarrUserWarning)  # of a folder that a kill left without metadata
                arrays = reach(self.path, lambda: list(group.arrays())) if isinstance(group, zarr.Group) else []
            self._arrays[view] = dict(arrays)
        return self._arrays[view]

    def _array(self, view: str, video_id: str) -> zarr.Array[Any]:
        array = self._arrays_of(view).get(video_id)
        if array is None:
            raise StoreError(
                f"{self.path} has no video '{video_id}' in '{view}'. Run `vnaw extract` with a manifest that names it."
            )
        return array

    def _rows(self, view: str, video_id: str, rows: slice) -> Any:
        """Rows of an array. From files zarrs reads them, which is faster; of S3 it would ask twice, in new connections
        each time."""
        array = self._array(view, video_id)
        if isinstance(self.path, Path):
            with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
                array = zarr.Array(zarr.AsyncArray(array.metadata, array.store_path))
        return reach(self.path, lambda: array[rows])

    def _object_bytes(self, video_ids: Sequence[str], view: str) -> dict[str, int]:
        """How many bytes the objects of a view have, by name: of all videos, or of one if only that is asked for."""
        folder = self.path / view
        if len(video_ids) == 1:
            return {f"{video_ids[0]}/{name}": size for name, size in files_below(folder / video_ids[0]).items()}
        return files_below(folder)


def create_store(
    path: str | Location, fingerprint: Mapping[str, Any], embedding_dim: int, views: Mapping[str, Recipe] | None = None
) -> FeatureStore:
    """Open the store at `path` to write these views into it (None: plain); make it if nothing is there.

    Raises:
        StoreError: `path` is something else, or a store with another fingerprint or recipe (it says what differs).
    """
    path = location(path)
    if not (path / "zarr.json").is_file():
        if not all(map(is_partial, files_below(path))):
            raise StoreError(f"{path} is not empty and is not a feature store. Give a new folder.")
        attributes = {
            "format": _FORMAT,
            "embedding_dim": embedding_dim,
            "fingerprint": dict(fingerprint),
            "views": {PLAIN: {}},
        }
        reach(path, lambda: zarr.create_group(_zarr_store(path), attributes=attributes))
    store = open_store(path, read_only=False)
    if (IMPORTED in store.fingerprint) != (IMPORTED in fingerprint):
        found_by, wanted_by = ("import", "extract") if IMPORTED in store.fingerprint else ("extract", "import")
        raise StoreError(
            f"The features in {path} were made by `vnaw {found_by}`; `vnaw {wanted_by}` does not add to them. "
            "Give a new folder."
        )
    if unlike := feature_differences(store.fingerprint, fingerprint):
        raise StoreError(
            f"The features in {path} were made in another way: {'; '.join(unlike)}. "
            f"Make a new store, or use what made this one.{what_to_set(store.fingerprint, fingerprint)}"
        )
    store.add_views(views or {})
    return store


def what_to_set(made: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Sentences with the options that make features as `made` was, where those `here` were extracted differently."""
    both = [key for key in ("backend", "precision", "crops") if key in made and key in here]  # not of imported ones
    unlike = {key: made[key] for key in both if made[key] != here[key]}
    crops = unlike.pop("crops", "")
    options = " ".join(f"--set extract.{key}={value}" for key, value in unlike.items())
    said = f" Here that takes {options}." if options else ""
    if crops:
        alike = shlex.quote(f"extract.crop_set={json.dumps(crops)}")
        said += f" Where the crops are cut alike, `vnaw extract --set {alike}` says so."
    return said


def open_store(path: str | Location, read_only: bool = True) -> FeatureStore:
    """Open a feature store: a folder, or `s3://bucket/folder`.

    Raises:
        StoreError: nothing there, or not a feature store; a bucket that cannot be read.
    """
    path = location(path)
    if not (path / "zarr.json").is_file():
        raise StoreError(f"There is no feature store at {path}. Make one with `vnaw extract`.")
    try:
        group = reach(
            path,
            lambda: zarr.open_group(
                _zarr_store(path, read_only), mode="r" if read_only else "r+", zarr_format=3, use_consolidated=False
            ),
        )
        known = group.attrs.get("format")
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{path} cannot be opened as a Zarr group: {error}") from error
    if known != _FORMAT:
        raise StoreError(
            f"{path} is a Zarr group, but not a feature store of this version of the program (format {known!r}, "
            f"expected {_FORMAT}). Make a new one."
        )
    return FeatureStore(path, group)


def _zarr_store(path: Location, read_only: bool = False) -> LocalStore | ObjectStore[Any]:
    if isinstance(path, Path):
        return LocalStore(path, read_only=read_only)
    return ObjectStore(path.client(), read_only=read_only)
