"""The feature bank: all frames a run needs, so that a window is a gather and not a read.

It lies on the device that computes, in the machine's memory, or in a file that is mapped into memory, of which a gather
touches its own rows alone: the first of these that it fits into. The file is written by each run that needs it and has
no name any more once it is mapped: it is never another store's, and nobody has to remove it, also after a kill. Writing
it takes as long as one pass over the embeddings.
"""

import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from vnaw_pipeline.config import BankPlace
from vnaw_pipeline.errors import StoreError
from vnaw_pipeline.features.store import VALID, FeatureStore
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.processes import cpu_share, gather_all, meet, memory_share, process_state
from vnaw_pipeline.stages import progress_bar

_PLACES: tuple[BankPlace, ...] = ("device", "memory", "mapped")
_SHARE = {"device": 0.5, "memory": 0.8}
"""Of what is free when a bank is opened, the most that it takes: what is opened later, a model and its activations
need the rest."""


@dataclass(frozen=True)
class FeatureBank:
    """Frames of several videos, end to end, and one row of zeros at the end for positions without a frame.

    `embeddings` float16 (N + 1, D) and `valid` bool (N + 1,); `first` int64 (V + 1,) is the row of
    each video's first frame, `first[V] = N`. `video_ids` names the videos in that order. `other_views` are further
    embeddings (N + 1, D) of the same frames, by view; `embeddings` is the plain one. `valid` and `first` lie on the
    device that computes, the embeddings there too or on the host.
    """

    video_ids: list[str]
    embeddings: Tensor
    valid: Tensor
    first: Tensor
    other_views: Mapping[str, Tensor] = field(default_factory=dict)

    def view(self, name: str) -> Tensor:
        """Embeddings (N + 1, D) in a view that the bank was opened with."""
        return self.embeddings if name == PLAIN else self.other_views[name]

    @property
    def num_frames(self) -> Tensor:
        """Frames of each video, int64 (V,)."""
        return self.first[1:] - self.first[:-1]

    @property
    def embedding_dim(self) -> int:
        """Embedding width D."""
        return self.embeddings.shape[1]

    @property
    def zero_row(self) -> int:
        """Row of zeros, never valid."""
        return self.embeddings.shape[0] - 1

    @property
    def device(self) -> torch.device:
        """Where windows of the bank are computed on."""
        return self.valid.device


def open_bank(
    store: FeatureStore,
    video_ids: list[str] | None = None,
    shown: bool = True,
    views: Sequence[str] = (PLAIN,),
    *,
    device: torch.device | None = None,
    place: BankPlace = "device",
) -> FeatureBank:
    """Read whole videos from a store: N frames of width D take 2 N D bytes a view. Plain is always read.

    `device` (None: the CPU) is where windows will be computed on. A bank that does not fit into `place` goes to the
    next one, from the device to memory to a mapped file, and says so, also where no progress bar is `shown`. All
    processes of a run open it together; those of one machine share a mapped file.

    Raises:
        StoreError: a view or a video is missing or not complete; no room for a mapped file.
    """
    views = (PLAIN, *(view for view in views if view != PLAIN))
    video_ids = store.video_ids() if video_ids is None else video_ids
    device = device or torch.device("cpu")
    try:
        first = np.concatenate([[0], np.cumsum(store.lengths(video_ids, views))]).astype(np.int64)
        total = int(first[-1])
        shape = (len(views), total + 1, store.embedding_dim)
        place = _first_that_fits(place, 2 * math.prod(shape), device)
        tables = dict(zip(views, _allocate(place, shape, device), strict=True))
        valid = torch.zeros(total + 1, dtype=torch.bool)
        to_fill = tables if place != "mapped" or process_state().is_local_main_process else {}

        def read(source: tuple[str, Tensor, int]) -> int:
            view, table, video = source
            rows = table[first[video] : first[video + 1]]
            host = rows if rows.device.type == "cpu" else torch.empty_like(rows, device="cpu")
            store.read_into(video_ids[video], host.numpy(), view)
            if host is not rows:
                rows.copy_(host)
            return 0 if view == VALID else len(rows)

        sources = [(*of, video) for video in range(len(video_ids)) for of in {**to_fill, VALID: valid}.items()]
        with (
            progress_bar("load features", total * len(to_fill), shown=shown) as bar,
            ThreadPoolExecutor(cpu_share()) as pool,
        ):
            for count in pool.map(read, sources):
                bar.advance(count)
        for table in to_fill.values():
            table[total] = 0
    except StoreError:
        store.require(video_ids, views)  # says all that is missing
        raise
    if place == "mapped":
        meet()
    plain = tables.pop(PLAIN)
    return FeatureBank(video_ids, plain, valid.to(device), torch.from_numpy(first).to(device), tables)


