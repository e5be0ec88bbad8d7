"""The challenge's annotation files <-> arrays: one text file per video and task, a header and one row per frame.

The only module that knows that the challenge counts frames from 1: row k after the header belongs to image
`%05d.jpg` % k. Everywhere else `frame_index` = k - 1.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.provenance import write_text
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS, Task
from vnaw_pipeline.textlines import LineProblem, located, read_lines, shortened

Labels = npt.NDArray[Any]
"""(T,) int64 classes, IGNORE_LABEL where not annotated; or (T, 2) float32 valence and arousal, NaN where not
annotated; or (T, 12) int8 action units, -1 where not annotated."""

_IMAGE_NAME = re.compile(r"[0-9]{5,}\.jpg")


def image_name(frame_index: int) -> str:
    """File name of a frame's crop: frame 0 is `00001.jpg`; frame 99999 is `100000.jpg`."""
    if frame_index < 0:
        raise ValueError(f"frame_index must not be negative, got {frame_index}")
    return f"{frame_index + 1:05d}.jpg"


def frame_index_of(name: str) -> int:
    """The frame of a crop's file name, the inverse of `image_name`.

    Raises:
        DataError: any other name, such as `1.jpg`, `00000.jpg` or `00001.png`.
    """
    if _IMAGE_NAME.fullmatch(name):
        number = int(name.removesuffix(".jpg"))
        if number > 0 and image_name(number - 1) == name:
            return number - 1
    raise DataError(f"{name!r} is not the name of a frame's image; expected 00001.jpg, 00002.jpg and so on.")


def read_annotation(path: Path, task: Task) -> Labels:
    """Read one annotation file as `Labels` in the task's label space.

    A frame without valence or without arousal (-5 in either) has neither. Action units are kept one by one;
    `labelled` says which frames have any.

    Raises:
        DataError: every problem in the file, one a line, as `path:line: problem`.
    """
    labels, problems = scan_annotation(path, task)
    if labels is None:
        raise DataError(listing([located(path, problem) for problem in problems]))
    return labels


def scan_annotation(path: Path, task: Task) -> tuple[Labels | None, list[LineProblem]]:
    """Read one annotation file without raising: its labels, or None and everything that is wrong with it."""
    lines, problems = read_lines(path)
    if not lines:
        return None, problems
    foreign = _header_problem(lines[0], task)
    if foreign is not None:
        problems.append(LineProblem(1, foreign))
        if _task_of_header(lines[0]) is not None:
            return None, problems
    if len(lines) == 1 and not problems:
        problems.append(LineProblem(None, "there is a header but no row; expected one row a frame"))
    values = _parse_rows(lines[1:], task.num_fields, _number(task))
    reported = {problem.line for problem in problems}
    for row in np.flatnonzero(~_allowed(values, task).all(axis=1)):
        line = int(row) + 2
        if line not in reported:
            problems.append(LineProblem(line, _row_problem(lines[line - 1], task)))
    if problems:
        return None, sorted(problems, key=lambda problem: problem.line or 0)
    return _to_labels(values, task), []


def is_of_another_task(path: Path, task: Task) -> bool:
    """Whether a file has the header of a task with other labels; False where that cannot be told."""
    lines, _ = read_lines(path)
    found = _task_of_header(lines[0]) if lines else None
    return found is not None and found.header != task.header


def count_rows(path: Path) -> int:
    """Number of frames an annotation file has a row for, whatever the rows hold; 0 if it cannot be read."""
    return max(len(read_lines(path)[0]) - 1, 0)


def write_annotation(path: Path, labels: Labels, task: Task) -> None:
    """Write labels as the challenge does, the inverse of `read_annotation`; the file is whole or not there.

    Raises:
        DataError: a derived label space (coarse5, negative4), which has no files; labels of another shape or range.
    """
    if task.from_expr8 is not None:
        raise DataError(f"Task {task.name} is derived from expr8 and has no annotation files; write expr8 labels.")
    columns = task.num_fields
    values = labels[:, None] if labels.ndim == 1 else labels
    if task.kind == "affect":
        values = np.where(np.isnan(values), np.float32(task.not_annotated), values.astype(np.float32))
    if not len(values) or values.shape[1] != columns or not _allowed(values, task).all():
        raise DataError(f"{path}: labels of shape {labels.shape} are not rows of {columns} {_expected(task)}.")
    # numpy prints a float32 with the fewest digits that read back as the same float32.
    rows = (",".join(row) for row in values.astype(str).tolist())
    write_text(path, "\n".join((_header(task), *rows)) + "\n")


