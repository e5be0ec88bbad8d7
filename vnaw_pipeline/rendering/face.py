"""One drawn face: the parts that `anatomy` places, painted from back to front.

Coordinates go to OpenCV as fixed-point integers, so equal input gives equal bytes.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vnaw_pipeline.rendering.anatomy import (
    CIRCLE,
    FIXED_POINT,
    SIDES,
    FixedPoints,
    FloatArray,
    Units,
    face_parts,
    fixed_point,
)
from vnaw_pipeline.rendering.identity import Colour, Identity, mix
from vnaw_pipeline.tasks import ACTION_UNITS

Image = NDArray[np.uint8]

CROP_PX = 112
CANVAS_PX = 224
"""Faces are painted at twice the crop's size and averaged down, which smooths their edges."""

_FRACTION_BITS = (FIXED_POINT * CROP_PX // CANVAS_PX).bit_length() - 1
_VISIBLE_DEPTH = 0.06
_WHITE: Colour = (238, 234, 228)
_MOUTH: Colour = (64, 20, 26)
_SHADOW: Colour = (34, 16, 14)
_BLUSH: Colour = (236, 140, 124)
_NECK = fixed_point(np.array([[34.0, 90.0], [78.0, 90.0], [84.0, 118.0], [28.0, 118.0]]))
_PALM = np.array([0.0, 0.35]) + np.array([1.0, 0.9]) * CIRCLE
_FINGERS = [np.array([x, -0.85]) + np.array([0.23, 0.95]) * CIRCLE for x in (-0.72, -0.24, 0.24, 0.72)]


class Hand(NamedTuple):
    """A hand before the face: its palm's centre and half width in crop pixels, its turn in radians."""

    x: float
    y: float
    half_width: float
    turn: float


def draw_face(
    identity: Identity,
    action_units: FloatArray,
    *,
    pose: tuple[float, float, float] = (0.0, 0.0, 0.0),
    gaze: tuple[float, float] = (0.0, 0.0),
    blink: float = 0.0,
    hand: Hand | None = None,
    background: Image | None = None,
) -> Image:
    """Draw one face, evenly lit and in focus; `camera` adds light, blur and noise.

    Args:
        action_units: (12,) intensities in [0, 1] in the order of ACTION_UNITS.
        pose: yaw (positive: to the right of the image), pitch (positive: down) and roll (clockwise), in radians.
        gaze: where the irises point, right and down, each in [-1, 1].
        blink: 0 open to 1 closed, on top of what the action units do to the lids.
        background: (224, 224, 3) uint8 RGB, CANVAS_PX a side; None: grey.

    Returns:
        (112, 112, 3) uint8 RGB.
    """
    canvas = np.full((CANVAS_PX, CANVAS_PX, 3), 120, np.uint8) if background is None else background.copy()
    units = dict(zip(ACTION_UNITS, action_units.tolist(), strict=True))
    painter = _Painter(canvas, face_parts(identity, units, pose, gaze, blink), identity)
    _paint_head(painter)
    _paint_skin(painter, units)
    _paint_nose(painter)
    _paint_beard(painter)
    _paint_mouth(painter, units)
    _paint_eyes(painter)
    _paint_hair(painter)
    if hand is not None:
        _paint_hand(painter, hand)
    return np.asarray(cv2.resize(canvas, (CROP_PX, CROP_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)


class _Painter:
    """A canvas, the face's parts, and whose face it is."""

    def __init__(self, canvas: Image, parts: dict[str, FixedPoints], identity: Identity) -> None:
        self.canvas, self.parts, self.identity = canvas, parts, identity

    def fill(self, points: FixedPoints, colour: Colour) -> None:
        cv2.fillPoly(self.canvas, [points], colour, cv2.LINE_8, _FRACTION_BITS)

    def fill_between(self, first: str, second: str, colour: Colour) -> None:
        """Fill the area between two arcs."""
        self.fill(np.concatenate([self.parts[first], self.parts[second][::-1]]), colour)

    def stroke(self, points: FixedPoints, colour: Colour, width: int = 2, closed: bool = False) -> None:
        """Draw a line; `width` in pixels of the canvas."""
        cv2.polylines(self.canvas, [points], closed, colour, width, cv2.LINE_8, _FRACTION_BITS)

    def crease(self, name: str, depth: float, width: int = 2) -> None:
        """Draw a fold of the skin, the darker the deeper."""
        if depth > _VISIBLE_DEPTH:
            self.stroke(self.parts[name], self.shade(min(0.85 * depth, 0.75)), width)

    def shade(self, share: float) -> Colour:
        """The skin in shadow."""
        return mix(self.identity.skin, _SHADOW, share)


def _scaled(points: FixedPoints, centre: FloatArray, scale: float) -> FixedPoints:
    return np.rint(centre + (points - centre) * scale).astype(np.int32)


def _paint_head(painter: _Painter) -> None:
    outline, identity = painter.parts["outline"], painter.identity
    if identity.long_hair:
        painter.fill(painter.parts["hair_back"], mix(identity.hair, _SHADOW, 0.3))
    painter.fill(_NECK, painter.shade(0.35))
    centre = outline.mean(axis=0)
    for scale, share in ((1.0, 0.16), (0.91, 0.07), (0.8, 0.0)):
        painter.fill(_scaled(outline, centre, scale), painter.shade(share))


def _paint_skin(painter: _Painter, units: Units) -> None:
    for _, name in SIDES:
        if units["AU6"] > _VISIBLE_DEPTH:
            painter.fill(painter.parts["cheek" + name], mix(painter.identity.skin, _BLUSH, 0.5 * units["AU6"]))
        painter.crease("fold" + name, 0.22 + 0.75 * max(units["AU10"], 0.8 * units["AU12"]), 4)
        painter.crease("furrow" + name, units["AU4"], 4)
        painter.crease("lid_bag" + name, 0.12 + 0.6 * max(units["AU6"], 0.7 * units["AU7"]))
        painter.crease("nose_wrinkle" + name, units["AU10"], 4)
        painter.crease("droop" + name, units["AU15"], 4)
        for ray in ("_high", "_middle", "_low"):
            painter.crease(f"crow{ray}{name}", 0.8 * units["AU6"])
    painter.crease("forehead_low", 0.8 * max(units["AU2"], 0.8 * units["AU1"]))
    painter.crease("forehead_high", 0.8 * max(units["AU2"], 0.6 * units["AU1"]))
    painter.crease("press_top", 0.8 * units["AU24"], 3)
    painter.crease("press_bottom", units["AU24"], 3)


def _paint_nose(painter: _Painter) -> None:
    painter.stroke(painter.parts["nose_bridge"], painter.shade(0.18), 3)
    painter.fill(painter.parts["nose_light"], mix(painter.identity.skin, (255, 255, 255), 0.18))
    painter.stroke(painter.parts["nose_base"], painter.shade(0.4), 3)
    for _, name in SIDES:
        painter.fill(painter.parts["nostril" + name], painter.shade(0.75))


def _paint_beard(painter: _Painter) -> None:
    identity = painter.identity
    if not identity.beard:
        return
    colour = mix(identity.skin, identity.hair, identity.beard)
    painter.fill_between("moustache_top", "lip_top", colour)
    jaw, mouth = painter.parts["outline"][1:20], painter.parts["lip_lower"].mean(axis=0)
    painter.fill(np.concatenate([jaw, _scaled(jaw, mouth, 0.55)[::-1]]), colour)


def _paint_mouth(painter: _Painter, units: Units) -> None:
    lips = painter.identity.lips
    painter.fill_between("lip_upper", "lip_lower", _MOUTH)
    if units["AU25"] + units["AU26"] > 0.15:
        painter.fill_between("lip_upper", "teeth", _WHITE)
    painter.fill_between("lip_top", "lip_upper", mix(lips, _SHADOW, 0.15))
    painter.fill_between("lip_lower", "lip_bottom", lips)
    painter.stroke(painter.parts["lip_upper"], mix(lips, _SHADOW, 0.65))


def _paint_eyes(painter: _Painter) -> None:
    identity, parts = painter.identity, painter.parts
    for _, name in SIDES:
        painter.fill_between("upper_lid" + name, "lower_lid" + name, _WHITE)
        painter.fill(parts["iris" + name], identity.iris)
        painter.fill(parts["pupil" + name], (14, 12, 14))
        painter.stroke(parts["lower_lid" + name], painter.shade(0.4))
        painter.stroke(parts["upper_lid" + name], mix(identity.skin, (20, 14, 14), 0.85), 3)
        painter.stroke(parts["lid_fold" + name], painter.shade(0.3))
        painter.fill_between("brow_top" + name, "brow_bottom" + name, mix(identity.hair, identity.skin, 0.12))


def _paint_hair(painter: _Painter) -> None:
    """Hair over the forehead, and glasses over all."""
    painter.fill(painter.parts["hair_front"], painter.identity.hair)
    frame = painter.identity.glasses
    if frame is not None:
        painter.stroke(painter.parts["lens_left"], frame, 3, closed=True)
        painter.stroke(painter.parts["lens_right"], frame, 3, closed=True)
        painter.stroke(painter.parts["glasses_bridge"], frame, 3)


def _paint_hand(painter: _Painter, hand: Hand) -> None:
    """A palm and four fingers, in the person's own colour."""
    cosine, sine = np.cos(hand.turn), np.sin(hand.turn)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    for part in (_PALM, *_FINGERS):
        points = fixed_point(part @ turn * hand.half_width + np.array([hand.x, hand.y]))
        painter.fill(points, painter.shade(0.08))
        painter.stroke(points, painter.shade(0.3), closed=True)
