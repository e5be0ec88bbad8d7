"""Class bias and unit thresholds equal brute force; what is decided stays in the probabilities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from vnaw_pipeline.config import PredictConfig, SmoothConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.bias import BIAS_GRID, apply_bias, best_bias, macro_f1_over_grid
from vnaw_pipeline.prediction.finish import finish_video
from vnaw_pipeline.prediction.smooth import fill_gaps, smooth
from vnaw_pipeline.prediction.thresholds import apply_thresholds, best_thresholds

several = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 100_000)


def biased_classes(seed: int, num_frames: int = 300, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Labels of even classes, and probabilities that lean towards the first classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_frames)
    logits = generator.normal(size=(num_frames, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    logits += np.linspace(1.5, 0, num_classes)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p.astype(np.float32), labels


def macro_f1(p: np.ndarray, labels: np.ndarray) -> float:
    return expression_scores(labels, p.argmax(axis=1).astype(np.int64), p.shape[1]).macro_f1


@several
@given(seeds, st.lists(st.sampled_from([-1.3, 0.0, 0.4]), min_size=4, max_size=4), st.integers(0, 3), st.booleans())
def test_the_scores_over_the_grid_equal_trying_every_value(
    seed: int, bias: list[float], column: int, draws: bool
) -> None:
    """Also where many probabilities are equal or 0, so that arg max has to choose among draws.

    The reference decides in logarithms rounded to nine decimals, as the function compares them.
    """
    p, labels = biased_classes(seed, 60)
    if draws:
        p = np.round(p * 4).astype(np.float32) + np.float32(0.25) * (np.round(p * 4).sum(axis=1, keepdims=True) == 0)
    with np.errstate(divide="ignore"):
        own = np.log(p.astype(np.float64))
    found = macro_f1_over_grid((own + bias).T, own[:, column], labels, column)
    for value, score in zip(BIAS_GRID, found, strict=True):
        tried = np.array(bias)
        tried[column] = value
        wanted = f1_score(
            labels, np.round(own + tried, 9).argmax(axis=1), labels=range(4), average="macro", zero_division=0
        )
        assert score == pytest.approx(wanted, abs=1e-12)


@several
@given(seeds)
def test_tuned_bias_never_scores_less_and_no_single_change_helps(seed: int) -> None:
    p, labels = biased_classes(seed)
    bias = best_bias(p, labels)
    tuned = macro_f1(apply_bias(p, bias), labels)
    assert tuned >= macro_f1(p, labels)
    assert np.isin(bias, BIAS_GRID).all()
    for column in range(4):
        for value in BIAS_GRID[::6]:
            other = bias.copy()
            other[column] = value
            assert macro_f1(apply_bias(p, other), labels) <= tuned + 1e-12
    np.testing.assert_array_equal(best_bias(p, labels), bias)


def test_tuned_bias_helps_classes_that_are_named_too_rarely() -> None:
    p, labels = biased_classes(3, 4_000)
    bias = best_bias(p, labels)
    assert (np.diff(bias) > 0).all(), "the logits leant towards the first classes; the bias takes that back"
    assert macro_f1(apply_bias(p, bias), labels) > macro_f1(p, labels) + 0.03


@several
@given(seeds)
def test_bias_equals_softmax_of_shifted_logits(seed: int) -> None:
    p, _ = biased_classes(seed, 20)
    bias = np.random.default_rng(seed).normal(size=4)
    shifted = np.exp(np.log(p.astype(np.float64)) + bias)
    np.testing.assert_allclose(apply_bias(p, bias), shifted / shifted.sum(axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(apply_bias(p, np.full(4, 0.7)), p, rtol=1e-6)  # the same for all is none


def test_a_class_that_is_never_named_or_labelled_is_no_trouble() -> None:
    p = np.array([[1, 0, 0], [0.6, 0.4, 0], [0.55, 0.45, 0]], np.float32)
    labels = np.array([0, 1, 1])
    bias = best_bias(p, labels)
    assert macro_f1(apply_bias(p, bias), labels) == pytest.approx(2 / 3)


def units(seed: int, num_frames: int, coarse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, 3), of few distinct values if `coarse`; labels with -1; the last unit is never shown."""
    generator = np.random.default_rng(seed)
    p = generator.random((num_frames, 3))
    labels = (generator.random((num_frames, 3)) < p**2).astype(np.int8)
    labels[generator.random((num_frames, 3)) < 0.1] = -1
    labels[:, 2] = np.minimum(labels[:, 2], 0)
    return (np.round(p * 5) / 5 if coarse else p).astype(np.float32), labels


