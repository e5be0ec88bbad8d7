"""The loss of single images: an objective for labels that may be wrong, with transition and distillation beside it.

`B` images, `K` classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vnaw_pipeline.config import ImageLossConfig
from vnaw_pipeline.losses.objectives import unit_losses
from vnaw_pipeline.losses.precision import at_least_float32

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
    transition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the objective over the images that have a target, and how many there are.

    Args:
        logits: (B, K); computed in float32 at least.
        targets: (B, K), each row a distribution, or zeros where the image has no label.
        progress: share of training done, in [0, 1].
        class_weights: (K,), for `weighting: class | complement`.
        memory: (B, K), for `objective: elr`: each image's moving average, already updated with these predictions.
        transition: (K, K), the config's, where the logits are.
    """
    used = targets.sum(dim=1) > 0
    log_p = at_least_float32(logits.masked_fill(~used[:, None], 0)).log_softmax(dim=1)
    if config.transition is not None:
        assert transition is not None
        # log sum_i p_i T_ij: what the label would be (Patrini et al. 2017, forward; Hendrycks et al. 2018)
        log_p = (log_p[:, :, None] + transition.clamp(min=_LEAST_SHARE).log()).logsumexp(dim=1)
    losses = unit_losses(log_p, targets, config, progress, class_weights=class_weights, memory=memory)
    return torch.where(used, losses, 0).sum(), used.sum()


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, times its square, (B,) (Hinton et al. 2015)."""
    student = (logits.float() / temperature).log_softmax(dim=1)
    teacher = (teacher_logits.float() / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
