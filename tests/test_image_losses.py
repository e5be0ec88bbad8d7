"""Objectives of single images against independent float64 computations, and the laws they must obey.

Tolerances: float64 against float64 differs by rounding only, so 1e-10 relative.
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

from vnaw_pipeline.config import ImageLossConfig, UnitsLossConfig
from vnaw_pipeline.losses.affect import affect_loss, concordance
from vnaw_pipeline.losses.images import distillation_loss, image_loss
from vnaw_pipeline.losses.objectives import class_weights, focal_loss, jensen_shannon, update_memory
from vnaw_pipeline.losses.units import units_loss

from .test_naw import reference_weight


def random_batch(seed: int, count: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits and targets: votes of ten people in even rows, one label in odd ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    votes = torch.rand(count, classes, generator=generator, dtype=torch.float64) ** 3
    targets = votes / votes.sum(dim=1, keepdim=True)
    targets[1::2] = torch.nn.functional.one_hot(targets[1::2].argmax(dim=1), classes).double()
    return logits, targets


def reference_loss(p: np.ndarray, t: np.ndarray, config: ImageLossConfig, progress: float) -> float:
    """One image, in numpy, from the papers' equations."""
    smoothed = (1 - config.label_smoothing) * t + config.label_smoothing / len(t)
    if config.objective == "gce":
        loss = sum(smoothed[k] * (1 - p[k] ** config.gce_q) / config.gce_q for k in range(len(t)))
    elif config.objective == "focal":
        loss = -sum(0.25 * smoothed[k] * (1 - p[k]) ** config.focal_gamma * math.log(p[k]) for k in range(len(t)))
    elif config.objective == "bootstrap":
        mixed = config.bootstrap_beta * smoothed + (1 - config.bootstrap_beta) * p
        loss = -sum(mixed[k] * math.log(p[k]) for k in range(len(t)))
    else:
        loss = -sum(smoothed[k] * math.log(p[k]) for k in range(len(t)))
    if config.weighting == "naw" and progress >= config.naw_from:
        w = reference_weight(p, int(t.argmax()), progress, config.preset)
        loss *= 1 + w if config.mix == "one-plus" else config.lam_a + (1 - config.lam_a) * w
    return float(loss)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"objective": "gce", "gce_q": 0.4},
    {"objective": "focal", "label_smoothing": 0.1},
    {"objective": "focal", "focal_gamma": 0.5},
    {"objective": "bootstrap", "bootstrap_beta": 0.8},
    {"weighting": "naw"},
    {"weighting": "naw", "lam_a": 0.0, "preset": "public-code"},
    {"weighting": "naw", "naw_from": 0.5},
    {"weighting": "naw", "mix": "one-plus"},
    {"objective": "gce", "weighting": "naw", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_the_loss_equals_the_equations(values: dict[str, Any], progress: float) -> None:
    config = ImageLossConfig.model_validate(values)
    logits, targets = random_batch(0)
    total, count = image_loss(logits, targets, config, progress)
    p = logits.softmax(dim=1).numpy()
    wanted = sum(reference_loss(p[i], targets[i].numpy(), config, progress) for i in range(len(p)))
    assert count == len(p)
    assert total.item() == pytest.approx(wanted, rel=1e-10)


def test_a_transition_asks_for_the_label_and_not_for_the_class() -> None:
    logits, targets = random_batch(8)
    generator = torch.Generator().manual_seed(0)
    transition = torch.rand(5, 5, generator=generator, dtype=torch.float64) + 2 * torch.eye(5)
    transition /= transition.sum(dim=1, keepdim=True)
    config = ImageLossConfig.model_validate({"transition": transition.tolist()})
    total, _ = image_loss(logits, targets, config, 0.0, transition=transition)
    wanted = -(targets * (logits.softmax(dim=1) @ transition).log()).sum()
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=0)
    identity = ImageLossConfig.model_validate({"transition": torch.eye(5).tolist()})
    plain, _ = image_loss(logits, targets, ImageLossConfig(), 0.0)
    total, _ = image_loss(logits, targets, identity, 0.0, transition=torch.eye(5))
    torch.testing.assert_close(total, plain, rtol=1e-3, atol=1e-3)
    for wrong in ([[0.5, 0.6], [0.0, 1.0]], [[1.0], [1.0]], [[1.5, -0.5], [0.0, 1.0]]):
        with pytest.raises(ValueError, match="transition must be a square of shares"):
            ImageLossConfig.model_validate({"transition": wrong})


