"""Objectives for valence and arousal. `B` frames; a row with NaN is not annotated."""

import torch
from torch import Tensor

_LEAST_VARIANCE = 1e-6


def concordance(predicted: Tensor, truth: Tensor) -> Tensor:
    """Concordance correlation per column, (B, C) twice -> (C,), in [-1, 1] (Lin 1989); population moments.

    Where neither varies it is 0 unless their means agree: a constant tells nothing.
    """
    mean, true_mean = predicted.mean(dim=0), truth.mean(dim=0)
    covariance = ((predicted - mean) * (truth - true_mean)).mean(dim=0)
    spread = predicted.var(dim=0, unbiased=False) + truth.var(dim=0, unbiased=False) + (mean - true_mean).square()
    return 2 * covariance / spread.clamp(min=_LEAST_VARIANCE)


def affect_loss(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean over both dimensions of (1 - CCC), plus the mean absolute error, over the annotated rows; a scalar.

    Args:
        predicted: (B, 2) in [-1, 1].
        truth: (B, 2), NaN where there is none. Without any annotated row the loss is 0.
    """
    used = ~truth.isnan().any(dim=1)
    if not used.any():
        return predicted.sum() * 0
    predicted, truth = predicted[used].to(torch.promote_types(predicted.dtype, torch.float32)), truth[used]
    return (1 - concordance(predicted, truth)).mean() + (predicted - truth).abs().mean()
