"""How things are measured: two sides in turns, peak memory by the operating system in a process of its own."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


class Turns(NamedTuple):
    """Median seconds of either side, and the median of `first / second` over the turns."""

    first_s: float
    second_s: float
    ratio: float


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes, with what it leaves to a GPU to do."""
    started = time.perf_counter()
    work()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> Turns:
    """Time two calls in turns, A B A B ..., so that a machine that others use too favours neither."""
    return of_turns([(seconds(first), seconds(second)) for _ in range(repeats)])


def of_turns(pairs: list[tuple[float, float]]) -> Turns:
    """The medians of what was timed in turns."""
    first, second = zip(*pairs, strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    return Turns(statistics.median(first), statistics.median(second), ratio)


def peak_memory_of(work: Callable[..., object], *arguments: Any) -> int:
    """Bytes that a fresh process had resident at most while it called `work`, which pickle must find by its name."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_after, work, arguments).result()


def _peak_after(work: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    work(*arguments)
    return peak_memory()


def peak_memory() -> int:
    """Bytes that this process had resident at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss, in which Linux counts the process that this one was started from
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
