"""The challenge's submission file: every line of its template answered, in its order, and nothing else written.

Lines are written as plain text: the expression header names nine columns over rows of two, which a table writer
would quote or pad.
"""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.annotations import image_name
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.provenance import atomic_path
from vnaw_pipeline.tasks import Task
from vnaw_pipeline.template import Template, read_template

_NUMBER = r"-?(0(\.\d+)?|1(\.0+)?)"
_POSSIBLE = {
    "classes": (re.compile(r"[0-7]"), "one of 0 to 7"),
    "affect": (re.compile(f"{_NUMBER},{_NUMBER}"), "two numbers from -1 to 1"),
    "units": (re.compile(r"[01](,[01]){11}"), "twelve 0 or 1"),
}
"""What may stand after an image."""


def write_submission(predictions: pd.DataFrame, template: Path, out: Path, task: Task) -> int:
    """Answer every line of a template; the number of lines written.

    An answer is the most probable class; or valence and arousal, clipped to [-1, 1], to four decimals; or which action
    units reach .5. `predictions` has `video_id`, `frame_index` and the task's columns; frames that the
    template does not ask for are left out. The file is read back and compared before it takes its name.

    Raises:
        DataError: a task without submission, an unusable template, a frame asked for that has no or several
            predictions or one that is no number; every such video is named, up to a limit.
    """
    if task.from_expr8 is not None:
        raise DataError(f"A submission of task {task.name} cannot be written; expr8, va and au can be submitted.")
    asked = read_template(template, task)
    answers = _answers(_asked_predictions(predictions, asked, task), task)
    images = _image_locations(asked.frames)
    lines = [asked.header, *(f"{image},{answer}" for image, answer in zip(images, answers, strict=True))]
    with atomic_path(out) as partial:
        partial.write_bytes(("\n".join(lines) + "\n").encode())
        return verify_submission(partial, asked, task)


def verify_submission(path: Path, asked: Template, task: Task) -> int:
    """Check that a submission answers a template line for line with what the task allows; the number of lines.

    Raises:
        DataError: the first line that differs, and what was expected there.
    """
    lines = path.read_bytes().decode().split("\n")
    if lines[0] != asked.header:
        raise DataError(f"{path}:1: the header is {lines[0]!r}; the template has {asked.header!r}.")
    if len(lines) != len(asked.frames) + 2 or lines[-1] != "":
        raise DataError(f"{path} has {len(lines) - 2} answers; the template asks for {len(asked.frames)}.")
    possible, expected = _POSSIBLE[task.kind]
    images = _image_locations(asked.frames)
    for number, (line, image) in enumerate(zip(lines[1:-1], images, strict=True), start=2):
        location, _, answer = line.partition(",")
        if location != image or not possible.fullmatch(answer):
            raise DataError(f"{path}:{number}: {line!r} does not answer {image} with {expected}.")
    return len(asked.frames)


def _answers(predicted: npt.NDArray[np.float64], task: Task) -> list[str]:
    """What stands after the image on each line, from the task's columns (lines, outputs)."""
    if task.kind == "classes":
        return [str(code) for code in predicted.argmax(axis=1).tolist()]
    if task.kind == "units":
        return [",".join(row) for row in np.where(predicted >= 0.5, "1", "0").tolist()]
    # Of four decimals, repr never makes an exponent; adding 0 turns -0.0 into 0.0.
    return [f"{valence!r},{arousal!r}" for valence, arousal in (predicted.clip(-1, 1).round(4) + 0.0).tolist()]


def _asked_predictions(predictions: pd.DataFrame, asked: Template, task: Task) -> npt.NDArray[np.float64]:
    """The task's columns per template line, (lines, outputs)."""
    columns = ["video_id", "frame_index", *task.prediction_columns]
    absent = [column for column in columns if column not in predictions]
    if absent:
        raise DataError(f"The predictions lack the column(s) {', '.join(absent)}; are they of task {task.name}?")
    key = ["video_id", "frame_index"]
    wanted = predictions[predictions["video_id"].isin(asked.frames["video_id"].unique())]
    repeated = wanted[wanted.duplicated(key)]
    if len(repeated):
        raise DataError(_by_video(repeated, "frames have more than one prediction"))
    joined = asked.frames.merge(wanted[columns], on=key, how="left", indicator=True)
    unanswered = joined[joined["_merge"] == "left_only"]
    if len(unanswered):
        raise DataError(_by_video(unanswered, "lines of the template have no prediction"))
    predicted: npt.NDArray[np.float64] = joined[task.prediction_columns].to_numpy(dtype=np.float64)
    undefined = joined.iloc[np.flatnonzero(~np.isfinite(predicted).all(axis=1))]
    if len(undefined):
        raise DataError(_by_video(undefined, "predictions hold a value that is not a number"))
    return predicted


def _image_locations(frames: pd.DataFrame) -> list[str]:
    """`video/00001.jpg` per line."""
    names = [image_name(frame_index) for frame_index in range(int(frames["frame_index"].max()) + 1)]
    pairs = zip(frames["video_id"].tolist(), frames["frame_index"].tolist(), strict=True)
    return [f"{video_id}/{names[frame_index]}" for video_id, frame_index in pairs]


def _by_video(frames: pd.DataFrame, what: str) -> str:
    """Count the frames and name them: a line per video with its images as ranges."""
    lines = [f"{len(frames)} {what}:"]
    for video_id, rows in frames.groupby("video_id", sort=False):
        lines.append(f"  {video_id}: {_image_ranges(np.sort(rows['frame_index'].unique()))}")
    return listing(lines)


def _image_ranges(frames: npt.NDArray[np.int64], limit: int = 8) -> str:
    """Ascending frames as '00003.jpg to 00007.jpg, 00009.jpg'; after `limit` ranges, how many are left."""
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1)
    shown = []
    for run in runs[:limit]:
        first, last = image_name(int(run[0])), image_name(int(run[-1]))
        shown.append(first if first == last else f"{first} to {last}")
    if len(runs) > limit:
        shown.append(f"and {len(runs) - limit} more ranges")
    return ", ".join(shown)
