"""One process or many: the same code runs alone, under `torchrun`, and under `accelerate launch`."""

import atexit
import ctypes
import math
import os
import socket
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from vnaw_pipeline.errors import ProcessError, listing
from vnaw_pipeline.provenance import code_digest, differences, environment, flat
from vnaw_pipeline.stages import control_groups, usable_cores

Item = TypeVar("Item")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(): above how many bytes freed memory goes back, and memory is taken from the system directly."""
_PATIENCE = timedelta(minutes=10)
"""How long processes wait for all to join, and for each other in an exchange that all are ready for."""
_SILENCE = timedelta(seconds=60)
"""How long nothing is heard from the others until a process takes them for lost; a network may need a while to mend."""
_BEAT_SECONDS = 1.0
_MOST_DIFFERENCES = 8
"""Named of a process that is unlike the first."""
_LAST_MEETING = sys.maxsize


class _Heartbeat:
    """Knows that all processes of a run are alive, and when all of them have come to the same point.

    A thread tells the others once a second how many meetings this process has come to, and hears the smallest number
    of all. Where that exchange fails, another process has died or the network is cut. The main thread may then be
    deep in work, or wait for an answer that never comes; so the program ends at once, with a message. What it wrote is
    whole, as after any kill.
    """

    def __init__(self, state: PartialState) -> None:
        self._name = f"Process {state.process_index} of {state.num_processes} on {socket.gethostname()}"
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=_SILENCE)
        self._come_to = self._all_came_to = 0
        self._exiting = False
        self._news = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()
        atexit.register(self._fall_silent)

    def meet(self) -> None:
        """Return when every process has called this as often as this one. It may take days, while all are alive."""
        with self._news:
            self._come_to = meeting = self._come_to + 1
            self._news.notify_all()
            self._news.wait_for(lambda: self._all_came_to >= meeting)

    def end(self) -> None:
        """Come to the last meeting; return when all have."""
        with self._news:
            self._come_to = _LAST_MEETING
            self._news.notify_all()
        self.thread.join()

    def _fall_silent(self) -> None:
        """On any way out: Python must not end while the thread is in the middle of an exchange."""
        with self._news:
            self._exiting = True
            self._news.notify_all()
        self.thread.join(2 * _BEAT_SECONDS)

    def _run(self) -> None:
        while self._all_came_to < _LAST_MEETING and not self._exiting:
            smallest = torch.tensor(self._come_to)
            try:
                torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, self._group)
            except RuntimeError as error:
                if self._exiting:
                    return
                self._stop_program(str(error))
            with self._news:
                self._all_came_to = int(smallest)
                self._news.notify_all()
                if self._come_to == self._all_came_to:  # else this process waits for the others, who set the pace
                    self._news.wait(_BEAT_SECONDS)

    def _stop_program(self, error: str) -> None:
        reason = error.partition("] ")[2].partition(". ")[0]  # without the place in gloo's code and its advice
        sys.stderr.write(
            f"{self._name} stops: another process of this run has ended or cannot be reached ({reason or error}). "
            "What is written is whole. See what the others said last, and run the same command again to go on.\n"
        )
        sys.stderr.flush()
        os._exit(1)


_heartbeat: _Heartbeat | None = None


def process_state() -> PartialState:
    """Accelerate's view of the processes of this run; joins the others on the first call.

    Without a GPU it is told so, since it otherwise takes several CPU processes for separate runs.

    Raises:
        ProcessError: the others did not all join in time; on a GPU the starter did not set LOCAL_RANK.
    """
    global _heartbeat
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")  # NCCL alone would not wait for processes that start late
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")  # LOCAL_RANK 3 may see its own GPU only, as cuda:0
    try:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        if state.num_processes > 1 and _heartbeat is None:
            _heartbeat = _Heartbeat(state)
    except RuntimeError as error:
        raise ProcessError(
            f"Process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} on {socket.gethostname()} could not "
            f"join the others at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
            f"{_PATIENCE.total_seconds() / 60:.0f} minutes ({error}). Check that all of them started and reach each "
            "other there (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use)."
        ) from error
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) not in (1, state.num_processes):
        raise ProcessError(
            f"Process {os.environ.get('RANK')} of {started} on {socket.gethostname()} would be a run of its own beside "
            "the others. Start it with LOCAL_RANK set too, its number on this machine, by which it finds its GPU."
        )
    return state


def leave_processes() -> None:
    """Part from the other processes at the end of a program, when all are there. Does nothing in a run of one."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.end()
        _heartbeat = None
        torch.distributed.destroy_process_group()


