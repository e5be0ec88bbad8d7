"""NAW and the objectives against independent float64 computations, and the laws they must obey.

Tolerances: float64 against float64 differs by rounding only, so 1e-12 relative; float32 losses to 1e-5.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
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


def test_many_units_take_memory_in_proportion() -> None:
    """The N x N form of the public code would need 160 GB for these."""
    count = 200_000
    p = random_probabilities(0, count, 8)
    assert naw_weights(p, torch.arange(count) % 8, 0.5, NAW_PRESETS["nla"]).shape == (count,)


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


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    config: LossConfig,
    progress: float,
    class_weights: np.ndarray | None = None,
    memory: np.ndarray | None = None,
) -> float:
    """The mean loss in plain Python, unit by unit, from Eq. 8 to 12, the public code's mix, and the papers of the
    objectives."""
    losses = []
    for number, (label_row, valid_row) in enumerate(zip(labels.numpy(), valid.numpy(), strict=True)):
        exponentials = np.exp(logits[number].numpy())
        p = exponentials / exponentials.sum(axis=1, keepdims=True)
        known = [i for i in range(len(p)) if valid_row[i] and label_row[i] != IGNORE_LABEL]
        if not known:
            continue
        units = []
        if config.level == "frame":
            units = [(p[i], label_row[i], None if memory is None else memory[number, i]) for i in known]
        else:
            counts = {c: sum(label_row[i] == c for i in known) for c in range(p.shape[1])}
            centre = (len(p) - 1) / 2
            nearest = {c: min((abs(i - centre) for i in known if label_row[i] == c), default=99) for c in counts}
            label = min(counts, key=lambda c: (-counts[c], nearest[c], c))
            past = None if memory is None else memory[number][valid_row].mean(axis=0)
            units = [(p[valid_row].mean(axis=0), label, past)]
        for mean, label, past in units:
            target = np.full(len(mean), config.label_smoothing / len(mean))
            target[label] += 1 - config.label_smoothing
            loss = reference_objective(mean, target, config)
            if config.objective == "elr":
                loss += config.elr_weight * math.log(1 - mean @ past)
            if class_weights is not None:
                loss *= target @ class_weights
            if config.weighting == "naw" and progress >= config.naw_from:
                w = reference_weight(mean, label, progress, config.preset)
                loss *= 1 + w if config.mix == "one-plus" else config.lam_a + (1 - config.lam_a) * w
            losses.append(loss)
    return sum(losses) / len(losses)


def reference_objective(p: np.ndarray, target: np.ndarray, config: LossConfig) -> float:
    terms = range(len(p))
    if config.objective == "focal":
        return -sum(0.25 * target[k] * (1 - p[k]) ** config.focal_gamma * math.log(p[k]) for k in terms)
    if config.objective == "gce":
        return sum(target[k] * (1 - p[k] ** config.gce_q) / config.gce_q for k in terms)
    if config.objective == "bootstrap":
        target = config.bootstrap_beta * target + (1 - config.bootstrap_beta) * p
    return -sum(target[k] * math.log(p[k]) for k in terms)


OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"preset": "public-code"},
    {"mix": "lam"},
    {"mix": "lam", "lam_a": 0.1, "preset": "public-code"},
    {"naw_from": 0.2},
    {"naw_from": 0.5},
    {"label_smoothing": 0.1},
    {"weighting": "none"},
    {"weighting": "none", "label_smoothing": 0.2},
    {"weighting": "class"},
    {"weighting": "complement", "objective": "focal"},
    {"objective": "focal", "focal_gamma": 0.5, "label_smoothing": 0.1},
    {"objective": "gce", "gce_q": 0.4, "mix": "lam"},
    {"objective": "bootstrap", "bootstrap_beta": 0.8, "label_smoothing": 0.1},
    {"objective": "elr", "elr_weight": 2.0, "label_smoothing": 0.1},
    {"objective": "elr", "weighting": "none"},
]
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def extras_of(config: LossConfig, seed: int) -> dict[str, Tensor]:
    """What some objectives need beside the batch of `random_batch`."""
    extras = {}
    if config.weighting in ("class", "complement"):
        extras["class_weights"] = CLASS_WEIGHTS
    if config.objective == "elr":
        extras["memory"] = 0.8 * random_probabilities(seed, 5 * 7, 4).view(5, 7, 4)
    return extras


@pytest.mark.parametrize("level", ["window", "frame"])
@pytest.mark.parametrize("values", OBJECTIVES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_the_equations(level: str, values: dict[str, Any], seed: int) -> None:
    config = LossConfig.model_validate({"level": level, **values})
    logits, labels, valid = random_batch(seed)
    extras = extras_of(config, seed)
    total, units = expression_loss(logits, labels, valid, config, 0.3, **extras)
    arrays = {name: value.numpy() for name, value in extras.items()}
    wanted = reference_loss(logits, labels, valid, config, 0.3, **arrays)
    assert float(total / units) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("level", ["window", "frame"])
@pytest.mark.parametrize("values", OBJECTIVES, ids=str)
def test_gradient_equals_that_of_the_equations(level: str, values: dict[str, Any]) -> None:
    """Central differences of the reference along random directions, with their error of about 1e-8.

    The gradient is let through NAW's weights, as a difference cannot hold them still (that is another test),
    and bootstrapping, whose target has none of its own, is left to its own test.
    """
    config = LossConfig.model_validate({"level": level, "weights_carry_gradient": True, **values})
    if config.objective == "bootstrap":
        config = config.model_copy(update={"bootstrap_beta": 1.0})
    logits, labels, valid = random_batch(1)
    extras = extras_of(config, 1)
    arrays = {name: value.numpy() for name, value in extras.items()}
    logits.requires_grad_()
    total, units = expression_loss(logits, labels, valid, config, 0.3, **extras)
    (found,) = torch.autograd.grad(total / units, logits)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        step = 1e-5 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        ahead, behind = (
            reference_loss(logits.detach() + sign * step, labels, valid, config, 0.3, **arrays) for sign in (1, -1)
        )
        assert float((found * step).sum()) == pytest.approx((ahead - behind) / 2, rel=1e-5, abs=1e-12)


def test_bootstrapped_targets_carry_no_gradient() -> None:
    """By the logits it is p minus the mixed target, unit by unit."""
    config = LossConfig(level="frame", weighting="none", objective="bootstrap", bootstrap_beta=0.7)
    logits, labels, _ = random_batch(2)
    labels = labels.clamp(min=0)
    logits.requires_grad_()
    total, _ = expression_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), config, 0.0)
    (found,) = torch.autograd.grad(total, logits)
    p = logits.detach().softmax(dim=2)
    target = 0.7 * torch.nn.functional.one_hot(labels, 4).double() + 0.3 * p
    torch.testing.assert_close(found, p - target, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_gradient_past_the_weights_takes_them_for_constants(level: str) -> None:
    """The gradient is that of cross-entropy, unit by unit, times the unit's factor."""
    naw = LossConfig.model_validate({"level": level})  # off by default; the public code has it on
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
@pytest.mark.parametrize("values", OBJECTIVES, ids=str)
def test_masked_and_unlabelled_frames_do_not_count(level: str, values: dict[str, Any]) -> None:
    config = LossConfig.model_validate({"level": level, **values})
    logits, labels, valid = random_batch(2)
    extras = extras_of(config, 2)
    logits.requires_grad_()
    total, _ = expression_loss(logits, labels, valid, config, 0.5, **extras)
    (gradient,) = torch.autograd.grad(total, logits)
    silent = ~valid if level == "window" else ~valid | (labels == IGNORE_LABEL)
    assert silent.any()
    assert (gradient[silent] == 0).all()
    assert (gradient[~silent] != 0).any()
    changed = torch.where(~valid[:, :, None], logits + 50, logits)
    relabelled = torch.where(valid, labels, 1)
    if "memory" in extras:
        extras["memory"] = torch.where(valid[:, :, None], extras["memory"], 0.9)
    assert expression_loss(changed, relabelled, valid, config, 0.5, **extras)[0] == total


