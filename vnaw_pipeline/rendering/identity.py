"""People: what of a drawn face stays the same through a video."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
"""RGB, each 0..255."""

_SKIN: tuple[Colour, ...] = (
    (240, 208, 182),
    (232, 190, 158),
    (222, 172, 136),
    (198, 142, 106),
    (172, 120, 88),
    (140, 96, 70),
)
_HAIR: tuple[Colour, ...] = (
    (28, 22, 20),
    (58, 38, 26),
    (104, 68, 40),
    (140, 104, 62),
    (118, 114, 110),
    (112, 54, 32),
)
_IRIS: tuple[Colour, ...] = ((64, 42, 26), (92, 62, 34), (70, 96, 72), (82, 116, 148), (48, 48, 50))
_FRAMES: tuple[Colour, ...] = ((24, 24, 26), (96, 62, 34), (120, 120, 128), (120, 30, 36))


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One person. Lengths in pixels of the 112 px crop, `*_scale` relative to an average face.

    `resting_units` (12,) is what the face shows at rest in the order of ACTION_UNITS, at most 0.1: some people look
    stern or amused without expressing anything. `expressiveness` multiplies every expression they make.
    """

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    half_width: float
    top: float
    chin: float
    jaw_squareness: float
    eye_distance: float
    eye_y: float
    eye_scale: float
    eye_tilt: float
    brow_gap: float
    brow_thickness: float
    brow_tilt: float
    brow_arch: float
    nose_length: float
    nose_scale: float
    mouth_y: float
    mouth_scale: float
    lip_fullness: float
    hairline: float
    long_hair: bool
    parting: float
    glasses: Colour | None
    beard: float
    expressiveness: float
    resting_units: NDArray[np.float64]


def sample_identity(generator: np.random.Generator) -> Identity:
    """Draw a person. Traits are independent, so no trait tells anything about an expression."""

    def spread(low: float, high: float) -> float:
        return float(generator.uniform(low, high))

    skin = _varied(generator, _SKIN, 8)
    glasses = _varied(generator, _FRAMES, 4) if generator.random() < 0.25 else None
    long_hair = bool(generator.random() < 0.4)
    beard = spread(0.25, 0.8) if not long_hair and generator.random() < 0.4 else 0.0
    return Identity(
        skin=skin,
        hair=_varied(generator, _HAIR, 8),
        iris=_varied(generator, _IRIS, 6),
        lips=_lip_colour(skin, spread(0.25, 0.6)),
        half_width=spread(38.0, 44.0),
        top=spread(44.0, 50.0),
        chin=spread(45.0, 50.0),
        jaw_squareness=spread(2.0, 2.9),
        eye_distance=spread(17.0, 20.5),
        eye_y=spread(-10.5, -9.5),
        eye_scale=spread(0.9, 1.1),
        eye_tilt=spread(-1.2, 1.2),
        brow_gap=spread(10.5, 11.5),
        brow_thickness=spread(1.3, 2.9),
        brow_tilt=spread(-0.5, 0.5),
        brow_arch=spread(0.5, 2.5),
        nose_length=spread(16.0, 21.0),
        nose_scale=spread(0.8, 1.25),
        mouth_y=spread(25.5, 27.0),
        mouth_scale=spread(0.92, 1.08),
        lip_fullness=spread(0.75, 1.35),
        hairline=spread(-40.0, -30.0),
        long_hair=long_hair,
        parting=spread(-0.9, 0.9),
        glasses=glasses,
        beard=beard,
        expressiveness=spread(0.9, 1.15),
        resting_units=generator.uniform(0.0, 0.1, 12) * (generator.random(12) < 0.3),
    )


def _varied(generator: np.random.Generator, palette: tuple[Colour, ...], amount: int) -> Colour:
    base = np.array(palette[generator.integers(len(palette))])
    red, green, blue = np.clip(base + generator.integers(-amount, amount + 1, 3), 0, 255)
    return int(red), int(green), int(blue)


def _lip_colour(skin: Colour, redness: float) -> Colour:
    return mix(skin, (158, 52, 58), redness)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours; `share` in [0, 1] is that of the second."""
    return (
        round(first[0] + (second[0] - first[0]) * share),
        round(first[1] + (second[1] - first[1]) * share),
        round(first[2] + (second[2] - first[2]) * share),
    )
