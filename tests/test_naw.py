"""NAW and the objectives against independent float64 computations, and the laws they must obey.

Tolerances: float64 against float64 differs by rounding only, so 1e-12 relative; float32 losses to 1e-5.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vnaw_pipeline.config import LossConfig
from vnaw_pipeline.losses.expression import expression_loss, window_log_probabilities
from vnaw_pipeline.losses.naw import NAW_PRESETS, naw_weights
from vnaw_pipeline.tasks import IGNORE_LABEL

PRESETS = sorted(NAW_PRESETS)


def reference_weight(p: np.ndarray, label: int, progress: float, preset: str) -> float:
    """One unit, from the equations as printed: a full 2 x 2 covariance, inverted and its determinant by numpy."""
    if preset == "nla":
        s, r = 0.80, 2.0
        right = [[s**2 + (s / r) ** 2, -(s**2) + (s / r) ** 2], [-(s**2) + (s / r) ** 2, s**2 + (s / r) ** 2]]
        s, r = 0.91, 6.0
        wrong = [[s**2 + (s / r) ** 2, s**2 - (s / r) ** 2], [s**2 - (s / r) ** 2, s**2 + (s / r) ** 2]]
    else:
        right, wrong = [[0.75, -0.50], [-0.50, 0.75]], [[0.85, 0.80], [0.80, 0.85]]
    p_true = p[label]
    p_rival = max(p[k] for k in range(len(p)) if k != label)
    if p_true >= p_rival:
        covariance, mean = np.array(right), np.array([0.5, 0.5])
        covariance[0, 1] *= 1 - math.exp(-15 * progress)
        covariance[1, 0] *= 1 - math.exp(-15 * progress)
    else:
        covariance, mean = np.array(wrong), np.array([0.3, 0.15])
    v = np.array([p_true, p_rival]) - mean
    height = math.exp(-0.5 * v @ np.linalg.inv(covariance) @ v)
    return height / (2 * math.pi * math.sqrt(np.linalg.det(covariance))) if preset == "nla" else height


def random_probabilities(seed: int, count: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0])
def test_weights_equal_the_equations(preset: str, progress: float) -> None:
    p = random_probabilities(0, 64, 8)
    labels = torch.arange(64) % 8
    found = naw_weights(p, labels, progress, NAW_PRESETS[preset])
    wanted = [reference_weight(row.numpy(), int(label), progress, preset) for row, label in zip(p, labels, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_constants_of_nla_are_those_published() -> None:
    nla = NAW_PRESETS["nla"]
    assert (nla.right.a, nla.right.b) == pytest.approx((0.80, -0.48))
    assert (nla.wrong.a, nla.wrong.b) == pytest.approx((0.8511, 0.8051), abs=5e-5)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 9), st.floats(0, 1))
def test_each_unit_is_weighed_alone(seed: int, count: int, classes: int, progress: float) -> None:
    """Permuting units permutes weights, and one unit alone has the weight it has among others.

    The public code takes an N x N quadratic form and mixes units, and its squeeze() breaks for one unit.
    """
    p = random_probabilities(seed, count, classes)
    labels = torch.arange(count) % classes
    weights = naw_weights(p, labels, progress, NAW_PRESETS["nla"])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(naw_weights(p[order], labels[order], progress, NAW_PRESETS["nla"]), weights[order])
    alone = naw_weights(p[:1], labels[:1], progress, NAW_PRESETS["nla"])
    assert alone.shape == (1,)
    torch.testing.assert_close(alone, weights[:1])


def test_confident_disagreement_weighs_least_and_ambiguity_most() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.98, 0.01, 0.01], [0.01, 0.98, 0.01]])
    ambiguous, clean, wrong = naw_weights(p, torch.zeros(3, dtype=torch.int64), 1.0, NAW_PRESETS["nla"])
    assert ambiguous > clean > wrong
    assert wrong < 0.01 * ambiguous


def random_batch(seed: int, windows: int = 5, frames: int = 7, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(windows, frames, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, classes, (windows, frames), generator=generator)
    valid = torch.rand(windows, frames, generator=generator) < 0.8
    return logits, labels, valid


def reference_loss(logits: Tensor, labels: Tensor, valid: Tensor, config: LossConfig, progress: float) -> float:
    """The mean loss in plain Python, unit by unit, from Eq. 8 to 12 (window) and the public code's mix (frame)."""
    losses = []
    for of_window, label_row, valid_row in zip(logits.numpy(), labels.numpy(), valid.numpy(), strict=True):
        p = np.exp(of_window) / np.exp(of_window).sum(axis=1, keepdims=True)
        known = [i for i in range(len(p)) if valid_row[i] and label_row[i] != IGNORE_LABEL]
        if not known:
            continue
        if config.level == "frame":
            for i in known:
                w = reference_weight(p[i], label_row[i], progress, config.preset)
                ce = -math.log(p[i][label_row[i]])
                losses.append(config.lam_a * ce + (1 - config.lam_a) * w * ce)
            continue
        counts = {c: sum(label_row[i] == c for i in known) for c in range(p.shape[1])}
        centre = (len(p) - 1) / 2
        nearest = {c: min((abs(i - centre) for i in known if label_row[i] == c), default=99) for c in counts}
        label = min(counts, key=lambda c: (-counts[c], nearest[c], c))
        mean = p[valid_row].mean(axis=0)
        losses.append((1 + reference_weight(mean, label, progress, config.preset)) * -math.log(mean[label]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("level", ["window", "frame"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_equations(level: str, preset: str, seed: int) -> None:
    config = LossConfig.model_validate({"level": level, "preset": preset})
    logits, labels, valid = random_batch(seed)
    total, units = expression_loss(logits, labels, valid, config, 0.3)
    assert float(total / units) == pytest.approx(reference_loss(logits, labels, valid, config, 0.3), rel=1e-12)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_gradient_through_the_weights_is_that_of_the_loss(level: str) -> None:
    """Against central differences along a random direction, float64: 1e-6 is their own error."""
    config = LossConfig.model_validate({"level": level, "weights_carry_gradient": True})
    logits, labels, valid = random_batch(1)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(expression_loss(logits, labels, valid, config, 0.3)[0], logits)
    step = 1e-6 * torch.randn_like(logits)
    with torch.no_grad():
        ahead, behind = (expression_loss(logits + sign * step, labels, valid, config, 0.3)[0] for sign in (1, -1))
    torch.testing.assert_close((found * step).sum(), (ahead - behind) / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_gradient_past_the_weights_takes_them_for_constants(level: str) -> None:
    """The gradient is that of cross-entropy, unit by unit, times the unit's factor."""
    naw = LossConfig.model_validate({"level": level, "weights_carry_gradient": False})
    plain = LossConfig.model_validate({"level": level, "weighting": "none"})
    logits, labels, valid = random_batch(1)
    logits.requires_grad_()
    (found,) = torch.autograd.grad(expression_loss(logits, labels, valid, naw, 0.3)[0], logits)
    wanted = torch.zeros_like(logits)
    span = 1 if level == "frame" else logits.shape[1]
    for window in range(len(logits)):
        for start in range(0, logits.shape[1], span):
            unit = (slice(window, window + 1), slice(start, start + span))
            entropy, count = expression_loss(logits[unit], labels[unit], valid[unit], plain, 0.3)
            if count:
                factor = expression_loss(logits[unit], labels[unit], valid[unit], naw, 0.3)[0] / entropy
                wanted += factor.detach() * torch.autograd.grad(entropy, logits)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_masked_and_unlabelled_frames_do_not_count(level: str) -> None:
    config = LossConfig.model_validate({"level": level})
    logits, labels, valid = random_batch(2)
    logits.requires_grad_()
    total, _ = expression_loss(logits, labels, valid, config, 0.5)
    (gradient,) = torch.autograd.grad(total, logits)
    silent = ~valid if level == "window" else ~valid | (labels == IGNORE_LABEL)
    assert silent.any()
    assert (gradient[silent] == 0).all()
    changed = torch.where(~valid[:, :, None], logits + 50, logits)
    assert expression_loss(changed, labels, valid, config, 0.5)[0] == total


@pytest.mark.parametrize("level", ["window", "frame"])
def test_sums_add_up_over_parts_of_a_batch(level: str) -> None:
    config = LossConfig.model_validate({"level": level})
    logits, labels, valid = random_batch(3, windows=6)
    total, units = expression_loss(logits, labels, valid, config, 0.5)
    parts = [expression_loss(logits[i : i + 2], labels[i : i + 2], valid[i : i + 2], config, 0.5) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(part for part, _ in parts), total)
    assert sum(int(count) for _, count in parts) == int(units)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_a_batch_without_labels_has_no_loss(level: str) -> None:
    logits, labels, valid = random_batch(4)
    logits.requires_grad_()
    config = LossConfig.model_validate({"level": level})
    total, units = expression_loss(logits, torch.full_like(labels, IGNORE_LABEL), valid, config, 0.5)
    assert (float(total.detach()), int(units)) == (0.0, 0)
    total.backward()
    assert (logits.grad == 0).all()


def test_a_class_that_no_frame_expects_has_a_finite_loss() -> None:
    logits = torch.tensor([[[200.0, 0.0], [200.0, 0.0]]])
    log_p = window_log_probabilities(logits, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(log_p, torch.tensor([[0.0, -200.0]]))


def test_label_smoothing_equals_torch() -> None:
    config = LossConfig.model_validate({"level": "frame", "weighting": "none", "label_smoothing": 0.1})
    logits, labels, valid = random_batch(5)
    total, units = expression_loss(logits, labels, valid, config, 0.0)
    targets = labels.masked_fill(~valid, IGNORE_LABEL).flatten()
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets, ignore_index=IGNORE_LABEL, label_smoothing=0.1
    )
    torch.testing.assert_close(total / units, wanted)