def hear_out_heartbeat(error: RuntimeError) -> None:
    """Call where an exchange may have failed: if another process is gone, the program ends here, with a message that
    says so. An error of the network is waited with until the heartbeat must know; any other keeps nobody for long."""
    if _heartbeat is not None:
        is_of_network = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
        _heartbeat.thread.join(2 * _SILENCE.total_seconds() if is_of_network else 10 * _BEAT_SECONDS)


def meet() -> None:
    """Wait until every process is here, however long it works before; if one is lost on the way, the program ends."""
    if process_state().num_processes > 1 and _heartbeat is not None:
        _heartbeat.meet()


def gather_all(items: list[Item]) -> list[Item]:
    """The items of every process, in the order of the processes, in every process, once all have come here."""
    meet()
    gathered: list[Item] = gather_object(items) if process_state().num_processes > 1 else items
    return gathered


def agree(facts: Mapping[str, Any]) -> None:
    """Make sure that every process runs the same program on the same `facts`: config, digests of inputs.

    Called before anything is written.

    Raises:
        ProcessError: one does not, in every process; it says which, where, and what differs.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    everyone = gather_all([(socket.gethostname(), flat({"code": code_digest(), **environment(), **facts}))])
    first_host, first = everyone[0]
    unlike = [
        f"process {index} on {host}: {listing(different, _MOST_DIFFERENCES, separator='; ')}"
        for index, (host, found) in enumerate(everyone)
        if (different := differences(found, first))
    ]
    if unlike:
        leave_processes()
        raise ProcessError(
            f"The processes of this run are not alike; nothing was written. Unlike process 0 on {first_host} (wanted) "
            f"are:\n{listing(unlike, 5)}\nStart all with the same program, config and input."
        )


def keep_freed_memory() -> None:
    """Keep what this process frees for what it allocates next, where the C library is glibc; elsewhere do nothing.

    Training and prediction on a CPU free and allocate the same large buffers again and again, and by default the system
    hands them out anew, page by page: tf_efficientnet_lite0 at 96 px trained 1.5 times as fast with this, in the same
    memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(option, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give what this process has freed back to the system, where the C library is glibc; elsewhere do nothing.

    Between the steps of an epoch and its evaluation, or two parts of a prediction, whose buffers are of other sizes:
    what the one has left is too cut up for the other to fit in.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def cpu_share() -> int:
    """How many CPU cores this process may use, when those of one machine share them evenly; at least 1."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory_share() -> int:
    """How many bytes of memory this process may still take, when those of one machine share it evenly."""
    of_machine = min(psutil.virtual_memory().available, cgroup_room())
    return int(min(of_machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _address_room()))


def _address_room() -> float:
    """Bytes below this process's own limit of addresses (`ulimit -v`); infinite where there is none."""
    if not hasattr(psutil, "RLIMIT_AS"):  # not Linux
        return math.inf
    process = psutil.Process()
    limit = process.rlimit(psutil.RLIMIT_AS)[0]
    return math.inf if limit == psutil.RLIM_INFINITY else max(0, limit - process.memory_info().vms)


def cgroup_room(root: Path = Path("/")) -> float:
    """Bytes below the tightest memory limit of the control groups that this process is in, those of a container or of a
    batch job; infinite where there is none. Cached pages of files count as free: they go when memory is needed.
    """
    room = math.inf
    for folder, is_v2 in control_groups("memory", root):
        limit, used = ("max", "current") if is_v2 else ("limit_in_bytes", "usage_in_bytes")
        if (folder / f"memory.{limit}").is_file():
            text = (folder / f"memory.{limit}").read_text().strip()
            if text != "max":
                room = min(room, int(text) - int((folder / f"memory.{used}").read_text()) + _cached(folder, is_v2))
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


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, copied while the host goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