def test_class_weights_multiply_by_the_targets_share() -> None:
    logits, targets = random_batch(1)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    total, _ = image_loss(logits, targets, ImageLossConfig(weighting="class"), 0.0, class_weights=weights)
    cross = -(targets * logits.log_softmax(dim=1)).sum(dim=1)
    assert total.item() == pytest.approx(float((cross * (targets @ weights)).sum()), rel=1e-10)


def test_class_weights_are_inverse_shares_or_their_complement() -> None:
    mass = torch.tensor([6.0, 3.0, 0.0, 1.0])
    inverse = class_weights(mass, "class")
    assert inverse is not None
    torch.testing.assert_close(inverse * mass, torch.tensor([10 / 3, 10 / 3, 0.0, 10 / 3]))
    complement = class_weights(mass, "complement")
    torch.testing.assert_close(complement, torch.tensor([0.4, 0.7, 1.0, 0.9]))
    assert class_weights(mass, "none") is class_weights(mass, "naw") is None


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_finite_where_the_model_is_certain(gamma: float) -> None:
    """At p = 1 a power below 1 has an infinite slope; without a floor its product with 0 is no number."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    losses = focal_loss(logits.log_softmax(dim=1), targets, gamma)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([0.0, 50.0]))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_early_learning_adds_its_term_and_its_gradient_is_the_papers() -> None:
    """Liu et al. 2020, Lemma 2: the gradient by the logits is p - y + lambda * g, with
    g_k = p_k / (1 - <p, t>) * sum_j (t_j - t_k) p_j."""
    logits, targets = random_batch(2)
    logits.requires_grad_()
    memory, _ = random_batch(3)
    memory = memory.softmax(dim=1) * 0.7
    total, _ = image_loss(logits, targets, ImageLossConfig(objective="elr", elr_weight=2.0), 0.0, memory=memory)
    (gradient,) = torch.autograd.grad(total, logits)
    p = logits.detach().softmax(dim=1)
    agreement = (p * memory).sum(dim=1, keepdim=True)
    g = p / (1 - agreement) * (agreement - memory)
    torch.testing.assert_close(gradient, p - targets + 2.0 * g, rtol=1e-9, atol=1e-12)


def test_memory_is_a_moving_average_of_its_own_rows() -> None:
    logits, _ = random_batch(4, count=2)
    memory = torch.zeros(6, 5)
    rows = update_memory(memory, torch.tensor([4, 1]), logits)
    torch.testing.assert_close(rows, 0.3 * logits.softmax(dim=1).float(), rtol=0, atol=1e-4)
    assert torch.equal(memory[[4, 1]], rows)
    assert (memory[[0, 2, 3, 5]] == 0).all()
    again = update_memory(memory, torch.tensor([4, 1]), logits)
    torch.testing.assert_close(again, 1.7 * rows)


def test_a_row_that_is_there_twice_moves_once_towards_its_mean() -> None:
    logits, _ = random_batch(4, count=3)
    memory = torch.full((6, 5), 0.2)
    rows = update_memory(memory, torch.tensor([4, 1, 4]), logits)
    p = logits.softmax(dim=1).float()
    torch.testing.assert_close(memory[4], 0.7 * 0.2 + 0.3 * (p[0] + p[2]) / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(memory[1], 0.7 * 0.2 + 0.3 * p[1], rtol=0, atol=1e-4)
    assert torch.equal(rows, memory[[4, 1, 4]])


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_images_without_a_target_change_nothing_and_order_does_not_matter(seed: int, count: int) -> None:
    config = ImageLossConfig(weighting="naw", label_smoothing=0.1)
    logits, targets = random_batch(seed, count)
    logits.requires_grad_()
    total, units = image_loss(logits, targets, config, 0.5)
    padded = torch.cat([logits, logits.detach()]).detach().requires_grad_()
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))
    with_blank, with_blank_units = image_loss(
        padded[order], torch.cat([targets, torch.zeros_like(targets)])[order], config, 0.5
    )
    torch.testing.assert_close(with_blank, total)
    assert with_blank_units == units == count
    (gradient,) = torch.autograd.grad(with_blank, padded)
    assert (gradient[count:] == 0).all()


def test_without_any_target_the_loss_is_zero_with_a_gradient() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    total, count = image_loss(logits, torch.zeros(3, 5), ImageLossConfig(weighting="naw"), 0.5)
    total.backward()
    assert total.item() == 0
    assert count == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_the_gradient_flows_through_the_weights_only_if_asked() -> None:
    logits, targets = random_batch(5)
    logits.requires_grad_()
    gradients = []
    for carried in (False, True):
        config = ImageLossConfig(weighting="naw", weights_carry_gradient=carried)
        total, _ = image_loss(logits, targets, config, 0.5)
        gradients.append(torch.autograd.grad(total, logits)[0])
    assert not torch.allclose(*gradients)
    weights = torch.tensor(
        [
            0.5 + 0.5 * reference_weight(p.numpy(), int(t.argmax()), 0.5, "nla")
            for p, t in zip(logits.detach().softmax(dim=1), targets, strict=True)
        ],
        dtype=torch.float64,
    )
    detached = weights[:, None] * (logits.detach().softmax(dim=1) - targets)
    torch.testing.assert_close(gradients[0], detached, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10_000))
def test_divergence_is_scipys_and_obeys_its_bounds(seed: int) -> None:
    """scipy returns the square root of the divergence. The public code's is not symmetric, and not bounded."""
    logits, _ = random_batch(seed)
    other, _ = random_batch(seed + 1)
    found = jensen_shannon(logits, other)
    wanted = jensenshannon(logits.softmax(dim=1).numpy(), other.softmax(dim=1).numpy(), axis=1) ** 2
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found, jensen_shannon(other, logits))
    assert ((found >= 0) & (found <= math.log(2) + 1e-12)).all()
    torch.testing.assert_close(jensen_shannon(logits, logits), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-12)
    apart = jensen_shannon(torch.tensor([[80.0, 0.0]]), torch.tensor([[0.0, 80.0]]))
    torch.testing.assert_close(apart, torch.tensor([math.log(2)]))


