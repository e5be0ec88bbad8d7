"""A challenge's submission template: which frames of which test videos must be answered, and in which order."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from vnaw_pipeline.annotations import frame_index_of
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.tasks import TASKS, Task
from vnaw_pipeline.textlines import LineProblem, located, read_lines, shortened

_LOCATION = re.compile(r"([^/,]+)/([0-9]{5,}\.jpg)((?:,[^,]*)*)")


class Template(NamedTuple):
    """The header as the file has it, and one row (`video_id`, `frame_index`) per line, in the file's order."""

    header: str
    frames: pd.DataFrame

    def frame_counts(self) -> dict[str, int]:
        """Length of each video in frames, in the template's order of videos: its highest frame and those before."""
        highest = self.frames.groupby("video_id", sort=False)["frame_index"].max()
        return {str(video_id): int(frame_index) + 1 for video_id, frame_index in highest.items()}


def template_task(path: Path, tasks: Sequence[Task]) -> Task:
    """Which of the tasks a template is of, by its header.

    Raises:
        DataError: it is of another task, or no template.
    """
    lines, problems = read_lines(path)
    header = lines[0] if lines else ""
    for task in tasks:
        if not _header_problems(header, [task]):
            return task
    problems = _header_problems(header, tasks) if lines else problems
    raise DataError(listing([located(path, problem) for problem in problems]))


def read_template(path: Path, task: Task) -> Template:
    """Read a template; the example answers in it are ignored.

    Raises:
        DataError: a template of another task, a malformed or repeated line, bytes that are not UTF-8; all at once.
    """
    lines, problems = read_lines(path)
    if not lines:
        raise DataError(listing([located(path, problem) for problem in problems]))
    problems += _header_problems(lines[0], [task])
    if not problems and len(lines) == 1:
        problems.append(LineProblem(None, "there is a header but no line to answer"))
    if problems:
        raise DataError(listing([located(path, problem) for problem in problems]))
    frames, problems = _parse(lines[1:], task)
    if problems:
        raise DataError(listing([located(path, problem) for problem in problems]))
    return Template(lines[0], frames)


def _header_problems(header: str, tasks: Sequence[Task]) -> list[LineProblem]:
    names = ",".join(name.strip() for name in header.split(","))
    if any(names == task.template_header for task in tasks):
        return []
    for other in TASKS.values():
        if names == other.template_header:
            expected = " or ".join(task.name for task in tasks)
            return [LineProblem(1, f"this is the template of task {other.name}; expected that of {expected}")]
    expected = " or ".join(repr(task.template_header) for task in tasks)
    return [LineProblem(1, f"the header is {shortened(header)}; expected {expected}")]


def _parse(lines: list[str], task: Task) -> tuple[pd.DataFrame, list[LineProblem]]:
    fields = task.num_fields
    videos: list[str] = []
    frames: list[int] = []
    problems: list[LineProblem] = []
    frame_of_name: dict[str, int] = {}  # a million lines share some ten thousand names
    for number, line in enumerate(lines, start=2):
        match = _LOCATION.fullmatch(line.rstrip())
        if match is None or match[3].count(",") != fields:
            expected = f"<video>/00001.jpg and {fields} value(s), separated by commas"
            problems.append(LineProblem(number, f"{shortened(line)} is not of the form {expected}"))
            continue
        video, name = match[1], match[2]
        if name not in frame_of_name:
            try:
                frame_of_name[name] = frame_index_of(name)
            except DataError as error:
                problems.append(LineProblem(number, str(error)))
                continue
        videos.append(video)
        frames.append(frame_of_name[name])
    table = pd.DataFrame({"video_id": pd.Series(videos, dtype=object), "frame_index": pd.Series(frames, dtype="int64")})
    if not problems:
        repeated = table.index[table.duplicated()]
        problems = [LineProblem(int(row) + 2, f"{shortened(lines[row])} repeats an earlier line") for row in repeated]
    return table, problems
