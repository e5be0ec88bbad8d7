"""Objectives for action units. `B` frames; -1 is not annotated, unit by unit."""

from torch import Tensor
from torch.nn import functional as F


def units_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean binary cross-entropy over the units that are annotated, (B, U) twice -> a scalar; 0 if none is."""
    used = truth >= 0
    if not used.any():
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[used].float(), truth[used].float())