@pytest.mark.parametrize("level", ["window", "frame"])
def test_unlabelled_frames_are_no_class(level: str) -> None:
    """The public code counts -1 as class 7, 'Other': frames without a label would vote for it and be learnt as it."""
    config = LossConfig.model_validate({"level": level})
    logits, labels, valid = random_batch(6, classes=8)
    labels[:, 2:] = IGNORE_LABEL
    labels[:, 0], labels[:, 1], valid[:, :2] = 3, IGNORE_LABEL, True
    total, units = expression_loss(logits, labels, valid, config, 0.5)
    assert int(units) == len(logits)
    as_other = torch.where(labels == IGNORE_LABEL, 7, labels)
    assert abs(float(expression_loss(logits, as_other, valid, config, 0.5)[0]) - float(total)) > 0.1
    assert float(total / units) == pytest.approx(reference_loss(logits, labels, valid, config, 0.5), rel=1e-12)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_progress_is_all_that_tilts_the_weights(level: str) -> None:
    """No state between batches: the public code keeps the tilt in a loss module that it rebuilds for each batch."""
    config = LossConfig.model_validate({"level": level})
    batch = random_batch(7, windows=20)
    before, late, after = (float(expression_loss(*batch, config, progress)[0]) for progress in (0.0, 1.0, 0.0))
    assert before == after
    assert before != pytest.approx(late, rel=1e-4)


