"""After the model, over action units: the probability from which each unit counts as shown, tuned for its F1.

`N` frames, `U` units.
"""

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.prediction.smooth import Probabilities

_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def apply_thresholds(probabilities: Probabilities, thresholds: npt.ArrayLike) -> Probabilities:
    """Shift each unit's odds by those of its threshold, so that .5 decides as it did; (N, U), (U,) -> (N, U).

    p' = p (1 - t) / (p (1 - t) + (1 - p) t). The order of frames stays, 0 stays 0, 1 stays 1, and .5 everywhere
    changes nothing. So the table alone says which units are shown, to the last bit of float32.
    """
    given = probabilities.astype(np.float64)
    threshold = np.asarray(thresholds, dtype=np.float64)
    shown, absent = given * (1 - threshold), (1 - given) * threshold
    shifted = (shown / (shown + absent)).astype(np.float32)
    return np.where(given < threshold, np.minimum(shifted, _BELOW_HALF), shifted)


def best_thresholds(probabilities: Probabilities, labels: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """The threshold of best F1 for each unit, exactly, (U,) in (0, 1); a unit is shown from its threshold on.

    `labels` (N, U) are 1 and 0, -1 where a unit is not annotated. Where .5 is as good as any it stays.
    """
    pairs = zip(probabilities.T, labels.T, strict=True)
    return np.array([_best_threshold(of_unit[truth >= 0], truth[truth >= 0]) for of_unit, truth in pairs])


def _best_threshold(probabilities: Probabilities, truth: npt.NDArray[np.integer]) -> float:
    """Sort once, then every place to cut is one difference of a running count: O(N log N)."""
    order = np.argsort(-probabilities, kind="stable")
    ranked = np.append(probabilities[order].astype(np.float64), 0.0)
    right = truth[order].cumsum()  # of the first n frames
    f1 = 2 * right / (np.arange(1, len(truth) + 1) + max(int(truth.sum()), 1))
    cuts = np.flatnonzero(ranked[1:] < ranked[:-1])  # between equal probabilities there is nothing to cut
    shown = probabilities >= 0.5
    at_half = 2 * int(truth[shown].sum()) / max(int(shown.sum()) + int(truth.sum()), 1)
    if not len(cuts) or f1[cuts].max() <= at_half:
        return 0.5
    best = cuts[f1[cuts].argmax()]
    return float((ranked[best] + ranked[best + 1]) / 2)
