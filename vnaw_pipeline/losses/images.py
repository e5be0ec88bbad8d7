"""Objectives for single images whose labels may be wrong: cross-entropy and its noise-robust relatives, weighted by
NAW or by class, with mirror consistency and distillation beside them.

`B` images, `K` classes. Every function gives one value per image; `image_loss` their sum and number.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vnaw_pipeline.config import ImageLossConfig
from vnaw_pipeline.losses.naw import constants_of, naw_weights

ELR_MOMENTUM = 0.7
"""Of the moving average of an image's predictions in early-learning regularisation."""
_ELR_CEILING = 1 - 1e-4
_LEAST_SHARE = 1e-8
"""Of a transition: a label that no trusted face of a class had is unlikely, not impossible."""


def image_loss(
    logits: Tensor,
    targets: Tensor,
    config: ImageLossConfig,
    progress: float,
    *,
    class_weights: Tensor | None = None,
    memory: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the objective over the images that have a target, and how many there are.

    Args:
        logits: (B, K); computed in float32 at least.
        targets: (B, K), each row a distribution, or zeros where the image has no label.
        progress: share of training done, in [0, 1].
        class_weights: (K,), for `weighting: class`.
        memory: (B, K), for `objective: elr`: each image's moving average, already updated with these predictions.
    """
    used = targets.sum(dim=1) > 0
    logits, targets = logits[used].to(torch.promote_types(logits.dtype, torch.float32)), targets[used]
    if config.label_smoothing:
        targets = (1 - config.label_smoothing) * targets + config.label_smoothing / logits.shape[1]
    log_p = logits.log_softmax(dim=1)
    if config.transition is not None:
        # log sum_i p_i T_ij: what the label would be (Patrini et al. 2017, forward; Hendrycks et al. 2018)
        log_t = torch.tensor(config.transition, dtype=log_p.dtype, device=log_p.device).clamp(min=_LEAST_SHARE).log()
        log_p = (log_p[:, :, None] + log_t).logsumexp(dim=1)
    losses = _label_losses(log_p, targets, config)
    if config.objective == "elr":
        assert memory is not None
        agreement = (log_p.exp() * memory[used]).sum(dim=1).clamp(max=_ELR_CEILING)
        losses = losses + config.elr_weight * (1 - agreement).log()
    if config.weighting == "class":
        assert class_weights is not None
        losses = losses * (targets * class_weights).sum(dim=1)
    if config.weighting == "naw" and progress >= config.naw_from:
        weights = naw_weights(log_p.exp(), targets.argmax(dim=1), progress, constants_of(config))
        if not config.weights_carry_gradient:
            weights = weights.detach()
        losses = (config.lam_a + (1 - config.lam_a) * weights) * losses
    return losses.sum(), used.sum()


def _label_losses(log_p: Tensor, targets: Tensor, config: ImageLossConfig) -> Tensor:
    if config.objective == "gce":  # Zhang and Sabuncu 2018, Eq. 6
        return (targets * (1 - (config.gce_q * log_p).exp()) / config.gce_q).sum(dim=1)
    if config.objective == "bootstrap":  # Reed et al. 2015, soft
        targets = config.bootstrap_beta * targets + (1 - config.bootstrap_beta) * log_p.exp().detach()
    return -(targets * log_p).sum(dim=1)


def update_memory(memory: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    """Move the rows `index` (B,) of `memory` (N, K) towards the predictions; the rows as they are then.

    Early-learning regularisation, Liu et al. 2020, Eq. 4; the predictions carry no gradient there.
    """
    p = logits.detach().float().softmax(dim=1).clamp(1e-4, 1 - 1e-4)
    memory[index] = ELR_MOMENTUM * memory[index] + (1 - ELR_MOMENTUM) * p / p.sum(dim=1, keepdim=True)
    return memory[index]


def jensen_shannon(logits: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence between two predictions of the same images, (B, K) twice -> (B,), in [0, log 2].

    With m = (p + q) / 2: (KL(p || m) + KL(q || m)) / 2, in nats (NLA; the public code's is not one).
    """
    log_p, log_q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(dim=1) for x in (logits, other))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = (log_p.exp() * (log_p - log_m)).sum(dim=1)
    from_q = (log_q.exp() * (log_q - log_m)).sum(dim=1)
    return (from_p + from_q) / 2


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, times its square, (B,) (Hinton et al. 2015)."""
    student = (logits.float() / temperature).log_softmax(dim=1)
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
