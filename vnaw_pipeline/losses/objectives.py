"""Objectives where labels may be wrong, the same for every kind of unit: an image, a frame, a window.

`N` units, `K` classes. `log_p` (N, K) are log-probabilities, `targets` (N, K) distributions: one-hot, smoothed, or
shares of votes. Every objective gives one value per unit, (N,).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from vnaw_pipeline.config import ObjectiveConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.losses.naw import constants_of, naw_weights
from vnaw_pipeline.losses.precision import at_least_float32
from vnaw_pipeline.processes import process_state

FOCAL_ALPHA = 0.25
"""Scale of the focal loss (Lin et al. 2017)."""
ELR_MOMENTUM = 0.7
"""Of the moving average of a unit's predictions in early-learning regularisation."""
_ELR_CEILING = 1 - 1e-4


def unit_losses(
    log_p: Tensor,
    targets: Tensor,
    config: ObjectiveConfig,
    progress: float,
    *,
    class_weights: Tensor | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """The configured objective of each unit, smoothed and weighted as configured.

    Args:
        log_p: (N, K), float32 at least.
        targets: (N, K). The value of a unit without a target, a row of zeros, means nothing, but is finite.
        progress: share of training done, in [0, 1].
        class_weights: (K,), for `weighting: class | complement`, from `class_weights`.
        memory: (N, K), for `objective: elr`: each unit's moving average, already updated with these predictions.
    """
    if config.label_smoothing:
        targets = (1 - config.label_smoothing) * targets + config.label_smoothing / targets.shape[1]
    if config.objective == "focal":
        losses = focal_loss(log_p, targets, config.focal_gamma)
    elif config.objective == "gce":
        losses = generalised_cross_entropy(log_p, targets, config.gce_q)
    elif config.objective == "bootstrap":
        losses = bootstrapped_cross_entropy(log_p, targets, config.bootstrap_beta)
    else:
        losses = cross_entropy(log_p, targets)
    if config.objective == "elr":
        assert memory is not None
        losses = losses + config.elr_weight * early_learning_term(log_p, memory)
    if config.weighting in ("class", "complement"):
        assert class_weights is not None
        losses = losses * (targets * class_weights).sum(dim=1)
    if config.weighting == "naw" and progress >= config.naw_from:
        weights = naw_weights(log_p.exp(), targets.argmax(dim=1), progress, constants_of(config))
        if not config.weights_carry_gradient:
            weights = weights.detach()
        if config.mix == "one-plus":
            losses = (1 + weights) * losses  # V-NAW Eq. 12
        else:
            losses = (config.lam_a + (1 - config.lam_a) * weights) * losses
    return losses


def cross_entropy(log_p: Tensor, targets: Tensor) -> Tensor:
    """-sum_k t_k log p_k."""
    return -(targets * log_p).sum(dim=1)


def focal_loss(log_p: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """-alpha sum_k t_k (1 - p_k)^gamma log p_k: what the model knows already counts little (Lin et al. 2017, Eq. 5)."""
    # Where p is 1, a power below 1 has an infinite slope, which the floor takes away.
    doubt = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -FOCAL_ALPHA * (targets * doubt**gamma * log_p).sum(dim=1)


def generalised_cross_entropy(log_p: Tensor, targets: Tensor, q: float) -> Tensor:
    """sum_k t_k (1 - p_k^q) / q, bounded by 1 / q (Zhang and Sabuncu 2018, Eq. 6)."""
    return (targets * (1 - (q * log_p).exp()) / q).sum(dim=1)


def bootstrapped_cross_entropy(log_p: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Cross-entropy with a share 1 - beta of the target from the prediction, as a constant (Reed et al. 2015, soft)."""
    return cross_entropy(log_p, beta * targets + (1 - beta) * log_p.exp().detach())


def early_learning_term(log_p: Tensor, memory: Tensor) -> Tensor:
    """log(1 - <p, memory>): the lower, the nearer the prediction is to what it used to be (Liu et al. 2020)."""
    agreement = (log_p.exp() * memory).sum(dim=1).clamp(max=_ELR_CEILING)
    return (1 - agreement).log()


def prediction_memory(config: ObjectiveConfig, num_rows: int, num_classes: int) -> dict[str, Tensor]:
    """For early-learning regularisation 'predictions' (num_rows, K), zeros on this process's device; else nothing.

    Raises:
        ConfigError: several processes, each of which would remember a part.
    """
    if config.objective != "elr":
        return {}
    state = process_state()
    if state.num_processes > 1:
        raise ConfigError("objective elr remembers every prediction, so it runs in one process only.")
    return {"predictions": torch.zeros(num_rows, num_classes, device=state.device)}


def update_memory(memory: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    """Move the rows `index` (B,) of `memory` (N, K) towards the predictions; the rows as they are then, (B, K).

    Liu et al. 2020, Eq. 4; the predictions carry no gradient there. A row that is there several times moves once,
    towards the mean of its predictions.
    """
    p = logits.detach().float().softmax(dim=1).clamp(1e-4, 1 - 1e-4)
    p = p / p.sum(dim=1, keepdim=True)
    # Equal rows stand together once sorted; torch.unique would make the host wait for how many differ.
    rows, order = index.sort(stable=True)
    place = torch.cat([torch.zeros_like(rows[:1]), (rows.diff() != 0).cumsum(0)])
    sums = torch.zeros_like(p).index_add_(0, place, p[order])
    counts = torch.zeros_like(p[:, :1]).index_add_(0, place, torch.ones_like(p[:, :1]))
    memory[rows] = ELR_MOMENTUM * memory[rows] + (1 - ELR_MOMENTUM) * (sums / counts)[place]
    return memory[index]


def class_weights(mass: Tensor, weighting: Literal["none", "class", "complement", "naw"]) -> Tensor | None:
    """Weight of each class from how often it is a label, (K,) -> float32 (K,); None if the weighting is by neither.

    `class`: inverse to the share n_c / sum n, and 1 on average over the labels; a class that never occurs weighs 0.
    `complement`: 1 - n_c / sum n, as in Transformers with Random Masking.
    """
    mass = mass.double()
    if weighting == "class":
        weights = torch.where(mass > 0, 1 / mass.clamp(min=1e-9), 0.0)
        return (weights * mass.sum() / (weights * mass).sum()).float()
    if weighting == "complement":
        return (1 - mass / mass.sum()).float()
    return None


def jensen_shannon(logits: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence between two predictions for the same units, (N, K) twice -> (N,), in [0, log 2].

    With m = (p + q) / 2: (KL(p || m) + KL(q || m)) / 2, in nats (NLA; the public code's is not one).
    """
    log_p, log_q = (at_least_float32(x).log_softmax(dim=1) for x in (logits, other))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = (log_p.exp() * (log_p - log_m)).sum(dim=1)
    from_q = (log_q.exp() * (log_q - log_m)).sum(dim=1)
    return ((from_p + from_q) / 2).clamp(0, math.log(2))  # rounding may leave the bounds
