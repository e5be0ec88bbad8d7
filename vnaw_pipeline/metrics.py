"""Metrics over all frames at once, never means of batches."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.tasks import IGNORE_LABEL


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
