"""Everything that is wrong with a data set, at once, each problem with its file and line."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from vnaw_pipeline.annotations import count_rows, scan_annotation
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.layouts import (
    AnnotationFile,
    crop_extent,
    crop_set_of,
    find_annotations,
    find_crops,
    find_videos,
    pack_frame_count,
    recorded_frame_count,
    video_frame_count,
)
from vnaw_pipeline.manifests import row_problems, scan_manifest
from vnaw_pipeline.tasks import SPLIT_DIRS, SPLITS, Task
from vnaw_pipeline.template import read_template, template_task
from vnaw_pipeline.textlines import LineProblem, located

Severity = Literal["error", "warning"]


_USUAL_DIFFERENCE = 2
"""Frames by which annotations and decoded videos of Aff-Wild2 differ: -1 to 2."""


@dataclass(frozen=True)
class Problem:
    """One finding. An `error` makes a run fail or its scores wrong; a `warning` should be known."""

    severity: Severity
    path: Path
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {located(self.path, LineProblem(self.line, self.message))}"


@dataclass(frozen=True)
class _Row:
    """A manifest row and where it stands."""

    path: Path
    line: int
    video_id: str
    split: str
    num_frames: int
    crops: str
    annotation: str
    source_video: str

    def problem(self, severity: Severity, message: str) -> Problem:
        return Problem(severity, self.path, self.line, f"video {self.video_id}: {message}")


def check_manifest(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path | None,
    crops_root: Path | None,
    task: Task,
    videos_dir: Path | None = None,
    template: Path | None = None,
    further_tasks: Sequence[Task] = (),
) -> list[Problem]:
    """All problems of a manifest and of the files it names; an empty list if there are none.

    `further_tasks` are those beside `task` that the manifest was built for; their files are found as `read_labels`
    finds them.

    A length that differs by one or two frames, as in Aff-Wild2, is a warning, by more an error. It is compared with the
    videos where `videos_dir` is given, else with what packs and `vnaw crop` recorded, else with the highest image
    number.
    """
    if isinstance(manifest, Path):
        path = manifest
        frame, structure = scan_manifest(path)
    else:
        path = Path("manifest")
        frame = manifest.set_axis(range(2, len(manifest) + 2))
        texts = [dict(zip(frame.columns, map(str, values), strict=True)) for values in frame.itertuples(index=False)]
        structure = row_problems(texts, list(frame.index))
    problems = [Problem("error", path, line, message) for line, message in structure]
    rows = [
        _Row(path, int(line), *values)
        for line, *values in frame[
            ["video_id", "split", "num_frames", "crops", "annotation", "source_video"]
        ].itertuples(name=None)
    ]
    problems += _split_problems(rows, path, annotations_dir is not None)
    if annotations_dir is not None:
        problems += _annotation_problems(rows, annotations_dir, task)
        for further in further_tasks:
            problems += _further_problems(rows, annotations_dir, further)
        problems += _unlabelled_problems(rows, annotations_dir, further_tasks)
    if crops_root is not None:
        problems += _crop_problems(rows, crops_root, has_videos=videos_dir is not None)
    if videos_dir is not None:
        problems += _video_problems(rows, videos_dir)
    if template is not None:
        problems += _template_problems(rows, template, (task, *further_tasks))
    return problems


def _split_problems(rows: list[_Row], path: Path, has_annotations: bool) -> Iterator[Problem]:
    """A recording in two splits, names that differ only in case, splits without a video."""
    first_of_source: dict[str, _Row] = {}
    first_of_name: dict[str, _Row] = {}
    for row in rows:
        other = first_of_source.setdefault(row.source_video, row)
        if other.split != row.split:
            where = f"{row.split}, but {other.video_id} of the same recording is in {other.split} (line {other.line})"
            yield row.problem("error", f"is in {where}; a recording belongs to one split")
        namesake = first_of_name.setdefault(row.video_id.casefold(), row)
        if namesake.video_id != row.video_id:
            same = f"differs from {namesake.video_id} (line {namesake.line}) only in case"
            yield row.problem("warning", f"{same}; some file systems cannot hold both")
    for split in SPLITS if has_annotations else ():
        if not any(row.split == split for row in rows):
            yield Problem("warning", path, None, f"no video is in the split {split}")


def _annotation_problems(rows: list[_Row], annotations_dir: Path, task: Task) -> Iterator[Problem]:
    for row in rows:
        if not row.annotation:
            continue
        path = annotations_dir / row.annotation
        labels, found = scan_annotation(path, task)
        for line, message in found:
            yield Problem("error", path, line, message)
        num_rows = len(labels) if labels is not None else count_rows(path)
        if num_rows not in (0, row.num_frames):
            yield row.problem("error", f"num_frames is {row.num_frames}, but {path} has {num_rows} rows")
    try:
        files = find_annotations(annotations_dir, task)
    except DataError as error:
        yield Problem("error", annotations_dir, None, str(error))
        return
    used = {row.annotation for row in rows}
    yield from _unused_problems(rows, annotations_dir, [file for file in files if file.path not in used])


def _further_problems(rows: list[_Row], annotations_dir: Path, task: Task) -> Iterator[Problem]:
    """The files of a task beside the manifest's first. Frames beyond their length go without a label."""
    try:
        files = find_annotations(annotations_dir, task)
    except DataError as error:
        yield Problem("error", annotations_dir, None, str(error))
        return
    row_of = {(row.split, row.video_id): row for row in rows}
    for file in files:
        row = row_of.get((file.split, file.video_id))
        if row is not None:
            path = annotations_dir / file.path
            labels, found = scan_annotation(path, task)
            yield from (Problem("error", path, line, message) for line, message in found)
            num_rows = len(labels) if labels is not None else count_rows(path)
            yield from _length_problem(row, num_rows, f"{path} has {num_rows} rows")
    unused = [file for file in files if (file.split, file.video_id) not in row_of]
    yield from _unused_problems(rows, annotations_dir, unused)


