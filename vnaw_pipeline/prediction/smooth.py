"""After the model, over time: frames without a face are filled in, and answers are calmed by their neighbours.

`T` frames of one video, `K` columns. A window reaches `half_width` frames to either side and is cut at the ends of the
video.
"""

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.config import SmoothConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.tasks import TaskKind

Probabilities = npt.NDArray[np.float32]


def fill_gaps(
    probabilities: Probabilities, valid: npt.NDArray[np.bool_], without_any: npt.NDArray[np.float32]
) -> Probabilities:
    """Interpolate linearly over frames that are not valid; the ends copy the nearest valid frame; (T, K) -> (T, K).

    A video without any valid frame gets `without_any` (K,), such as the class shares of the training frames.
    """
    if valid.all():
        return probabilities
    if not valid.any():
        return np.broadcast_to(without_any, probabilities.shape).astype(np.float32)
    known = np.flatnonzero(valid)
    gaps = np.flatnonzero(~valid)
    filled = probabilities.copy()
    for column in range(probabilities.shape[1]):
        filled[gaps, column] = np.interp(gaps, known, probabilities[known, column])
    return filled


def smooth(answers: Probabilities, config: SmoothConfig, kind: TaskKind) -> Probabilities:
    """Smooth a video's answers as the config says, (T, K) -> (T, K); class probabilities keep adding up to 1.

    Raises:
        ConfigError: a mode filter for anything but classes.
    """
    match config.kind:
        case "none":
            return answers
        case "mean":
            return smooth_mean(answers, config.half_width)
        case "sp":
            return smooth_predicting(answers, config.half_width, config.share)
        case "median":
            medians = smooth_median(answers, config.half_width)
            return _rescaled(medians, smooth_mean(answers, config.half_width)) if kind == "classes" else medians
        case "mode":
            if kind != "classes":
                raise ConfigError(
                    f"predict.smooth.kind = 'mode' counts classes; a task of {kind} has none. Use median."
                )
            return smooth_mode(answers, config.half_width)


def smooth_mean(answers: Probabilities, half_width: int) -> Probabilities:
    """Mean over the window; (T, K) -> (T, K). From one running sum, so that the width costs nothing."""
    if half_width == 0:
        return answers
    start, stop = _window_bounds(len(answers), half_width)
    means: Probabilities = (_window_sums(answers, start, stop) / (stop - start)[:, None]).astype(np.float32)
    return means


def smooth_mean_by_time(answers: Probabilities, time_s: npt.NDArray[np.float64], half_width_s: float) -> Probabilities:
    """Mean over the frames at most so many seconds away, to a millisecond, by their ascending times (T,); (T, K)."""
    start = np.searchsorted(time_s, time_s - half_width_s - 1e-3, side="left")
    stop = np.searchsorted(time_s, time_s + half_width_s + 1e-3, side="right")
    return np.asarray(_window_sums(answers, start, stop) / (stop - start)[:, None], dtype=np.float32)


def smooth_predicting(answers: Probabilities, half_width: int, share: float) -> Probabilities:
    """What a frame says, mixed with what its neighbourhood says: (1 - share) * p_t + share * the mean over the window.

    The "smooth predicting" of CFC-SP (Xue et al. 2022) weighs unique features of a moment against universal ones of a
    period; its formula was never published, and this is our reading of it.
    """
    mixed = (1 - share) * answers.astype(np.float64) + share * smooth_mean(answers, half_width)
    return mixed.astype(np.float32)


def smooth_median(answers: Probabilities, half_width: int) -> Probabilities:
    """Median over the window, column by column; of an even number of frames, the mean of the middle two; (T, K)."""
    from scipy.ndimage import median_filter  # takes a quarter of a second and 14 MB, which a training needs not

    num_frames = len(answers)
    width = 2 * half_width + 1
    medians = np.empty_like(answers)
    if num_frames >= width:
        for column in range(answers.shape[1]):
            medians[:, column] = median_filter(answers[:, column], size=width)
    for frame in range(num_frames):  # at the ends, where the window is cut
        if frame < half_width or frame >= num_frames - half_width:
            medians[frame] = np.median(answers[max(frame - half_width, 0) : frame + half_width + 1], axis=0)
    return medians


def smooth_mode(probabilities: Probabilities, half_width: int) -> Probabilities:
    """The most frequent class of the window as the most probable one; (T, K) -> (T, K).

    Every frame votes for its arg max, and a row holds each class's share of the votes; so the table stays the source
    of the decision. The frame's own class has half a vote more: it wins a tie, and never against a larger count.
    Without it the lowest of the tied classes wins, as in every arg max here.
    """
    votes = np.eye(probabilities.shape[1])[probabilities.argmax(axis=1)]
    start, stop = _window_bounds(len(probabilities), half_width)
    counts = _window_sums(votes, start, stop) + 0.5 * votes
    shares: Probabilities = (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def _window_bounds(num_frames: int, half_width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First frame and the one after the last of every frame's window, (T,) each."""
    frames = np.arange(num_frames)
    return np.maximum(frames - half_width, 0), np.minimum(frames + half_width + 1, num_frames)


def _window_sums(
    values: npt.NDArray[np.floating], start: npt.NDArray[np.int64], stop: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Sums over each window from one running sum, (T, K)."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(axis=0, dtype=np.float64)])
    return np.asarray(sums[stop] - sums[start])


def _rescaled(medians: Probabilities, means: Probabilities) -> Probabilities:
    """Rows that add up to 1 again; the mean stands where the median of every class is 0."""
    totals = medians.sum(axis=1, keepdims=True)
    return np.where(totals > 0, medians / np.where(totals > 0, totals, 1), means).astype(np.float32)
