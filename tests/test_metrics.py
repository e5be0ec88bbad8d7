"""Scores equal scikit-learn's; smoothing and gap filling equal a slow reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from vnaw_pipeline.metrics import affect_scores, expression_scores, face_scores, score_predictions, unit_scores
from vnaw_pipeline.prediction.smooth import fill_gaps, smooth_mean
from vnaw_pipeline.tasks import TASKS


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


@given(
    labels=arrays.arrays(np.int64, 30, elements=st.sampled_from([-1, 0, 2, 5])),
    predicted=arrays.arrays(np.int64, 30, elements=st.integers(0, 5)),
)
def test_scores_of_faces_leave_out_classes_that_do_not_occur(labels: np.ndarray, predicted: np.ndarray) -> None:
    """The mean over the labelled classes of scikit-learn's F1; nothing else differs from `expression_scores`."""
    used = labels != -1
    scores, challenge = face_scores(labels, predicted, 6), expression_scores(labels, predicted, 6)
    occurring = np.unique(labels[used])
    assert scores.num_classes == len(occurring)
    assert (scores.accuracy, scores.num_frames) == (challenge.accuracy, challenge.num_frames)
    np.testing.assert_array_equal(scores.f1, challenge.f1)
    wanted = (
        f1_score(labels[used], predicted[used], labels=occurring, average="macro", zero_division=0) if used.any() else 0
    )
    assert scores.macro_f1 == pytest.approx(wanted, rel=1e-12)


@given(st.integers(2, 60), st.integers(0, 1_000), st.floats(-1, 1))
def test_concordance_equals_lins_from_correlation(num_frames: int, seed: int, offset: float) -> None:
    """rho_c = 2 r s_x s_y / (s_x^2 + s_y^2 + (m_x - m_y)^2), r by np.corrcoef; over all frames at once, and 10 % of
    them not annotated. Float64 twice, so they differ by rounding alone."""
    generator = np.random.default_rng(seed)
    labels = generator.uniform(-1, 1, (num_frames, 2)).astype(np.float32)
    labels[generator.random(num_frames) < 0.1] = np.nan
    labels[:2] = [[0.5, -0.5], [-0.5, 0.5]]
    predicted = (0.5 * np.nan_to_num(labels) + offset + generator.normal(0, 0.3, labels.shape)).astype(np.float32)
    used = ~np.isnan(labels[:, 0])
    wanted = []
    for x, y in zip(labels[used].astype(np.float64).T, predicted[used].astype(np.float64).T, strict=True):
        r = np.corrcoef(x, y)[0, 1]
        wanted.append(2 * r * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2))
    scores = affect_scores(labels, predicted)
    np.testing.assert_allclose(scores.ccc, wanted, rtol=1e-9, atol=1e-12)
    assert scores.mean_ccc == pytest.approx(np.mean(wanted), rel=1e-9, abs=1e-12)
    assert scores.num_frames == used.sum()


def test_concordance_at_its_corners() -> None:
    x = np.array([[0.1, 0.3], [0.5, 0.3], [-0.2, 0.3]], dtype=np.float32)
    assert affect_scores(x, x).ccc.tolist() == [1.0, 0.0], "what never varies agrees with nothing"
    assert affect_scores(x, -x).ccc[0] < 0
    assert affect_scores(x[:1], x[:1]).mean_ccc == 0
    assert affect_scores(np.full((3, 2), np.nan, np.float32), x) .figures == {
        "mean_ccc": 0.0, "ccc_valence": 0.0, "ccc_arousal": 0.0
    }  # fmt: skip


@given(
    labels=arrays.arrays(np.int8, (30, 12), elements=st.integers(-1, 1)),
    present=arrays.arrays(np.bool_, (30, 12)),
)
def test_unit_scores_equal_scikit_learn(labels: np.ndarray, present: np.ndarray) -> None:
    """Unit by unit, over the frames where that unit is annotated."""
    scores = unit_scores(labels, present)
    wanted = []
    for truth, predicted in zip(labels.T, present.T, strict=True):
        used = truth != -1
        wanted.append(f1_score(truth[used], predicted[used], zero_division=0) if used.any() else 0.0)
    np.testing.assert_allclose(scores.f1, wanted, rtol=1e-12)
    assert scores.mean_au_f1 == pytest.approx(np.mean(wanted), rel=1e-12)
    assert scores.num_frames == (labels != -1).any(axis=1).sum()


def test_units_are_shown_from_a_half_on() -> None:
    labels = np.ones((4, 12), np.int8)
    labels[:, 0] = [1, 1, 0, 0]
    predictions = np.full((4, 12), 0.3, np.float32)
    predictions[:, 0] = [0.9, 0.5, 0.4, 0.1]
    at_half = score_predictions(TASKS["au"], labels, predictions)
    assert at_half.f1.tolist() == [1.0, *[0.0] * 11]


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