def test_distillation_is_zero_for_the_teacher_itself_and_else_its_divergence() -> None:
    student, _ = random_batch(6)
    teacher, _ = random_batch(7)
    assert (distillation_loss(teacher, teacher, 3.0).abs() < 1e-6).all()
    p, q = ((x / 3).softmax(dim=1).float() for x in (teacher, student))
    wanted = 9 * (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), wanted, rtol=1e-4, atol=1e-6)


def test_concordance_is_lins() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50, 2))
    y = 0.5 * x + 0.3 + 0.4 * y
    wanted = [
        2 * np.cov(x[:, c], y[:, c], bias=True)[0, 1]
        / (x[:, c].var() + y[:, c].var() + (x[:, c].mean() - y[:, c].mean()) ** 2)
        for c in range(2)
    ]  # fmt: skip
    predicted, truth, used = torch.from_numpy(x), torch.from_numpy(y), torch.ones(50, dtype=torch.bool)
    np.testing.assert_allclose(concordance(predicted, truth, used).numpy(), wanted, rtol=1e-10)
    torch.testing.assert_close(concordance(predicted, predicted, used), torch.ones(2).double())
    assert (concordance(torch.zeros(50, 2), torch.zeros(50, 2), used) == 0).all()
    used[30:] = False
    torch.testing.assert_close(
        concordance(predicted, truth, used), concordance(predicted[:30], truth[:30], used[:30]), rtol=1e-12, atol=0
    )


def test_affect_and_unit_losses_leave_out_what_is_not_annotated() -> None:
    predicted = torch.tensor([[0.1, 0.2], [0.5, -0.5], [0.9, 0.9]], requires_grad=True)
    truth = torch.tensor([[0.2, 0.1], [0.4, -0.6], [torch.nan, 0.0]])
    loss = affect_loss(predicted, truth)
    wanted = (1 - concordance(predicted[:2], truth[:2], torch.tensor([True, True]))).mean() + 0.1
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert predicted.grad is not None
    assert (predicted.grad[2] == 0).all()
    assert affect_loss(predicted, torch.full((3, 2), torch.nan)).item() == 0
    predicted.grad = None
    affect_loss(predicted, torch.full((3, 2), torch.nan)).backward()
    assert (predicted.grad == 0).all()

    logits = torch.tensor([[0.0, 2.0], [-1.0, 9.0]], requires_grad=True)
    units = torch.tensor([[1, 0], [0, -1]], dtype=torch.int8)
    wanted = (math.log(2) + math.log1p(math.exp(2.0)) + math.log1p(math.exp(-1.0))) / 3
    loss, count = units_loss(logits, units, UnitsLossConfig())
    assert loss.item() == pytest.approx(3 * wanted, rel=1e-6)
    assert count == 3
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1, 1] == 0
    assert units_loss(logits, torch.full((2, 2), -1), UnitsLossConfig()) == (0, 0)