@pytest.mark.parametrize("level", ["window", "frame"])
@pytest.mark.parametrize("values", OBJECTIVES, ids=str)
def test_one_unit_alone_costs_what_it_costs_among_others(level: str, values: dict[str, Any]) -> None:
    """So sums over the parts of a batch add up to those of the batch."""
    config = LossConfig.model_validate({"level": level, **values})
    logits, labels, valid = random_batch(8)
    labels[:, 3], valid[:, 3] = 2, True
    labels[:, :3], labels[:, 4:] = IGNORE_LABEL, IGNORE_LABEL  # one labelled frame each: a window is a unit either way
    extras = extras_of(config, 8)
    total, units = expression_loss(logits, labels, valid, config, 0.5, **extras)
    assert int(units) == 5
    parts = [
        expression_loss(
            *(x[i : i + 1] for x in (logits, labels, valid)),
            config,
            0.5,
            **{name: x[i : i + 1] if name == "memory" else x for name, x in extras.items()},
        )
        for i in range(5)
    ]
    assert all(int(count) == 1 for _, count in parts)
    torch.testing.assert_close(sum(part for part, _ in parts), total)


def view_divergence(
    logits: torch.Tensor, mirrored: torch.Tensor, valid: torch.Tensor, level: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `consistency` 1 adds to the loss of fully labelled windows, and the number of units."""
    labels = torch.zeros_like(valid, dtype=torch.int64)
    without, with_it = (LossConfig(level=level, weighting="none", consistency=lam) for lam in (0, 1))  # type: ignore[arg-type]
    alone, units = expression_loss(logits, labels, valid, without, 0.5)
    return expression_loss(logits, labels, valid, with_it, 0.5, mirrored_logits=mirrored)[0] - alone, units


@pytest.mark.parametrize("level", ["window", "frame"])
@given(seed=st.integers(0, 10_000))
def test_two_views_diverge_by_scipys_measure_within_its_bounds(level: str, seed: int) -> None:
    """scipy returns the square root of the divergence. The public code's is not one: neither symmetric nor bounded."""
    (logits, _, valid), (mirrored, _, _) = random_batch(seed), random_batch(seed + 1)
    total, units = view_divergence(logits, mirrored, valid, level)
    p, q = logits.softmax(dim=2).numpy(), mirrored.softmax(dim=2).numpy()
    if level == "window":
        seen = [i for i in range(len(p)) if valid[i].any()]
        p, q = (np.stack([x[i][valid[i].numpy()].mean(axis=0) for i in seen]) for x in (p, q))
    else:
        p, q = p[valid.numpy()], q[valid.numpy()]
    assert int(units) == len(p)
    assert float(total) == pytest.approx((jensenshannon(p, q, axis=1) ** 2).sum(), rel=1e-9)
    assert 0 < float(total) < math.log(2) * int(units)
    assert float(view_divergence(mirrored, logits, valid, level)[0]) == pytest.approx(float(total), rel=1e-12)
    assert float(view_divergence(logits, logits, valid, level)[0]) == pytest.approx(0, abs=1e-12)
    changed = torch.where(valid[:, :, None], mirrored, 50.0)
    assert float(view_divergence(logits, changed, valid, level)[0]) == pytest.approx(float(total), rel=1e-12)


@pytest.mark.parametrize("level", ["window", "frame"])
def test_views_that_share_nothing_diverge_by_log_2_and_none_by_nothing(level: str) -> None:
    apart = torch.tensor([[[80.0, 0.0]], [[0.0, 80.0]]]).bfloat16()
    valid = torch.tensor([[True], [False]])
    total, units = view_divergence(apart, -apart, valid, level)
    torch.testing.assert_close(total, torch.tensor(math.log(2)))
    assert int(units) == 1
    apart.requires_grad_()
    total, units = view_divergence(apart, apart.detach(), torch.zeros_like(valid), level)
    total.backward()
    assert (float(total.detach()), int(units)) == (0.0, 0)
    assert (apart.grad == 0).all()


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
