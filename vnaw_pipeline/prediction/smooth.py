"""After the model: frames without a face are filled in, and probabilities may be averaged over time.

`T` frames of one video, `K` classes.
"""

import numpy as np
import numpy.typing as npt

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


def smooth_mean(probabilities: Probabilities, half_width: int) -> Probabilities:
    """Mean over `half_width` frames to either side, fewer at the ends of the video; (T, K) -> (T, K)."""
    if half_width == 0:
        return probabilities
    num_frames = len(probabilities)
    sums = np.concatenate([np.zeros((1, probabilities.shape[1])), probabilities.cumsum(axis=0, dtype=np.float64)])
    frames = np.arange(num_frames)
    start, stop = np.maximum(frames - half_width, 0), np.minimum(frames + half_width + 1, num_frames)
    means: Probabilities = ((sums[stop] - sums[start]) / (stop - start)[:, None]).astype(np.float32)
    return means
