"""Stage `evaluate`. Reads a prediction table and annotations, returns scores over every labelled frame once."""

from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import AffectScores, ExpressionScores, Scores, score_predictions
from vnaw_pipeline.prediction.predict import read_predictions
from vnaw_pipeline.tasks import TASKS, ExpressionTask, Task, TaskName


@overload
def evaluate_predictions(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    predictions: str | Location | pd.DataFrame,
    task_name: ExpressionTask = "expr8",
    split: str = "validation",
    fold: int | None = None,
) -> ExpressionScores: ...


@overload
def evaluate_predictions(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    predictions: str | Location | pd.DataFrame,
    task_name: TaskName,
    split: str = "validation",
    fold: int | None = None,
) -> Scores: ...


def evaluate_predictions(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    predictions: str | Location | pd.DataFrame,
    task_name: TaskName = "expr8",
    split: str = "validation",
    fold: int | None = None,
) -> Scores:
    """Score a task's predictions against the annotations of a split; frames that are not annotated are left out.

    With `fold` the split is as that fold of the manifest has it.

    Raises:
        DataError: a labelled frame without a prediction, unusable annotations or predictions.
    """
    task = TASKS[task_name]
    videos = read_manifest(manifest)
    # With their official splits still, by which the labels of a task are found.
    videos = videos[fold_split(videos, fold).split == split]
    if videos.empty:
        raise DataError(f"The manifest has no videos in split '{split}'.")
    labels = read_labels(videos, annotations_dir, task)
    if not labels:
        raise DataError(f"The videos in split '{split}' have no annotations of task '{task.name}' to score against.")
    table = predictions if isinstance(predictions, pd.DataFrame) else read_predictions(predictions, task)
    rows_of = rows_by_video(table, {video_id: len(of_video) for video_id, of_video in labels.items()})
    predicted = np.concatenate([rows[task.prediction_columns].to_numpy() for rows in rows_of.values()])
    return score_predictions(task, np.concatenate(list(labels.values())), predicted)


def rows_by_video(table: pd.DataFrame, num_frames: dict[str, int]) -> dict[str, pd.DataFrame]:
    """The rows of a prediction table by video, in the order of `num_frames`, one for each frame in theirs.

    Raises:
        DataError: a video, or a frame of one, has no prediction, or more than one.
    """
    by_video = dict(iter(table.groupby("video_id", observed=True, sort=False)))
    rows_of = {}
    for video_id, expected in num_frames.items():
        rows = by_video.get(video_id, table[:0]).sort_values("frame_index")
        if rows.frame_index.tolist() != list(range(expected)):
            raise DataError(
                f"The predictions hold {len(rows)} rows for '{video_id}', which has {expected} frames; every frame "
                "needs exactly one. Predict (or combine) again with this manifest."
            )
        rows_of[video_id] = rows
    return rows_of


def format_scores(scores: Scores, task: Task, units: str = "labelled frames") -> str:
    """Scores as lines of text, in percent; `units` says what was scored."""
    each, values = ("CCC", scores.ccc) if isinstance(scores, AffectScores) else ("F1", scores.f1)
    lines = [f"{name:<12}{each:<3}{100 * value:6.2f}" for name, value in zip(task.outputs, values, strict=True)]
    lines.append(f"{task.metric_title:<15}{100 * scores.figures[task.metric]:6.2f}")
    if isinstance(scores, ExpressionScores):
        lines.append(f"{'accuracy':<15}{100 * scores.accuracy:6.2f}")
    lines[-1] += f"   ({scores.num_frames} {units})"
    return "\n".join(lines)


def scores_as_json(scores: Scores, task: Task) -> dict[str, Any]:
    """Scores as a JSON object, shares in [0, 1] and concordances in [-1, 1]."""
    each, values = ("ccc", scores.ccc) if isinstance(scores, AffectScores) else ("f1", scores.f1)
    found: dict[str, Any] = {
        task.metric: scores.figures[task.metric],
        each: dict(zip(task.outputs, values.tolist(), strict=True)),
        "num_frames": scores.num_frames,
    }
    if isinstance(scores, ExpressionScores):
        found |= {"accuracy": scores.accuracy, "confusion": scores.confusion.tolist()}
    return found
