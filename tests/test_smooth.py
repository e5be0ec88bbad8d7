"""Smoothing over time equals slow references written frame by frame, and obeys laws on random videos."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vnaw_pipeline.config import SmoothConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.prediction.smooth import (
    smooth,
    smooth_mean,
    smooth_mean_by_time,
    smooth_median,
    smooth_mode,
    smooth_predicting,
)

several = settings(max_examples=40, deadline=None)
videos = st.tuples(st.integers(1, 60), st.integers(0, 10_000))
half_widths = st.integers(0, 65)
"""Also windows longer than the video."""


def video(num_frames: int, seed: int, few_values: bool = False) -> npt.NDArray[np.float32]:
    """Random probabilities (T, 4); with `few_values`, many frames are alike, so that there are draws."""
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.full(4, 0.5), num_frames)
    return (np.eye(4)[p.argmax(axis=1)] * 0.7 + 0.075 if few_values else p).astype(np.float32)


def window(p: npt.NDArray[np.float32], t: int, half_width: int) -> npt.NDArray[np.float64]:
    return np.array([p[k] for k in range(len(p)) if abs(k - t) <= half_width], dtype=np.float64)


@several
@given(videos, half_widths, st.floats(0, 1))
def test_smooth_predicting_equals_the_formula(of: tuple[int, int], half_width: int, share: float) -> None:
    """Tolerance: the result is rounded to float32, as is the mean inside it."""
    p = video(*of)
    wanted = [(1 - share) * p[t] + share * window(p, t, half_width).mean(axis=0) for t in range(len(p))]
    np.testing.assert_allclose(smooth_predicting(p, half_width, share), wanted, rtol=1e-6, atol=1e-7)


@several
@given(videos, half_widths)
def test_smooth_predicting_lies_between_the_frame_and_the_mean(of: tuple[int, int], half_width: int) -> None:
    p = video(*of)
    np.testing.assert_array_equal(smooth_predicting(p, half_width, 0), p)
    np.testing.assert_array_equal(smooth_predicting(p, half_width, 1), smooth_mean(p, half_width))


@several
@given(videos, st.floats(0, 2))
def test_a_mean_by_time_takes_the_frames_that_are_near_in_time(of: tuple[int, int], half_width_s: float) -> None:
    p = video(*of)
    time_s = np.random.default_rng(of[1]).choice([0.04, 0.2, 0.5], len(p)).cumsum()
    near = np.abs(time_s[:, None] - time_s) <= half_width_s + 1e-3
    wanted = [p[chosen].mean(axis=0, dtype=np.float64) for chosen in near]
    np.testing.assert_allclose(smooth_mean_by_time(p, time_s, half_width_s), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(smooth_mean_by_time(p, np.arange(len(p)) / 24, 6 / 24), smooth_mean(p, 6), rtol=1e-6)


@several
@given(videos, half_widths)
def test_medians_equal_numpys_in_every_window(of: tuple[int, int], half_width: int) -> None:
    """Exact for odd windows; the mean of the middle two of an even one is rounded to float32."""
    p = video(*of)
    wanted = [np.median(window(p, t, half_width), axis=0) for t in range(len(p))]
    np.testing.assert_allclose(smooth_median(p, half_width), wanted, rtol=1e-7)


@several
@given(videos, half_widths, st.booleans())
def test_modes_equal_counting(of: tuple[int, int], half_width: int, few_values: bool) -> None:
    p = video(*of, few_values=few_values)
    found = smooth_mode(p, half_width)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    for t in range(len(p)):
        counts = Counter(window(p, t, half_width).argmax(axis=1).tolist())
        most = max(counts.values())
        own = int(p[t].argmax())
        tied = sorted(name for name, count in counts.items() if count == most)
        assert found[t].argmax() == (own if own in tied else tied[0])


def test_a_tie_goes_to_the_frames_own_class_else_to_the_lowest() -> None:
    classes = [2, 1, 1, 2, 0, 3, 3]
    p = np.eye(4, dtype=np.float32)[classes]
    assert smooth_mode(p, 1).argmax(axis=1).tolist() == [2, 1, 1, 2, 0, 3, 3]
    # Frame 4 of class 0 sees 1, 2, 0, 3, 3; frame 2 sees 2, 1, 1, 2, 0: a draw of 1 and 2, and it is of class 1.
    assert smooth_mode(p, 2).argmax(axis=1).tolist() == [1, 1, 1, 1, 3, 3, 3]
    assert smooth_mode(np.eye(4, dtype=np.float32)[[3, 3, 0, 1, 1]], 2)[2].argmax() == 1


CONFIGS = [
    SmoothConfig(),
    SmoothConfig(kind="mean", half_width=4),
    SmoothConfig(kind="median", half_width=4),
    SmoothConfig(kind="mode", half_width=4),
    SmoothConfig(kind="sp", half_width=4, share=0.3),
]


@several
@given(videos, st.sampled_from(CONFIGS))
def test_laws_of_every_filter(of: tuple[int, int], config: SmoothConfig) -> None:
    """Rows stay probabilities, a constant video stays what it says, time reversed gives the result reversed."""
    p = video(*of)
    calm = smooth(p, config, "classes")
    assert calm.shape == p.shape
    assert calm.dtype == np.float32
    assert (calm >= 0).all()
    np.testing.assert_allclose(calm.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(smooth(p[::-1], config, "classes")[::-1], calm, atol=1e-6)
    constant = np.broadcast_to(p[:1], p.shape)
    if config.kind == "mode":
        assert (smooth(constant, config, "classes").argmax(axis=1) == p[0].argmax()).all()
    else:
        np.testing.assert_allclose(smooth(constant, config, "classes"), constant, atol=1e-6)


def test_every_key_of_the_config_changes_the_result() -> None:
    p = video(200, 1)
    results = [smooth(p, config, "classes") for config in CONFIGS]
    results += [smooth(p, SmoothConfig(kind=kind, half_width=5), "classes") for kind in ("mean", "median", "mode")]
    results += [smooth(p, SmoothConfig(kind="sp", half_width=4, share=0.4), "classes")]
    assert len({result.tobytes() for result in results}) == len(results)


def test_classes_whose_medians_are_all_zero_keep_the_mean() -> None:
    p = np.eye(3, dtype=np.float32)[[0, 1, 2]]
    found = smooth(p, SmoothConfig(kind="median", half_width=1), "classes")
    np.testing.assert_allclose(found[1], [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_array_equal(smooth(p, SmoothConfig(kind="median", half_width=1), "units")[1], [0, 0, 0])


def test_a_mode_needs_classes() -> None:
    with pytest.raises(ConfigError, match="a task of affect has none"):
        smooth(video(5, 0), SmoothConfig(kind="mode"), "affect")


@several
@given(videos)
def test_affect_is_not_rescaled(of: tuple[int, int]) -> None:
    """Valence and arousal lie in [-1, 1] and add up to nothing in particular."""
    values = 2 * video(*of)[:, :2] - 1
    found = smooth(values, SmoothConfig(kind="median", half_width=3), "affect")
    np.testing.assert_array_equal(found, smooth_median(values, 3))
