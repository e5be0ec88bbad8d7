"""The table of videos: one row per video and person, with its split, length, and where crops and annotation lie.

Paths are relative to roots given at run time, so that a manifest moves between machines.
"""

import csv
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vnaw_pipeline.annotations import (
    Labels,
    count_rows,
    is_of_another_task,
    labelled,
    read_annotation,
    scan_annotation,
)
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.folds import assign_folds
from vnaw_pipeline.layouts import (
    AnnotationFile,
    choose_crops,
    crop_extent,
    find_annotations,
    find_crops,
    find_videos,
    pack_frame_count,
    read_video_list,
    recorded_frame_count,
    source_video_of,
    video_frame_count,
)
from vnaw_pipeline.provenance import write_text
from vnaw_pipeline.tasks import SPLITS, Task
from vnaw_pipeline.template import read_template, template_task
from vnaw_pipeline.textlines import LineProblem, located, read_lines, shortened

COLUMNS = ("video_id", "split", "num_frames", "crops", "annotation", "fold", "source_video")

_LOG = logging.getLogger(__name__)


def build_manifest(
    annotations_dir: Path | None,
    crops_root: Path | None,
    task: Task,
    test_list: Path | None = None,
    template: Path | None = None,
    videos_dir: Path | None = None,
    folds: int = 0,
    seed: int = 0,
    further_tasks: Sequence[Task] = (),
) -> pd.DataFrame:
    """Build the table of `COLUMNS` from a challenge's folders, train, validation, then test in its list's order.

    The test videos are those of `test_list`, else of the submission `template`; with neither and without
    annotations, every video that has crops is one. A length is that of the annotation, else of the template, else of
    the video, else what the crops tell. Faulty files do not stop it; `check_manifest` names them.
    `crops` is '' for a video without crops, and for all of them without `crops_root`, since embeddings of another
    program need none; `num_frames` is 0 where nothing tells it.

    With `further_tasks` the rows are the videos that any of the tasks has annotations for; `annotation` is the file of
    `task`, '' where it has none, and the template may be that of any. A recording that is in the training set of one
    task and in the validation or test set of another is in the latter: what it has been annotated with in training is
    used neither for learning nor for scores. How many files that concerns is logged as a warning.

    Raises:
        DataError: a folder, list or template is missing or cannot be used; folds that cannot be made.
    """
    tasks = (task, *further_tasks)
    of_tasks = [find_annotations(annotations_dir, one) for one in tasks] if annotations_dir is not None else [[]]
    template_frames = {}
    if template is not None:
        template_frames = read_template(template, template_task(template, tasks)).frame_counts()
    found = find_crops(crops_root) if crops_root is not None else {}
    test_ids = read_video_list(test_list) if test_list is not None else list(template_frames)
    files = _one_row_a_video(of_tasks, test_ids) if further_tasks else [*of_tasks[0], *_test_rows(test_ids)]
    if annotations_dir is None and not files:
        if crops_root is None:
            raise DataError("There is nothing to make a manifest of. Give annotations, crops, test list or template.")
        files = _test_rows(found)
    crops = choose_crops(found, [file.video_id for file in files])
    videos = find_videos(videos_dir) if videos_dir is not None else {}
    rows = []
    annotated = {(file.split, file.video_id): file.path for of_task in reversed(of_tasks) for file in of_task}
    for file in files:
        source_video = source_video_of(file.video_id)
        crops_path = crops.get(file.video_id, "")
        defining = annotated.get((file.split, file.video_id), "")
        num_frames = (
            (count_rows(annotations_dir / defining) if annotations_dir is not None and defining else 0)
            or template_frames.get(file.video_id)
            or _length_or_zero(video_frame_count, videos.get(source_video))
            or _length_or_zero(crops_frame_count, crops_root / crops_path if crops_root and crops_path else None)
        )
        rows.append((file.video_id, file.split, num_frames, crops_path, file.path, "", source_video))
    manifest = pd.DataFrame(rows, columns=list(COLUMNS))
    if not folds:
        return manifest
    if annotations_dir is None:
        raise DataError("Folds are made of annotated videos. Give the annotations, or no folds.")
    return _with_folds(manifest, annotations_dir, task, folds, seed)


def crops_frame_count(path: Path) -> int:
    """Frames of the video that a pack or folder was made from; where nothing recorded them, the highest image number.

    Raises:
        DataError: a pack that cannot be read.
    """
    if path.is_dir():
        return recorded_frame_count(path) or crop_extent(path).num_frames
    return pack_frame_count(path)


