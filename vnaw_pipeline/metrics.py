"""Metrics over all frames at once, never means of batches."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.annotations import Labels
from vnaw_pipeline.tasks import IGNORE_LABEL, Task


@dataclass(frozen=True)
class ExpressionScores:
    """Macro-F1, accuracy and F1 per class over `num_frames` labelled frames; shares in [0, 1].

    `confusion` int64 (K, K) counts frames by label (row) and prediction (column). A class that is neither labelled nor
    predicted has F1 0, as scikit-learn's `zero_division=0` says, and is part of the mean.
    """

    macro_f1: float
    accuracy: float
    f1: npt.NDArray[np.float64]
    confusion: npt.NDArray[np.int64]
    num_frames: int

    @property
    def num_classes(self) -> int:
        """How many of the K classes occur among the labels."""
        return int(self.confusion.any(axis=1).sum())

    @property
    def figures(self) -> dict[str, float]:
        """What stands in a line about an epoch."""
        return {"macro_f1": self.macro_f1, "accuracy": self.accuracy}


@dataclass(frozen=True)
class AffectScores:
    """Concordance of valence and arousal with their labels, (2,) and its mean, over `num_frames` annotated frames."""

    mean_ccc: float
    ccc: npt.NDArray[np.float64]
    num_frames: int

    @property
    def figures(self) -> dict[str, float]:
        """What stands in a line about an epoch."""
        return {"mean_ccc": self.mean_ccc, "ccc_valence": float(self.ccc[0]), "ccc_arousal": float(self.ccc[1])}


@dataclass(frozen=True)
class UnitScores:
    """F1 of each action unit, (U,), and its mean, each over the frames where that unit is annotated; `num_frames` are
    those with any. A unit neither annotated as present nor predicted has F1 0 and is part of the mean.
    """

    mean_au_f1: float
    f1: npt.NDArray[np.float64]
    num_frames: int

    @property
    def figures(self) -> dict[str, float]:
        """What stands in a line about an epoch."""
        return {"mean_au_f1": self.mean_au_f1}


Scores = ExpressionScores | AffectScores | UnitScores


def confusion_matrix(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int
) -> npt.NDArray[np.int64]:
    """Count frames by label and prediction, (K, K); frames with IGNORE_LABEL are left out."""
    used = labels != IGNORE_LABEL
    cells = np.bincount(labels[used] * num_classes + predicted[used], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def expression_scores(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int
) -> ExpressionScores:
    """Score predictions (N,) against labels (N,), both class indices."""
    confusion = confusion_matrix(labels, predicted, num_classes)
    right = np.diag(confusion).astype(np.float64)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = np.divide(2 * right, either, out=np.zeros(num_classes), where=either > 0)
    total = int(confusion.sum())
    accuracy = float(right.sum() / total) if total else 0.0
    return ExpressionScores(float(f1.mean()), accuracy, f1, confusion, total)


def face_scores(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], num_classes: int) -> ExpressionScores:
    """As `expression_scores`, but the mean F1 is that of the classes that occur among the labels: most sets of static
    faces lack one, and no encoder could find it there."""
    scores = expression_scores(labels, predicted, num_classes)
    occurs = scores.confusion.any(axis=1)
    return replace(scores, macro_f1=float(scores.f1[occurs].mean())) if occurs.any() else scores


def affect_scores(labels: npt.NDArray[np.float32], predicted: npt.NDArray[np.float32]) -> AffectScores:
    """Score valence and arousal (N, 2); rows with NaN in the labels are left out."""
    used = ~np.isnan(labels).any(axis=1)
    ccc = concordance(labels[used], predicted[used]) if used.any() else np.zeros(labels.shape[1])
    return AffectScores(float(ccc.mean()), ccc, int(used.sum()))


def concordance(labels: npt.NDArray[np.float32], predicted: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Lin's concordance correlation of each column, (N, C) twice -> (C,), with population moments, as ABAW has it.

    It is undefined, and here 0, where labels and predictions are one and the same constant.
    """
    x, y = labels.astype(np.float64), predicted.astype(np.float64)
    covariance = ((x - x.mean(axis=0)) * (y - y.mean(axis=0))).mean(axis=0)
    spread = x.var(axis=0) + y.var(axis=0) + np.square(x.mean(axis=0) - y.mean(axis=0))
    ccc: npt.NDArray[np.float64] = np.divide(2 * covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    return ccc


def unit_scores(labels: npt.NDArray[np.int8], present: npt.NDArray[np.bool_]) -> UnitScores:
    """Score action units (N, U): labels 0 and 1, IGNORE_LABEL where a unit is not annotated."""
    used = labels != IGNORE_LABEL
    right = ((labels == 1) & present).sum(axis=0).astype(np.float64)
    either = (labels == 1).sum(axis=0) + (used & present).sum(axis=0)
    f1 = np.divide(2 * right, either, out=np.zeros(labels.shape[1]), where=either > 0)
    return UnitScores(float(f1.mean()), f1, int(used.any(axis=1).sum()))


def score_predictions(task: Task, labels: Labels, predictions: npt.NDArray[np.float32]) -> Scores:
    """Score a task's columns of the prediction table (N, outputs): the most probable class, valence and arousal as
    they are, action units from .5 on."""
    if task.kind == "affect":
        return affect_scores(labels, predictions)
    if task.kind == "units":
        return unit_scores(labels, predictions >= 0.5)
    return expression_scores(labels, predictions.argmax(axis=1).astype(np.int64), len(task.outputs))