def _unused_problems(rows: list[_Row], annotations_dir: Path, files: Sequence[AnnotationFile]) -> Iterator[Problem]:
    split_of = {row.video_id: row.split for row in rows}
    for file in files:
        message = f"no row of the manifest uses this {SPLIT_DIRS[file.split]} annotation"
        split = split_of.get(file.video_id, file.split)
        if split != file.split:
            message += f"; the video is in {split}"
        yield Problem("warning", annotations_dir / file.path, None, message)


def _unlabelled_problems(rows: list[_Row], annotations_dir: Path, further_tasks: Sequence[Task]) -> Iterator[Problem]:
    labelled = {(row.split, row.video_id) for row in rows if row.annotation}
    for task in further_tasks:
        with suppress(DataError):  # reported with the task's files
            labelled |= {(file.split, file.video_id) for file in find_annotations(annotations_dir, task)}
    for row in rows:
        if row.split in SPLIT_DIRS and (row.split, row.video_id) not in labelled:
            yield row.problem("error", f"is in {row.split} and has no annotation")


def _crop_problems(rows: list[_Row], crops_root: Path, *, has_videos: bool) -> Iterator[Problem]:
    try:
        found = find_crops(crops_root)
    except DataError as error:
        yield Problem("error", crops_root, None, str(error))
        return
    for row in rows:
        places = found.get(row.video_id, [])
        if not row.crops:
            yield row.problem("error", f"no crops below {crops_root}, neither a folder of images nor a pack")
            continue
        path = crops_root / row.crops
        if not path.exists():
            elsewhere = f"; there are crops at {', '.join(places)}" if places else ""
            yield row.problem("error", f"its crops folder {path} does not exist{elsewhere}")
            continue
        try:
            yield from _folder_problems(row, path, has_videos) if path.is_dir() else _pack_problems(row, path)
        except DataError as error:
            yield Problem("error", path, None, str(error))
        others = [place for place in places if place != row.crops and not _complete_one_another(place, row.crops)]
        if others:
            yield row.problem("warning", f"crops lie at {', '.join(others)} too; the manifest uses {row.crops}")