def write_manifest(manifest: pd.DataFrame, path: Path) -> None:
    """Write the CSV whole, with plain newlines."""
    buffer = io.StringIO()
    manifest.to_csv(buffer, columns=list(COLUMNS), index=False, lineterminator="\n")
    write_text(path, buffer.getvalue())


def read_manifest(manifest: Path | pd.DataFrame) -> pd.DataFrame:
    """Read and validate a manifest; one that is open already is given back. `num_frames` is int64, every other column
    text, missing as ''.

    Raises:
        DataError: every problem in it at once, one a line, as `path:line: problem`.
    """
    if isinstance(manifest, pd.DataFrame):
        return manifest
    videos, problems = scan_manifest(manifest)
    if problems:
        raise DataError(listing([located(manifest, problem) for problem in problems]))
    return videos.reset_index(drop=True)


def scan_manifest(path: Path) -> tuple[pd.DataFrame, list[LineProblem]]:
    """Read a manifest without raising: the rows that can be used, indexed by their line, and every problem."""
    lines, problems = read_lines(path)
    header = [name.strip() for name in lines[0].split(",")] if lines else list(COLUMNS)
    if sorted(header) != sorted(COLUMNS):
        expected = ",".join(COLUMNS)
        problems.append(LineProblem(1, f"the header is {shortened(lines[0], 100)}; expected {expected!r}"))
        return _frame([], []), problems
    rows: list[dict[str, str]] = []
    numbers: list[int] = []
    reader = csv.reader(lines[1:])
    try:
        for fields in reader:
            if len(fields) == len(header):
                rows.append(dict(zip(header, (field.strip() for field in fields), strict=True)))
                numbers.append(reader.line_num + 1)
            elif fields:
                message = f"{len(fields)} columns; expected {len(header)}"
                problems.append(LineProblem(reader.line_num + 1, message))
    except csv.Error as error:
        problems.append(LineProblem(reader.line_num + 1, f"not readable as CSV from here on: {error}"))
    if lines and not rows and not problems:
        problems.append(LineProblem(None, "there is a header but no video"))
    problems += row_problems(rows, numbers)
    usable = [index for index, row in enumerate(rows) if re.fullmatch(r"[0-9]{1,9}", row["num_frames"])]
    manifest = _frame([rows[index] for index in usable], [numbers[index] for index in usable])
    return manifest, sorted(problems, key=lambda problem: problem.line or 0)


def row_problems(rows: Sequence[Mapping[str, str]], lines: Sequence[int]) -> list[LineProblem]:
    """What is wrong with the values of manifest rows, given as text, and which ids come twice; `lines` places them."""
    problems = []
    first_line: dict[str, int] = {}
    for row, line in zip(rows, lines, strict=True):
        problems += [LineProblem(line, message) for message in _value_problems(row)]
        first = first_line.setdefault(row["video_id"], line)
        if first != line:
            message = f"video {row['video_id']} is already in line {first}; one row a video"
            problems.append(LineProblem(line, message))
    return problems


def read_labels(manifest: pd.DataFrame, annotations_dir: Path, task: Task) -> dict[str, Labels]:
    """A task's labels by video, each of its row's `num_frames`; rows without are left out.

    They are in the files of the column `annotation`, whose length must be the row's. If those are another task's, they
    are the files that the task has below `annotations_dir` for a row's `video_id` in the row's split; of these, rows
    beyond the last frame are left out, and frames beyond the last row are not labelled.

    Raises:
        DataError: every unreadable annotation and every one of another length, at once.
    """
    rows = manifest[manifest["annotation"] != ""]
    if len(rows) == 0 or is_of_another_task(annotations_dir / rows["annotation"].iloc[0], task):
        return _labels_by_name(manifest, annotations_dir, task)
    labels: dict[str, Labels] = {}
    problems = []
    for video_id, num_frames, annotation in zip(rows["video_id"], rows["num_frames"], rows["annotation"], strict=True):
        path = annotations_dir / annotation
        try:
            labels[video_id] = read_annotation(path, task)
        except DataError as error:
            problems.append(str(error))
            continue
        if len(labels[video_id]) != num_frames:
            found = len(labels[video_id])
            problems.append(f"{path}: {found} rows; the manifest says {num_frames} frames. Build the manifest again.")
    if problems:
        raise DataError(listing(problems))
    return labels


