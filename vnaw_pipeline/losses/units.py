"""Objectives for action units. -1 is not annotated, unit by unit.

Sums over the annotated units of frames and their number, so that a mean does not depend on how a batch is split.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vnaw_pipeline.config import UnitsLossConfig
from vnaw_pipeline.losses.precision import at_least_float32
from vnaw_pipeline.tasks import IGNORE_LABEL

_FOCAL_GAMMA = 2


def units_loss(
    logits: Tensor, truth: Tensor, config: UnitsLossConfig, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over what is annotated, and how many that is; 0 and 0 if nothing is.

    `focal` is binary cross-entropy times (1 - p)^2, p the probability of the label (Lin et al. 2017), without their
    alpha, whose place `class_weights` take.

    Args:
        logits, truth: (..., U); truth is 0, 1 or IGNORE_LABEL.
        class_weights: (U, 2), weights of absent and present.
    """
    used = truth != IGNORE_LABEL
    logits = at_least_float32(logits).masked_fill(~used, 0)
    losses = F.binary_cross_entropy_with_logits(logits, (truth == 1).to(logits.dtype), reduction="none")
    if config.objective == "focal":
        losses = losses * (1 - (-losses).exp()) ** _FOCAL_GAMMA
    if class_weights is not None:
        losses = losses * torch.where(truth == 1, class_weights[:, 1], class_weights[:, 0])
    return torch.where(used, losses, 0).sum(), used.sum()


def balanced_class_weights(truth: Tensor) -> Tensor:
    """Weights (U, 2) with which the absent and the present frames of each unit (N, U) weigh alike, on average 1.

    They are n / (2 n_c), as scikit-learn's `balanced`; of a unit that is only ever absent, or present, n / 2 n = .5.
    """
    counts = torch.stack([(truth == 0).sum(dim=0), (truth == 1).sum(dim=0)], dim=1).double()
    return (counts.sum(dim=1, keepdim=True) / (2 * counts.clamp(min=1))).float()