def unit_f1(shown: np.ndarray, labels: np.ndarray) -> float:
    return float(f1_score(labels[labels >= 0], shown[labels >= 0], zero_division=0))


@several
@given(seeds, st.integers(1, 40), st.booleans())
def test_thresholds_equal_trying_every_cut(seed: int, num_frames: int, coarse: bool) -> None:
    p, labels = units(seed, num_frames, coarse)
    thresholds = best_thresholds(p, labels)
    assert ((thresholds > 0) & (thresholds < 1)).all()
    for column in range(3):
        used = labels[:, column] >= 0
        if not used.any():
            assert thresholds[column] == 0.5
            continue
        values = np.unique([*p[used, column].astype(np.float64), 0.0, 1.0])
        cuts = [*((values[1:] + values[:-1]) / 2), 0.5]
        best = max(unit_f1(p[:, column] >= cut, labels[:, column]) for cut in cuts)
        found = unit_f1(p[:, column] >= thresholds[column], labels[:, column])
        assert found == pytest.approx(best, abs=1e-12)
        if unit_f1(p[:, column] >= 0.5, labels[:, column]) == pytest.approx(best, abs=1e-12):
            assert thresholds[column] == 0.5
    assert thresholds[2] == 0.5, "a unit that is never shown has nothing to tune on"


@several
@given(seeds, st.integers(1, 40))
def test_half_decides_in_the_table_as_the_threshold_did(seed: int, num_frames: int) -> None:
    """Exactly, also for float32 neighbours of the threshold."""
    p, labels = units(seed, num_frames, coarse=False)
    thresholds = np.array([0.5, 0.017, float(best_thresholds(p, labels)[0])])
    p[0] = np.nextafter(thresholds.astype(np.float32), np.float32(0))
    if num_frames > 2:
        p[1], p[2] = 0, 1
    shifted = apply_thresholds(p, thresholds)
    np.testing.assert_array_equal(shifted >= 0.5, p >= thresholds)
    assert ((shifted >= 0) & (shifted <= 1)).all()
    order = np.argsort(p[:, 1], kind="stable")
    assert (np.diff(shifted[order, 1]) >= 0).all()
    np.testing.assert_array_equal(apply_thresholds(p, [0.5] * 3), p)


def test_a_video_is_finished_in_order() -> None:
    """Gaps, then smoothing, then the decision; each key of the config that its task knows changes the result."""
    generator = np.random.default_rng(0)
    raw = generator.dirichlet(np.ones(3), 30).astype(np.float32)
    valid = generator.random(30) < 0.7
    prior = np.full(3, 1 / 3, np.float32)
    smoothing = SmoothConfig(kind="mean", half_width=2)
    bias = (0.0, 0.5, -0.2)
    found = finish_video(raw, valid, prior, PredictConfig(smooth=smoothing, bias=bias, thresholds=(0.1,)), "classes")
    wanted = apply_bias(smooth(fill_gaps(raw, valid, prior), smoothing, "classes"), bias)
    np.testing.assert_array_equal(found, wanted)
    thresholds = (0.2, 0.5, 0.9)
    found = finish_video(raw, valid, prior, PredictConfig(bias=(1.0,), thresholds=thresholds), "units")
    np.testing.assert_array_equal(found, apply_thresholds(fill_gaps(raw, valid, prior), thresholds))
    np.testing.assert_array_equal(
        finish_video(raw, valid, prior, PredictConfig(bias=(1.0,), thresholds=thresholds), "affect"),
        fill_gaps(raw, valid, prior),
    )
    with pytest.raises(ConfigError, match=r"predict.bias holds 2 numbers; this task has 3 outputs"):
        finish_video(raw, valid, prior, PredictConfig(bias=(0.0, 1.0)), "classes")
    with pytest.raises(ConfigError, match=r"predict.thresholds holds 1 numbers"):
        finish_video(raw, valid, prior, PredictConfig(thresholds=(0.5,)), "units")
