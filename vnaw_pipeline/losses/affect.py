"""Objectives for valence and arousal. `B` frames; a row with NaN is not annotated."""

import torch
from torch import Tensor

from vnaw_pipeline.losses.precision import at_least_float32

_LEAST_VARIANCE = 1e-6


def concordance(predicted: Tensor, truth: Tensor, used: Tensor) -> Tensor:
    """Concordance correlation per column over the rows that are used, (B, C) twice and bool (B,) -> (C,), in [-1, 1]
    (Lin 1989); population moments.

    Where neither varies it is 0 unless their means agree: a constant tells nothing.
    """
    share = (used.to(predicted) / used.sum().clamp(min=1))[:, None]
    mean, true_mean = (share * predicted).sum(dim=0), (share * truth).sum(dim=0)
    off, true_off = predicted - mean, truth - true_mean
    covariance = (share * off * true_off).sum(dim=0)
    spread = (share * (off.square() + true_off.square())).sum(dim=0) + (mean - true_mean).square()
    return 2 * covariance / spread.clamp(min=_LEAST_VARIANCE)


def affect_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean over both dimensions of (1 - CCC), plus the mean absolute error, over the annotated rows; a scalar.

    Args:
        predicted: (B, 2) in [-1, 1].
        truth: (B, 2), NaN where there is none. Without any annotated row the loss is 0.
    """
    used = ~truth.isnan().any(dim=1)
    predicted = at_least_float32(predicted).masked_fill(~used[:, None], 0)
    truth = truth.masked_fill(~used[:, None], 0)
    error = (predicted - truth).abs().sum() / (used.sum().clamp(min=1) * truth.shape[1])
    return torch.where(used.any(), (1 - concordance(predicted, truth, used)).mean() + error, 0)