def labelled(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which frames are annotated, (T,): affect in both dimensions, action units for any of them, as they are scored."""
    annotated: npt.NDArray[np.bool_] = ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORE_LABEL
    if annotated.ndim == 2:
        annotated = np.asarray(annotated.all(axis=1) if labels.dtype.kind == "f" else annotated.any(axis=1))
    return annotated


def _header(task: Task) -> str:
    return ",".join(task.header)


def _number(task: Task) -> type[int] | type[float]:
    return float if task.kind == "affect" else int


def _task_of_header(line: str) -> Task | None:
    names = tuple(name.strip() for name in line.split(","))
    return next((task for task in TASKS.values() if task.header == names), None)


def _header_problem(line: str, task: Task) -> str | None:
    found = _task_of_header(line)
    if found is not None:
        is_same = found.header == task.header
        return None if is_same else f"this is an annotation file of task {found.name}; expected {_header(task)!r}"
    if _is_row(line):
        return f"the header is missing: the first line is the row {line!r}; expected {_header(task)!r}"
    return f"the header is {shortened(line)}; expected {_header(task)!r}"


def _is_row(line: str) -> bool:
    try:
        [float(value) for value in line.split(",")]
    except ValueError:
        return False
    return True


def _parse_rows(rows: Sequence[str], columns: int, number: type[int] | type[float]) -> npt.NDArray[np.float64]:
    """Numbers of all rows, (T, columns); a row that does not hold that many numbers is all NaN."""
    if all(row.count(",") == columns - 1 for row in rows):
        try:
            values = list(map(number, ",".join(rows).split(",")))
            return np.array(values, dtype=np.float64).reshape(len(rows), columns)
        except (ValueError, OverflowError):
            pass  # at least one row is bad; find out which
    parsed = np.full((len(rows), columns), np.nan)
    for index, row in enumerate(rows):
        fields = row.split(",")
        if len(fields) == columns:
            try:
                parsed[index] = [number(field) for field in fields]
            except (ValueError, OverflowError):
                continue
    return parsed


def _allowed(values: npt.NDArray[Any], task: Task) -> npt.NDArray[np.bool_]:
    """Which numbers may stand in a file of this task, the code for 'not annotated' included."""
    if task.kind == "affect":
        return np.asarray((np.abs(values) <= 1) | (values == task.not_annotated))
    highest = len(task.header) - 1 if task.kind == "classes" else 1
    return np.isin(values, [task.not_annotated, *range(highest + 1)])


def _expected(task: Task) -> str:
    if task.kind == "affect":
        return f"numbers from -1 to 1, or {task.not_annotated} for not annotated"
    highest = len(task.header) - 1 if task.kind == "classes" else 1
    return f"whole numbers from 0 to {highest}, or {task.not_annotated} for not annotated"


def _row_problem(line: str, task: Task) -> str:
    columns, found = task.num_fields, line.count(",") + 1
    if not line.strip():
        return "the line is blank; expected a row for this frame"
    if found != columns:
        return f"{found} columns in {shortened(line)}; expected {columns}"
    fields = line.split(",")
    allowed = _allowed(_parse_rows(fields, 1, _number(task)), task)[:, 0]
    bad = [field for field, is_allowed in zip(fields, allowed, strict=True) if not is_allowed]
    return f"bad value {', '.join(shortened(field) for field in bad)}; expected {_expected(task)}"


def _to_labels(values: npt.NDArray[np.float64], task: Task) -> Labels:
    if task.kind == "affect":
        values[(values == task.not_annotated).any(axis=1)] = np.nan
        return values.astype(np.float32)
    if task.kind == "units":
        return values.astype(np.int8)
    labels = values[:, 0].astype(np.int64)
    if task.from_expr8 is None:
        return labels
    # The last entry answers for label -1: numpy counts negative indices from the end.
    return np.array([*task.from_expr8, IGNORE_LABEL], dtype=np.int64)[labels]
