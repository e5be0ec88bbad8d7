"""After the model, over classes: a bias per class in log-probability, tuned for macro-F1.

A model trained on uneven classes names the rare ones too rarely; adding to their logits shifts the decision without
touching the model (generalised logit adjustment, Zhu et al. 2023; here by direct search on the score that counts).
`N` frames, `K` classes.
"""

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.prediction.smooth import Probabilities

BIAS_GRID = np.round(np.arange(-30, 31) / 10, 1)
"""Values that a class's bias may take: -3 to 3 in steps of .1, a factor of 20 either way in the odds."""


def apply_bias(probabilities: Probabilities, bias: npt.ArrayLike) -> Probabilities:
    """Probabilities times exp(bias), rescaled to add up to 1; (N, K) and (K,) -> (N, K)."""
    shifted = probabilities * np.exp(np.asarray(bias, dtype=np.float64))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float32)


def best_bias(probabilities: Probabilities, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The bias (K,) that coordinate ascent over BIAS_GRID finds from 0, for the macro-F1 of labelled frames (N,).

    Classes are visited in order, again and again until no change of a single one helps; so the score never falls, and
    the same input gives the same bias. Of equally good values the one nearest to 0 is taken. The maximum is a local
    one: all K at once would be a search of 61^K.
    """
    with np.errstate(divide="ignore"):  # log 0: a class that is never named, whatever its bias
        own = np.log(probabilities.T.astype(np.float64, order="C"))
    num_classes = len(own)
    scores, bias = own.copy(), np.zeros(num_classes)
    nearest_first = np.argsort(np.abs(BIAS_GRID), kind="stable")
    best, last_changed, visits = -1.0, 0, 0
    while visits - last_changed <= num_classes:
        column = visits % num_classes
        f1 = macro_f1_over_grid(scores, own[column], labels, column)
        chosen = nearest_first[np.argmax(f1[nearest_first])]
        if f1[chosen] > best + 1e-12:
            best, last_changed, bias[column] = f1[chosen], visits, BIAS_GRID[chosen]
            scores[column] = own[column] + bias[column]
        visits += 1
    return bias


def macro_f1_over_grid(
    scores: npt.NDArray[np.float64], own: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], column: int
) -> npt.NDArray[np.float64]:
    """Macro-F1 for every value that one class's bias may take, the others' fixed; (61,).

    Args:
        scores: (K, N) log-probabilities plus bias; row `column` of it is not read.
        own: (N,) log-probability of that class, without bias.

    A frame changes to the class at one point of the grid, where its bias makes up for the lead of the strongest other
    class; so counting frames by that point, rival and label gives the confusion at all points at once. A draw goes to
    the lower class, as arg max decides.
    """
    num_classes, num_points = len(scores), len(BIAS_GRID)
    # Class by class, which is ten times as fast as an arg max frame by frame; the strongest is also the latest so far.
    lead, rival = np.full(len(own), -np.inf), np.full(len(own), int(column == 0), dtype=np.int8)
    for other in range(num_classes):
        if other != column:
            np.maximum(rival, (scores[other] > lead) * np.int8(other), out=rival)
            np.maximum(lead, scores[other], out=lead)
    # Rounded, so that equal probabilities under equal biases are a draw in spite of the last bits of their logarithms.
    tenths = np.round(lead - own, 9) * 10  # exact for values of the grid
    above = np.ceil(tenths)
    above += (above == tenths) & (column > rival)
    changes = (above.clip(-30, 31) + 30).astype(np.int64)
    cells = np.bincount(
        (changes * num_classes + rival) * num_classes + labels, minlength=(num_points + 1) * num_classes**2
    )
    cells = cells.reshape(num_points + 1, num_classes, num_classes).cumsum(axis=0)  # (points, rival, label)
    left = cells[-1] - cells[:-1]  # frames that still name their rival
    named, right = left.sum(axis=2), left.diagonal(axis1=1, axis2=2).copy()
    named_own = cells[:-1].sum(axis=1)
    named[:, column], right[:, column] = named_own.sum(axis=1), named_own[:, column]
    either = named + np.bincount(labels, minlength=num_classes)
    f1 = np.divide(2.0 * right, either, out=np.zeros(right.shape), where=either > 0)
    return np.asarray(f1.mean(axis=1))