def _test_rows(video_ids: Iterable[str]) -> list[AnnotationFile]:
    return [AnnotationFile("test", video_id, "") for video_id in video_ids]


def _one_row_a_video(of_tasks: Sequence[Sequence[AnnotationFile]], test_ids: Sequence[str]) -> list[AnnotationFile]:
    """The videos of several tasks, each in the last of `SPLITS` that any task has its recording in, with the file
    that the first task has for it in this split, or ''."""
    files = [
        *_test_rows(test_ids),
        *sorted((file for of_task in of_tasks for file in of_task), key=lambda file: file.video_id),
    ]
    split_of: dict[str, str] = {}
    for file in files:
        source = source_video_of(file.video_id)
        split_of[source] = max(split_of.get(source, SPLITS[0]), file.split, key=SPLITS.index)
    of_first = {(file.split, file.video_id): file.path for file in of_tasks[0]}
    rows = {}
    unused = 0
    for file in files:
        if file.split == split_of[source_video_of(file.video_id)]:
            rows[file.video_id] = file._replace(path=of_first.get((file.split, file.video_id), ""))
        else:
            unused += 1
    if unused:
        _LOG.warning(
            "%d annotation files are not used: another task has their recordings in validation or test.", unused
        )
    return sorted(rows.values(), key=lambda row: SPLITS.index(row.split))


def _labels_by_name(manifest: pd.DataFrame, annotations_dir: Path, task: Task) -> dict[str, Labels]:
    num_frames = dict(
        zip(zip(manifest["split"], manifest["video_id"], strict=True), manifest["num_frames"], strict=True)
    )
    labels: dict[str, Labels] = {}
    problems = []
    for split, video_id, path in find_annotations(annotations_dir, task):
        if (split, video_id) in num_frames:
            try:
                found = read_annotation(annotations_dir / path, task)
            except DataError as error:
                problems.append(str(error))
                continue
            shape = (num_frames[split, video_id], *task.label_shape)
            labels[video_id] = np.full(shape, task.unlabelled, dtype=found.dtype)
            labels[video_id][: len(found)] = found[: shape[0]]
    if problems:
        raise DataError(listing(problems))
    return labels


def _length_or_zero(count: Callable[[Path], int], path: Path | None) -> int:
    try:
        return count(path) if path is not None else 0
    except DataError:
        return 0  # the check names the file


def _with_folds(manifest: pd.DataFrame, annotations_dir: Path, task: Task, folds: int, seed: int) -> pd.DataFrame:
    if task.kind != "classes":
        raise DataError(f"Folds are stratified by expression; task {task.name} has none. Build without folds.")
    rows = manifest[manifest["split"] != "test"]
    class_frames = np.zeros((len(rows), len(task.outputs)), dtype=np.int64)
    for index, annotation in enumerate(rows["annotation"]):
        labels, _ = scan_annotation(annotations_dir / annotation, task) if annotation else (None, [])
        if labels is not None:
            class_frames[index] = np.bincount(labels[labelled(labels)], minlength=len(task.outputs))
    fold = pd.Series(assign_folds(rows["source_video"].tolist(), class_frames, folds, seed), index=rows.index)
    return manifest.assign(fold=fold.reindex(manifest.index, fill_value=""))


def _frame(rows: list[dict[str, str]], lines: list[int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS), index=pd.Index(lines, dtype="int64")).astype(
        {"num_frames": "int64"}
    )


def _value_problems(row: Mapping[str, str]) -> list[str]:
    problems = []
    video_id = row["video_id"]
    if not video_id or video_id.startswith(".") or re.search(r"[/\\]", video_id):
        problems.append(f"video_id {video_id!r} is not a file name")
    if row["split"] not in SPLITS:
        problems.append(f"split {row['split']!r} is not one of {', '.join(SPLITS)}")
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", row["num_frames"]):
        problems.append(f"num_frames {row['num_frames']!r} is not a whole number above 0")
    for column in ("crops", "annotation"):
        if row[column].startswith("/") or re.match(r"[A-Za-z]:", row[column]) or ".." in row[column].split("/"):
            problems.append(f"{column} {row[column]!r} must be a path below its root, with forward slashes")
    if not re.fullmatch(r"([0-9]+( [0-9]+)*)?", row["fold"]):
        problems.append(f"fold {row['fold']!r} is not empty or fold numbers separated by spaces")
    if not row["source_video"]:
        problems.append(f"video {video_id} has no source_video")
    return problems
