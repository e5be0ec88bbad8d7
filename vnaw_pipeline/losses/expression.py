"""Objectives for expressions: over windows (V-NAW, the paper) and over frames (V-NAW, the public code).

Both return the *sum* over units and their number, so that the mean over a batch does not depend on how the batch is
split over forward passes or processes. `B` windows, `P` frames, `K` classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vnaw_pipeline.config import LossConfig
from vnaw_pipeline.losses.naw import constants_of, naw_weights
from vnaw_pipeline.tasks import IGNORE_LABEL
from vnaw_pipeline.windows.plan import window_labels


def expression_loss(
    logits: Tensor, labels: Tensor, valid: Tensor, config: LossConfig, progress: float
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the units of a batch, and how many units there are, at the level of `config`.

    Args:
        logits: (B, P, K); the loss is computed in float32 at least.
        labels: int64 (B, P), IGNORE_LABEL where there is none. A frame that is not valid is not used either.
        valid: bool (B, P).
        progress: share of training done, in [0, 1].

    Returns:
        loss sum and number of units, both scalars; 0 and 0 if nothing is labelled.
    """
    labels = labels.masked_fill(~valid, IGNORE_LABEL)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.level == "window":
        unit_labels = window_labels(labels, logits.shape[-1])
        used = unit_labels != IGNORE_LABEL
        log_p = window_log_probabilities(logits[used], valid[used])
    else:
        unit_labels = labels.flatten()
        used = unit_labels != IGNORE_LABEL
        log_p = logits.flatten(0, 1)[used].log_softmax(dim=-1)
    targets = unit_labels[used]
    losses = F.nll_loss(log_p, targets, reduction="none")
    if config.label_smoothing:
        losses = (1 - config.label_smoothing) * losses - config.label_smoothing * log_p.mean(dim=1)
    if config.weighting == "naw":
        weights = naw_weights(log_p.exp(), targets, progress, constants_of(config))
        if not config.weights_carry_gradient:
            weights = weights.detach()
        if config.level == "window":
            losses = (1 + weights) * losses  # Eq. 12
        else:
            losses = (config.lam_a + (1 - config.lam_a) * weights) * losses
    return losses.sum(), used.sum()


def window_log_probabilities(logits: Tensor, valid: Tensor) -> Tensor:
    """Log of the mean softmax over the valid frames of each window (Eq. 8, 9); (B, P, K), (B, P) -> (B, K).

    Summed in log space, so that a class that no frame expects has a large loss and not an infinite one. Every window
    must have a valid frame.
    """
    log_p = logits.log_softmax(dim=-1).masked_fill(~valid[:, :, None], -torch.inf)
    return log_p.logsumexp(dim=1) - valid.sum(dim=1, keepdim=True).to(log_p.dtype).log()
