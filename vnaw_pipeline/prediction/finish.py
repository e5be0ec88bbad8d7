"""From what the model says to what the pipeline answers: gaps filled, smoothed, then the decision shifted.

The decision stays in the probabilities (arg max of classes, .5 of units), so that scores, submission and time line
read one table and cannot differ. `T` frames of one video, `K` columns.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.config import PredictConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.prediction.bias import apply_bias
from vnaw_pipeline.prediction.smooth import Probabilities, fill_gaps, smooth
from vnaw_pipeline.prediction.thresholds import apply_thresholds
from vnaw_pipeline.tasks import Task, TaskKind, output_columns


def finish_video(
    raw: Probabilities,
    valid: npt.NDArray[np.bool_],
    without_any: npt.NDArray[np.float32],
    config: PredictConfig,
    kind: TaskKind,
) -> Probabilities:
    """A video's final answers, (T, K) -> (T, K); `valid` (T,), `without_any` (K,) for a video without any valid frame.

    Raises:
        ConfigError: a mode filter where there are no classes; a bias or thresholds for another number of columns.
    """
    return decide(smooth(fill_gaps(raw, valid, without_any), config.smooth, kind), config, kind)


def finish_answers(
    raw: npt.NDArray[np.float32],
    valid: npt.NDArray[np.bool_],
    without_any: npt.NDArray[np.float32],
    config: PredictConfig,
    tasks: Sequence[Task],
) -> npt.NDArray[np.float32]:
    """`finish_video` for each of the tasks whose columns lie side by side, (T, C) -> (T, C)."""
    parts = [
        finish_video(raw[:, columns], valid, without_any[columns], config.of_task(task.name), task.kind)
        for task, columns in zip(tasks, output_columns(tasks).values(), strict=True)
    ]
    return np.concatenate(parts, axis=1)


def decide(answers: Probabilities, config: PredictConfig, kind: TaskKind) -> Probabilities:
    """Shift probabilities by the config's bias (classes) or thresholds (units), if there are any; (T, K) -> (T, K)."""
    if kind == "classes" and config.bias is not None:
        _require_columns("bias", len(config.bias), answers.shape[1])
        return apply_bias(answers, config.bias)
    if kind == "units" and config.thresholds is not None:
        _require_columns("thresholds", len(config.thresholds), answers.shape[1])
        return apply_thresholds(answers, config.thresholds)
    return answers


def _require_columns(key: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(f"predict.{key} holds {found} numbers; this task has {wanted} outputs. Give one for each.")
