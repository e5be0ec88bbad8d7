"""Coarse to fine: five coarse expressions and the four negative ones become the eight (CFC-SP, Xue et al. 2022).

A model of coarse5 knows Negative as one class, a model of negative4 tells Anger, Disgust, Fear and Sadness apart. How
their answers were joined was never published; both ways here are ours. `N` frames.
"""

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.prediction.smooth import Probabilities
from vnaw_pipeline.tasks import TASKS

_COARSE = np.array(TASKS["coarse5"].from_expr8)
_FINE = np.array(TASKS["negative4"].from_expr8)
_NEGATIVE = TASKS["coarse5"].outputs.index("Negative")


def soft_cascade(coarse: Probabilities, negative: Probabilities) -> Probabilities:
    """P_coarse(Negative) P_negative(c) for the negative four, P_coarse(c) for the rest; (N, 5), (N, 4) -> (N, 8).

    Rows add up to 1 as those given do.
    """
    given = coarse[:, _COARSE].astype(np.float64)
    return np.where(_FINE >= 0, given * negative[:, _FINE], given).astype(np.float32)


def hard_cascade(coarse: Probabilities, negative: Probabilities) -> Probabilities:
    """The arg max of coarse, and where that is Negative the arg max of negative; (N, 5), (N, 4) -> (N, 8).

    As probabilities: the whole share of Negative goes to the arg max of negative. The arg max of a row is the hard
    rule's class in every case: where Negative draws with another coarse class, which then wins, its share is lowered
    by the last bit.
    """
    shares = coarse.astype(np.float32)
    drawn = (shares[:, _NEGATIVE] == shares.max(axis=1)) & (shares.argmax(axis=1) != _NEGATIVE)
    shares[drawn, _NEGATIVE] = np.nextafter(shares[drawn, _NEGATIVE], np.float32(0))
    chosen: npt.NDArray[np.bool_] = negative.argmax(axis=1)[:, None] == _FINE
    return np.where((_FINE < 0) | chosen, shares[:, _COARSE], np.float32(0))
