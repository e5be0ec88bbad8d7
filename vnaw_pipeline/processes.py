"""One process or many: the same code runs alone, under `torchrun`, and under `accelerate launch`."""

import ctypes
import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vnaw_pipeline.stages import usable_cores

Item = TypeVar("Item")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(): above how many bytes freed memory goes back, and memory is taken from the system directly."""
_PATIENCE = timedelta(days=2)
"""How long a process waits for the others: the last chunk of one may take much longer than that of another."""


def process_state() -> PartialState:
    """Accelerate's view of the processes of this run; joins the others on the first call.

    Without a GPU it is told so, since it otherwise takes several CPU processes for separate runs.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def leave_processes() -> None:
    """Part from the other processes at the end of a program. Does nothing in a run of one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def gather_all(items: list[Item]) -> list[Item]:
    """The items of every process, in the order of the processes, in every process."""
    gathered: list[Item] = gather_object(items) if process_state().num_processes > 1 else items
    return gathered


def keep_freed_memory() -> None:
    """Keep what this process frees for what it allocates next, where the C library is glibc; elsewhere do nothing.

    Training on a CPU frees and allocates the same large buffers in every step, and by default the system hands them
    out anew, page by page: tf_efficientnet_lite0 at 96 px trained 1.5 times as fast with this, in the same memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(option, 2**31 - 1)


def cpu_share() -> int:
    """How many CPU cores this process may use, when those of one machine share them evenly; at least 1."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_share() -> int:
    """How many bytes of memory this process may still take, when those of one machine share it evenly."""
    return int(min(psutil.virtual_memory().available, cgroup_room())) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cgroup_room(root: Path = Path("/")) -> float:
    """Bytes below the tightest memory limit of the control groups that this process is in, those of a container or of a
    batch job; infinite where there is none. Cached pages of files count as free: they go when memory is needed.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return math.inf
    room = math.inf
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        is_v2 = controllers == ""
        limit, used = ("max", "current") if is_v2 else ("limit_in_bytes", "usage_in_bytes")
        top = root / "sys/fs/cgroup" / controllers
        folder = top / group.strip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(top) and (place / f"memory.{limit}").is_file():
                text = (place / f"memory.{limit}").read_text().strip()
                if text != "max":
                    room = min(room, int(text) - int((place / f"memory.{used}").read_text()) + _cached(place, is_v2))
    return room


def _cached(cgroup: Path, is_v2: bool) -> int:
    of_all = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    prefix = "" if is_v2 else "total_"
    return int(of_all[f"{prefix}inactive_file"]) + int(of_all[f"{prefix}active_file"])


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in every one of them."""
    if process_state().num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