def _complete_one_another(first: str, second: str) -> bool:
    """Crops of one set in two of its folders, such as `cropped_aligned` and `cropped_aligned_new_50_vids`."""
    is_same_folder = first.rpartition("/")[0] == second.rpartition("/")[0]
    return crop_set_of(first) == crop_set_of(second) and not is_same_folder


def _pack_problems(row: _Row, pack: Path) -> Iterator[Problem]:
    num_frames = pack_frame_count(pack)
    yield from _length_problem(row, num_frames, f"its pack {pack} has {num_frames} frames")


def _folder_problems(row: _Row, folder: Path, has_videos: bool) -> Iterator[Problem]:
    """Odd names, and a length that images, their record, or, if nothing else is there, the last image contradict."""
    num_frames, odd_names = crop_extent(folder)
    if odd_names:
        shown = ", ".join(odd_names[:3]) + (", ..." if len(odd_names) > 3 else "")
        message = f"{len(odd_names)} file(s) not named like 00001.jpg are not used: {shown}"
        yield Problem("warning", folder, None, message)
    recorded = recorded_frame_count(folder)
    if num_frames == 0:
        yield row.problem("error", f"its crops folder {folder} holds no image of a frame")
    elif num_frames > row.num_frames:
        yield from _length_problem(row, num_frames, f"its crops in {folder} go on to frame {num_frames}")
    elif recorded is not None:
        yield from _length_problem(row, recorded, f"its crops in {folder} were made from {recorded} frames")
    elif not has_videos:
        missing = row.num_frames - num_frames
        last = f"the last {missing} frames" if missing > 1 else "the last frame"
        doubt = f"{last} may have no face; comparing with the videos (--videos) decides"
        yield from _length_problem(row, num_frames, f"its crops in {folder} end at frame {num_frames}: {doubt}")


def _video_problems(rows: list[_Row], videos_dir: Path) -> Iterator[Problem]:
    try:
        videos = find_videos(videos_dir)
    except DataError as error:
        yield Problem("error", videos_dir, None, str(error))
        return
    frames_of: dict[str, int | None] = {}
    for row in rows:
        video = videos.get(row.source_video)
        if video is None:
            yield row.problem("warning", f"no video {row.source_video} in {videos_dir}; its length is not compared")
            continue
        if row.source_video not in frames_of:
            try:
                frames_of[row.source_video] = video_frame_count(video)
            except DataError as error:
                frames_of[row.source_video] = None
                yield Problem("error", video, None, str(error))
        num_frames = frames_of[row.source_video]
        if num_frames is not None:
            yield from _length_problem(row, num_frames, f"its video {video} has {num_frames} frames")


def _template_problems(rows: list[_Row], template: Path, tasks: Sequence[Task]) -> Iterator[Problem]:
    try:
        frames_of = read_template(template, template_task(template, tasks)).frame_counts()
    except DataError as error:
        yield Problem("error", template, None, str(error))
        return
    test_rows = {row.video_id: row for row in rows if row.split == "test"}
    for video_id, num_frames in frames_of.items():
        row = test_rows.get(video_id)
        if row is None:
            yield Problem("error", template, None, f"asks for video {video_id}, which is no test row of the manifest")
        elif row.num_frames != num_frames:
            asked = f"the template {template} asks for frames up to {num_frames}"
            yield row.problem("error", f"num_frames is {row.num_frames}, but {asked}")
    for video_id, row in test_rows.items():
        if video_id not in frames_of:
            yield row.problem("warning", f"the template {template} does not ask for this video")


def _length_problem(row: _Row, num_frames: int, seen: str) -> Iterator[Problem]:
    difference = abs(row.num_frames - num_frames)
    if difference:
        defined_by = f"{row.num_frames} annotation rows" if row.annotation else f"num_frames {row.num_frames}"
        yield row.problem("error" if difference > _USUAL_DIFFERENCE else "warning", f"{defined_by}, but {seen}")