def _first_that_fits(wanted: BankPlace, size: int, device: torch.device) -> BankPlace:
    """Where a bank of so many bytes goes; every process decides alike, since they share a mapped file."""
    free = {"memory": memory_share()}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps of an earlier training would count as taken
        free["device"] = torch.cuda.mem_get_info(device)[0]
    for place in _PLACES[_PLACES.index(wanted) : -1]:
        if place in free:
            least = min(gather_all([free[place]]))
            if size <= _SHARE[place] * least:
                return place
            if process_state().is_main_process:
                following = "memory" if place == "device" else f"a file in {tempfile.gettempdir()}"
                sys.stderr.write(
                    f"The features, {size / 1e9:.3g} GB, do not fit into {_SHARE[place]:.0%} of the {place}'s free "
                    f"{least / 1e9:.3g} GB; trying {following}.\n"
                )
    return _PLACES[-1]


def _allocate(place: BankPlace, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """An array of float16, not filled; a mapped one is the same in all processes of a machine."""
    if place == "device":
        return torch.empty(shape, dtype=torch.float16, device=device)
    if place == "memory":
        return torch.from_numpy(np.empty(shape, dtype=np.float16))  # NumPy asks for large pages
    folder, size = tempfile.gettempdir(), 2 * math.prod(shape)
    if (named := os.environ.get("TMPDIR")) and Path(named).resolve() != Path(folder).resolve():
        raise StoreError(  # Python has passed over it without a word
            f"TMPDIR is {named}, which is no folder that can be written to. Set it to one on a local disk, or unset it."
        )
    if _lies_in_memory(Path(folder)):
        raise StoreError(
            f"The features, {size / 1e9:.3g} GB, are to be mapped from a file in {folder}, whose files lie in memory "
            "(tmpfs). Set TMPDIR to a folder on a local disk."
        )
    if size > (free := shutil.disk_usage(folder).free):
        raise StoreError(
            f"The features, {size / 1e9:.3g} GB, are to be mapped from a file in {folder}, where {free / 1e9:.3g} GB "
            "are free. Set TMPDIR to a folder on a local disk with more."
        )
    path = Path(folder) / f"vnaw_bank.{gather_all([secrets.token_hex(8)])[0]}.{socket.gethostname()}"
    try:
        rows = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float16)
        with path.open("r+b") as file:
            meet()  # all have mapped it: it lives on without a name
            path.unlink(missing_ok=True)
            if process_state().is_local_main_process and hasattr(os, "posix_fallocate"):
                # A mapped file that finds no room later ends the program without a word.
                os.posix_fallocate(file.fileno(), 0, size)
        meet()
    except (OSError, RuntimeError) as error:  # PyTorch's own is the second
        raise StoreError(
            f"The features, {size / 1e9:.3g} GB, cannot be mapped from a file in {folder}: {error}."
        ) from error
    finally:
        path.unlink(missing_ok=True)
    return rows.view(shape)


def _lies_in_memory(folder: Path) -> bool:
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    found = next((mounts[place] for place in (folder.resolve(), *folder.resolve().parents) if place in mounts), "")
    return found in ("tmpfs", "ramfs")
