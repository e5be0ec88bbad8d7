"""Scores equal scikit-learn's; smoothing and gap filling equal a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.smooth import fill_gaps, smooth_mean


@given(
    labels=arrays.arrays(np.int64, 50, elements=st.integers(-1, 5)),
    predicted=arrays.arrays(np.int64, 50, elements=st.integers(0, 5)),
)
def test_scores_equal_scikit_learn(labels: np.ndarray, predicted: np.ndarray) -> None:
    """Also for classes that are never labelled or never predicted; unlabelled frames are left out."""
    used = labels != -1
    scores = expression_scores(labels, predicted, 6)
    if not used.any():
        assert (scores.macro_f1, scores.accuracy, scores.num_frames) == (0.0, 0.0, 0)
        return
    classes = range(6)
    f1 = f1_score(labels[used], predicted[used], labels=classes, average=None, zero_division=0)
    np.testing.assert_allclose(scores.f1, f1, rtol=1e-12)
    assert scores.macro_f1 == pytest.approx(f1.mean(), rel=1e-12)
    assert scores.accuracy == pytest.approx(accuracy_score(labels[used], predicted[used]), rel=1e-12)
    assert (scores.confusion == confusion_matrix(labels[used], predicted[used], labels=classes)).all()


@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 1_000))
def test_smoothing_equals_the_mean_written_out(num_frames: int, half_width: int, seed: int) -> None:
    p = np.random.default_rng(seed).random((num_frames, 3)).astype(np.float32)
    wanted = [p[max(0, t - half_width) : t + half_width + 1].mean(axis=0, dtype=np.float64) for t in range(num_frames)]
    np.testing.assert_allclose(smooth_mean(p, half_width), wanted, rtol=1e-5)


@given(st.integers(1, 40), st.integers(0, 1_000))
def test_gaps_are_interpolated_and_valid_frames_untouched(num_frames: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(4), num_frames).astype(np.float32)
    valid = generator.random(num_frames) < 0.6
    prior = np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32)
    filled = fill_gaps(p, valid, prior)
    assert (filled[valid] == p[valid]).all()
    np.testing.assert_allclose(filled.sum(axis=1), 1, rtol=1e-5)
    if not valid.any():
        assert (filled == prior).all()
        return
    known = np.flatnonzero(valid)
    for t in np.flatnonzero(~valid):
        before, after = known[known < t], known[known > t]
        if len(before) == 0:
            wanted = p[after[0]]
        elif len(after) == 0:
            wanted = p[before[-1]]
        else:
            share = (t - before[-1]) / (after[0] - before[-1])
            wanted = (1 - share) * p[before[-1]] + share * p[after[0]]
        np.testing.assert_allclose(filled[t], wanted, rtol=1e-4, atol=1e-6)
