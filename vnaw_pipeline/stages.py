"""What every stage shares: a progress bar, `status.csv`, and the last line that says how it went."""

import csv
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vnaw_pipeline.locations import Location
from vnaw_pipeline.provenance import write_text


def usable_cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use, at least 1: those it may run on, and of them no more than the time that its
    control groups, those of a container or of a batch job, have (a part of a core counts as one)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min([cores, *_cpu_quotas(root)]))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group of this process has, where it is limited."""
    for folder, is_v2 in control_groups("cpu", root):
        names = ("cpu.max",) if is_v2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        if (folder / names[0]).is_file():
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, from the innermost outwards, and whether they are of
    version 2; none where the system has no such groups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers == "" or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            folder = top / group.strip("/")
            for place in (folder, *folder.parents):
                if place.is_relative_to(top):
                    yield place, controllers == ""


@dataclass(frozen=True)
class Failure:
    """One thing a stage could not do: which video (or image, or face), which frame (None: all of it), and why."""

    video_id: str
    frame_index: int | None
    reason: str


@dataclass
class StageReport:
    """Outcome of a stage: counts of its units (videos, chunks, epochs) and every failure.

    `units` names what is counted, in the plural; `frames` is how many frames were worked on in `seconds`.
    """

    stage: str
    units: str = "videos"
    done: int = 0
    skipped: int = 0
    frames: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status_path: Location | None = None

    @property
    def ok(self) -> bool:
        """True if nothing that was asked for failed."""
        return not self.failures

    def summary(self) -> str:
        """The stage's last line: done, skipped, failed, rate, time."""
        units = self.units.removesuffix("s") if self.done == 1 else self.units
        parts = [f"{self.stage}: {self.done} {units} done", f"{self.skipped} skipped"]
        failed = f"{len({failure.video_id for failure in self.failures})} with failures"
        if self.failures and self.status_path is not None:
            failed += f" (see {self.status_path})"
        parts.append(failed)
        if self.frames and self.seconds > 0:
            parts.append(f"{self.frames} frames at {rate_text(self.frames / self.seconds)} frames/s")
        minutes, seconds = divmod(self.seconds, 60)
        parts.append(f"{minutes:.0f} min {seconds:02.0f} s")
        return ", ".join(parts)

    def write_status(self, path: Location) -> None:
        """Write the failures as `status.csv` (video_id, frame_index, reason); with none, an empty table."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["video_id", "frame_index", "reason"])
        for failure in self.failures:
            frame = "" if failure.frame_index is None else failure.frame_index
            writer.writerow([failure.video_id, frame, failure.reason])
        write_text(path, buffer.getvalue())
        self.status_path = path


def rate_text(rate: float) -> str:
    """A rate as it is said: whole from 10 on, else with two digits."""
    return f"{rate:,.0f}" if rate >= 9.95 else f"{rate:.2g}"


class _RateColumn(ProgressColumn):
    """Units per second since the bar started, in the bar's own unit (`fields['unit']`)."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if rate is None else f"{rate_text(rate)} {unit}/s", style="progress.data.speed")


class Bar:
    """One stage's progress; `advance` may be called from any thread."""

    def __init__(self, progress: Progress | None, label: str, total: int, unit: str) -> None:
        self._progress = progress
        self._label, self._total, self._unit = label, total, unit
        self._count = 0
        self._started = self._spoken = time.monotonic()
        self._task = progress.add_task(label, total=total, unit=unit) if progress is not None else None

    def advance(self, count: int) -> None:
        """Move on by `count` units. Without a terminal, a line a minute is written instead of a bar."""
        self._count += count
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)
        elif time.monotonic() - self._spoken >= 60:
            self._spoken = time.monotonic()
            rate = self._count / (self._spoken - self._started)
            sys.stderr.write(
                f"{self._label}: {self._count}/{self._total} {self._unit}, {rate_text(rate)} {self._unit}/s\n"
            )


@contextmanager
def progress_bar(label: str, total: int, unit: str = "frames", shown: bool = True) -> Iterator[Bar]:
    """Show one bar with rate and time left on standard error.

    Not a terminal: no bar, a line a minute. `shown=False` (all but one of several processes): silent.
    """
    console = Console(stderr=True)
    if not shown:
        yield Bar(Progress(disable=True), label, total, unit)
        return
    if not console.is_terminal:
        yield Bar(None, label, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, label, total, unit)
