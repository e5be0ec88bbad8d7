"""What the camera does to a drawn face: light, blur, noise and JPEG."""

from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from vnaw_pipeline.rendering.face import CANVAS_PX, CROP_PX, Image

_RAMP = np.linspace(-1.0, 1.0, CROP_PX, dtype=np.float32)
_NOISE_PX = 2 * CROP_PX


class Exposure(NamedTuple):
    """How one frame is taken.

    `gain` multiplies brightness; `slope_x` and `slope_y` add to it at the right and lower edge and take away at the
    other; `defocus` is the deviation of a Gaussian blur and `motion` the length of a horizontal smear, in pixels.
    """

    gain: float
    slope_x: float
    slope_y: float
    defocus: float
    motion: float


def sample_background(generator: np.random.Generator) -> Image:
    """Draw a background of soft greyish patches, (CANVAS_PX, CANVAS_PX, 3) uint8 RGB."""
    tone = generator.uniform(90, 140) + generator.normal(0, 4, 3)
    patches = np.clip(tone + generator.normal(0, 8, (6, 6, 1)) + generator.normal(0, 3, (6, 6, 3)), 0, 255).astype(
        np.uint8
    )
    return np.asarray(cv2.resize(patches, (CANVAS_PX, CANVAS_PX), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def sample_noise(generator: np.random.Generator, deviation: float) -> NDArray[np.float32]:
    """A sheet of sensor noise, from which every frame of a video cuts its own piece."""
    return generator.normal(0.0, deviation, (_NOISE_PX, _NOISE_PX, 3)).astype(np.float32)


def take_picture(face: Image, exposure: Exposure, noise: NDArray[np.float32], corner: tuple[int, int]) -> Image:
    """Light, blur and noise on a drawn face, (112, 112, 3) uint8 RGB.

    `noise` is the sheet of `sample_noise`, `corner` (row, column), each in [0, 112], where this frame's piece begins.
    """
    light = exposure.gain * (1.0 + exposure.slope_x * _RAMP[None, :] + exposure.slope_y * _RAMP[:, None])
    picture: NDArray[np.float32] = face * light.astype(np.float32)[:, :, None]
    if exposure.defocus > 0.3:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), exposure.defocus), dtype=np.float32)
    if exposure.motion >= 2.0:
        picture = np.asarray(cv2.blur(picture, (round(exposure.motion), 1)), dtype=np.float32)
    row, column = corner
    picture = picture + noise[row : row + CROP_PX, column : column + CROP_PX]
    return np.asarray(cv2.convertScaleAbs(np.maximum(picture, 0.0)), dtype=np.uint8)


def encode_picture(picture: Image, quality: int) -> bytes:
    """JPEG bytes of an RGB picture, `quality` in [1, 100]."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=quality))
