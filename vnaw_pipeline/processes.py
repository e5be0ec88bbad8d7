"""One process or many: the same code runs alone, under `torchrun`, and under `accelerate launch`."""

import ctypes
import os
import sys
from datetime import timedelta
from typing import TypeVar

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


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in every one of them."""
    if process_state().num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor
