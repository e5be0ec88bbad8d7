"""Expressions over windows (V-NAW, the paper) and over frames (V-NAW, the public code): units and their loss.

The loss is the *sum* over units, with their number, so that the mean over a batch does not depend on how the batch is
split over forward passes or processes. `B` windows, `P` frames, `K` classes.
"""

from typing import Literal

import torch
from torch import Tensor

from vnaw_pipeline.config import LossConfig
from vnaw_pipeline.losses.objectives import jensen_shannon, unit_losses
from vnaw_pipeline.losses.precision import at_least_float32
from vnaw_pipeline.tasks import IGNORE_LABEL
from vnaw_pipeline.windows.plan import window_labels


def expression_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    config: LossConfig,
    progress: float,
    *,
    class_weights: Tensor | None = None,
    memory: Tensor | None = None,
    mirrored_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the units of a batch, and how many units there are, at the level of `config`.

    Early-learning regularisation knows images only. Our reading: a frame's target is the moving average of its own
    predictions over all windows that held it, and a window's is the mean of those of its valid frames, as its
    prediction is the mean of theirs (Eq. 8).

    Args:
        logits: (B, P, K); the loss is computed in float32 at least.
        labels: int64 (B, P), IGNORE_LABEL where there is none. A frame that is not valid is not used either.
        valid: bool (B, P).
        progress: share of training done, in [0, 1].
        class_weights: (K,), for `weighting: class | complement`.
        memory: (B, P, K), for `objective: elr`: each frame's moving average, already updated with these predictions.
        mirrored_logits: (B, P, K), for `consistency`: predictions for the mirror images. The true Jensen-Shannon
            divergence of each unit is added (NLA; what the public code adds is not one).

    Returns:
        loss sum and number of units, both scalars; 0 and 0 if nothing is labelled.
    """
    labels = labels.masked_fill(~valid, IGNORE_LABEL)
    unit_labels = window_labels(labels, logits.shape[-1]) if config.level == "window" else labels.flatten()
    used = unit_labels != IGNORE_LABEL
    log_p = _unit_log_probabilities(logits, valid, used, config.level)
    if memory is not None and config.level == "window":
        memory = (memory * valid[:, :, None]).sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)
    elif memory is not None:
        memory = memory.flatten(0, 1)
    targets = (unit_labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)).to(log_p.dtype)
    losses = unit_losses(log_p, targets, config, progress, class_weights=class_weights, memory=memory)
    if mirrored_logits is not None:
        mirrored = _unit_log_probabilities(mirrored_logits, valid, used, config.level)
        losses = losses + config.consistency * jensen_shannon(log_p, mirrored)
    return torch.where(used, losses, 0).sum(), used.sum()


def _unit_log_probabilities(logits: Tensor, valid: Tensor, used: Tensor, level: Literal["window", "frame"]) -> Tensor:
    """Of all units, (N, K): windows, or frames of all windows one after the other; uniform for those not used.

    To pick out the used ones would make the host wait for their number; and what stands at the others must not get
    into a gradient, not even as NaN times 0.
    """
    if level == "window":
        logits = logits.masked_fill(~(valid & used[:, None])[:, :, None], 0)
        return window_log_probabilities(logits, valid | ~used[:, None])
    return at_least_float32(logits.flatten(0, 1).masked_fill(~used[:, None], 0)).log_softmax(dim=-1)


def window_log_probabilities(logits: Tensor, valid: Tensor) -> Tensor:
    """Log of the mean softmax over the valid frames of each window (Eq. 8, 9); (B, P, K), (B, P) -> (B, K).

    Summed in log space, so that a class that no frame expects has a large loss and not an infinite one. Every window
    must have a valid frame.
    """
    log_p = at_least_float32(logits).log_softmax(dim=-1).masked_fill(~valid[:, :, None], -torch.inf)
    return log_p.logsumexp(dim=1) - valid.sum(dim=1, keepdim=True).to(log_p.dtype).log()
