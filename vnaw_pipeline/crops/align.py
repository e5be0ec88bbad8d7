"""Aligned crops: five landmarks onto fixed places, by the best shift, rotation and scale.

The places are ArcFace's for 112 x 112, scaled for larger crops. They cut tightly, from hairline to chin, as
Aff-Wild2's `cropped_aligned` does; so an encoder trained there sees our own videos the same way. What lies
outside the frame is black.
"""

from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.video import Rgb

Points = npt.NDArray[np.floating]
"""(N, 2) x, y in pixels, x to the right, y down."""

ARCFACE_PX = 112
ARCFACE_LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where the eyes, nose tip and mouth corners (left to right in the image) lie in a 112 x 112 crop."""


def similarity_transform(source: Points, target: Points) -> npt.NDArray[np.float64]:
    """The shift, rotation and scale (no mirroring) that bring `source` closest to `target` in the least squares sense.

    In the plane this has a closed form: with points as complex numbers around their means, scale and rotation
    together are one complex factor. It equals Umeyama's solution (1991) without reflection.

    Args:
        source, target: (N, 2) each, N >= 2.

    Returns:
        (2, 3) float64, for `matrix @ (x, y, 1)`.

    Raises:
        ValueError: all source points are the same.
    """
    source_mean, target_mean = source.mean(axis=0, dtype=np.float64), target.mean(axis=0, dtype=np.float64)
    z = (source - source_mean) @ (1, 1j)
    w = (target - target_mean) @ (1, 1j)
    spread = float(np.sum(np.abs(z) ** 2))
    if not spread > 0:
        raise ValueError("A similarity transform needs at least two different source points.")
    factor = np.sum(z.conj() * w) / spread
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([linear, target_mean - linear @ source_mean])


def align_face(rgb: Rgb, landmarks: Points, crop_px: int) -> Rgb:
    """Cut a face out so that its five landmarks lie where ArcFace has them.

    A face much larger than the crop is first drawn at a whole multiple of the size and then averaged down, since
    sampling it directly would alias.

    Args:
        rgb: (H, W, 3) uint8.
        landmarks: (5, 2), eyes, nose tip, mouth corners, left to right in the image, in pixels of `rgb`.
        crop_px: side of the crop.

    Returns:
        (crop_px, crop_px, 3) uint8.
    """
    matrix = similarity_transform(landmarks, ARCFACE_LANDMARKS * (crop_px / ARCFACE_PX))
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    times = max(1, int(1 / scale))
    drawn_px = crop_px * times
    # Pixel centres: the middle of a block of `times` pixels is (times - 1) / 2 past the first one's centre.
    enlarged = matrix * times + np.array([[0, 0, 1], [0, 0, 1]]) * (times - 1) / 2
    drawn = cv2.warpAffine(rgb, enlarged, (drawn_px, drawn_px), flags=cv2.INTER_LINEAR)
    if times > 1:
        drawn = cv2.resize(drawn, (crop_px, crop_px), interpolation=cv2.INTER_AREA)
    return cast(Rgb, drawn)
