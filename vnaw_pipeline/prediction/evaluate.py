"""Stage `evaluate`. Reads a prediction table and annotations, returns scores over every labelled frame once."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.errors import DataError
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import ExpressionScores, expression_scores
from vnaw_pipeline.prediction.predict import read_predictions
from vnaw_pipeline.tasks import TASKS, Task, TaskName


def evaluate_predictions(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    predictions: Path | pd.DataFrame,
    task_name: TaskName = "expr8",
    split: str = "validation",
) -> ExpressionScores:
    """Score predictions against the annotations of a split; frames that are not annotated are left out.

    Raises:
        DataError: a labelled frame without a prediction, unusable annotations or predictions.
    """
    task = TASKS[task_name]
    videos = read_manifest(manifest) if isinstance(manifest, Path) else manifest
    videos = videos[videos.split == split]
    if videos.empty:
        raise DataError(f"The manifest has no videos in split '{split}'.")
    if (videos.annotation == "").all():
        raise DataError(f"The videos in split '{split}' have no annotations to score against.")
    table = read_predictions(predictions, task) if isinstance(predictions, Path) else predictions
    labels = read_labels(videos, annotations_dir, task)
    predicted = predicted_classes(table, {video_id: len(of_video) for video_id, of_video in labels.items()}, task)
    return expression_scores(
        np.concatenate([labels[video_id] for video_id in labels]).astype(np.int64),
        np.concatenate([predicted[video_id] for video_id in labels]),
        len(task.outputs),
    )


def predicted_classes(table: pd.DataFrame, num_frames: dict[str, int], task: Task) -> dict[str, npt.NDArray[np.int64]]:
    """The most probable class of every frame, by video, int64 (T,).

    Raises:
        DataError: a video, or a frame of one, has no prediction, or more than one.
    """
    by_video = dict(iter(table.groupby("video_id", observed=True, sort=False)))
    classes = {}
    for video_id, expected in num_frames.items():
        rows = by_video.get(video_id)
        found = [] if rows is None else rows.frame_index.tolist()
        if rows is None or sorted(found) != list(range(expected)):
            raise DataError(
                f"The predictions hold {len(found)} rows for '{video_id}', which has {expected} frames; every frame "
                "needs exactly one. Run `vnaw predict` with this manifest."
            )
        ordered = rows.sort_values("frame_index")
        classes[video_id] = ordered[task.probability_columns].to_numpy().argmax(axis=1).astype(np.int64)
    return classes


def format_scores(scores: ExpressionScores, task: Task, units: str = "labelled frames") -> str:
    """Scores as lines of text, in percent; `units` says what was scored."""
    lines = [f"{name:<12}F1 {100 * f1:6.2f}" for name, f1 in zip(task.outputs, scores.f1, strict=True)]
    lines.append(f"{'macro-F1':<15}{100 * scores.macro_f1:6.2f}")
    lines.append(f"{'accuracy':<15}{100 * scores.accuracy:6.2f}   ({scores.num_frames} {units})")
    return "\n".join(lines)


def scores_as_json(scores: ExpressionScores, task: Task) -> dict[str, Any]:
    """Scores as a JSON object, shares in [0, 1]."""
    return {
        "macro_f1": scores.macro_f1,
        "accuracy": scores.accuracy,
        "f1": dict(zip(task.outputs, scores.f1.tolist(), strict=True)),
        "confusion": scores.confusion.tolist(),
        "num_frames": scores.num_frames,
    }
