"""Noise-aware adaptive weighting (NAW): how much a unit, a window or a frame, counts in the loss.

Source: Lee et al., V-NAW (CVPRW 2025, arXiv:2503.15970) Eq. 11, with the constants of NLA (arXiv:2502.09993) or of the
authors' public code. Differs from that code in that the quadratic form is taken for each unit alone (theirs builds an
N x N form first), and that the tilt is an argument and not a module rebuilt for each batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vnaw_pipeline.config import ObjectiveConfig
from vnaw_pipeline.losses.precision import at_least_float32


@dataclass(frozen=True)
class Gaussian:
    """A 2-D Gaussian over (p_true, p_rival) with covariance [[a, b], [b, a]]."""

    mean: tuple[float, float]
    a: float
    b: float


@dataclass(frozen=True)
class NawConstants:
    """One Gaussian for rightly and one for wrongly classified units; `normalised` divides by 2 pi sqrt(det S)."""

    right: Gaussian
    wrong: Gaussian
    normalised: bool


NAW_PRESETS: dict[Literal["nla", "public-code"], NawConstants] = {
    # NLA: a = s^2 + (s/r)^2, b = -+s^2 +- (s/r)^2 with s = .80, r = 2 (right) and s = .91, r = 6 (wrong).
    "nla": NawConstants(
        right=Gaussian((0.5, 0.5), a=0.80**2 + (0.80 / 2) ** 2, b=-(0.80**2) + (0.80 / 2) ** 2),
        wrong=Gaussian((0.3, 0.15), a=0.91**2 + (0.91 / 6) ** 2, b=0.91**2 - (0.91 / 6) ** 2),
        normalised=True,
    ),
    "public-code": NawConstants(
        right=Gaussian((0.5, 0.5), a=0.75, b=-0.50),
        wrong=Gaussian((0.3, 0.15), a=0.85, b=0.80),
        normalised=False,
    ),
}


def constants_of(config: ObjectiveConfig) -> NawConstants:
    """The preset's constants, with the config's choice of the normaliser."""
    preset = NAW_PRESETS[config.preset]
    if config.normalised is None:
        return preset
    return NawConstants(preset.right, preset.wrong, normalised=config.normalised)


def naw_weights(probabilities: Tensor, labels: Tensor, progress: float, constants: NawConstants) -> Tensor:
    """Weight each unit by how clear or how ambiguous its label looks to the model.

    A unit lies at (p_true, p_rival): the probability of its label and of the strongest other class. Its weight is the
    height of a Gaussian at that point, one for right units and one for wrong ones, so that a confident disagreement
    with the label (probably a wrong label) counts less than a near miss.

    Args:
        probabilities: (N, K), K >= 2, rows sum to 1; computed in float32 at least.
        labels: (N,) in [0, K). Leave units without a label out before calling.
        progress: share of training done, in [0, 1]; it tilts the right side's Gaussian along p_true + p_rival = 1.

    Returns:
        (N,) weights > 0. The gradient flows through them; detach them if that is not wanted.
    """
    probabilities = at_least_float32(probabilities)
    p_true = probabilities.gather(1, labels[:, None]).squeeze(1)
    p_rival = probabilities.scatter(1, labels[:, None], -1.0).amax(dim=1)
    tilt = 1 - math.exp(-15 * progress)
    right = _height(p_true, p_rival, constants.right, constants.right.b * tilt, constants.normalised)
    wrong = _height(p_true, p_rival, constants.wrong, constants.wrong.b, constants.normalised)
    return torch.where(p_true >= p_rival, right, wrong)


def _height(p_true: Tensor, p_rival: Tensor, gaussian: Gaussian, b: float, normalised: bool) -> Tensor:
    a, (mean_true, mean_rival) = gaussian.a, gaussian.mean
    x, y = p_true - mean_true, p_rival - mean_rival
    determinant = a * a - b * b
    height = torch.exp(-0.5 * (a * (x * x + y * y) - 2 * b * x * y) / determinant)
    return height / (2 * math.pi * math.sqrt(determinant)) if normalised else height
