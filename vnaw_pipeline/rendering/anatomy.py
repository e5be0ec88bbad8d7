"""Where the parts of a face are: an identity, twelve action units and a pose in, outlines in pixels out.

A face is laid out flat around its centre in pixels of the 112 px crop (x right, y down), moved by the action units, set
on a bowl-shaped head, turned and projected. Nearly every part is an arc through three points or an oval, so that
all of them are evaluated and turned at once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vnaw_pipeline.rendering.identity import Identity

FloatArray = NDArray[np.float64]
FixedPoints = NDArray[np.int32]
"""(points, 2) x and y in the crop, in 1 / FIXED_POINT of a pixel."""

Point = tuple[float, float]
Units = dict[str, float]
"""Action unit, such as "AU12" -> intensity in [0, 1]."""

SIDES = ((-1.0, "_left"), (1.0, "_right"))
"""Left and right in the image: the sign of x, and the ending of a part's name."""

FIXED_POINT = 32
"""Units per crop pixel of the points that come out."""

_CENTRE = np.array([56.0, 57.0])
_HEAD_DEPTH = 30.0
_STEPS = np.linspace(0.0, 1.0, 9)
_ARC_BASIS = np.column_stack([(1 - _STEPS) ** 2, 2 * _STEPS * (1 - _STEPS), _STEPS**2])  # quadratic Bezier
_TURNS = np.linspace(0.0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.column_stack([np.cos(_TURNS), np.sin(_TURNS)])
_FINE_TURNS = np.linspace(0.0, 2 * np.pi, 40, endpoint=False)
_OUTLINE_X, _OUTLINE_Y = np.cos(_FINE_TURNS), np.sin(_FINE_TURNS)
_CONTOURS = frozenset({"outline", "hair_back"})
"""Parts that the head turns within but that do not themselves move sideways."""


class Oval(NamedTuple):
    """An ellipse with upright axes."""

    x: float
    y: float
    half_width: float
    half_height: float


class _Layout(NamedTuple):
    """The flat face: arcs by their start, a point halfway and their end; ovals; any other polygon by its points."""

    arcs: dict[str, tuple[Point, Point, Point]]
    ovals: dict[str, Oval]
    polygons: dict[str, FloatArray]


def face_parts(
    identity: Identity, units: Units, pose: tuple[float, float, float], gaze: tuple[float, float], blink: float
) -> dict[str, FixedPoints]:
    """Every part of a turned face by name. The arguments are those of `draw_face`."""
    layout = _Layout({}, {}, {})
    _lay_out_head(layout, identity, units)
    _lay_out_brows(layout, identity, units)
    _lay_out_eyes(layout, identity, units, gaze, blink)
    _lay_out_nose(layout, identity, units)
    _lay_out_mouth(layout, identity, units)
    _lay_out_creases(layout, identity, units)
    return _turned(_evaluated(layout), pose)


def _lay_out_head(layout: _Layout, identity: Identity, units: Units) -> None:
    chin = identity.chin + 7.0 * units["AU26"]
    squareness = np.where(_OUTLINE_Y > 0, 2.0 / identity.jaw_squareness, 0.9)
    x = identity.half_width * np.sign(_OUTLINE_X) * np.abs(_OUTLINE_X) ** squareness
    y = np.where(_OUTLINE_Y > 0, chin, identity.top) * _OUTLINE_Y
    x *= 1.0 - 0.2 * np.clip(y / chin, 0.0, 1.0) ** 2
    outline = np.column_stack([x, y])
    scalp = 1.07 * outline[y < 0.55 * identity.hairline]
    parting = np.linspace(1.0, -1.0, 9)
    fringe = identity.hairline + np.minimum(9.0 * np.abs(parting - identity.parting) ** 1.5, 9.0) - 2.0
    layout.polygons["outline"] = outline
    layout.polygons["hair_front"] = np.vstack([scalp, np.column_stack([parting * 0.68 * identity.half_width, fringe])])
    layout.ovals["hair_back"] = Oval(0.0, 4.0, identity.half_width + 8, identity.top + 11)
    lift = 2.0 * units["AU2"]
    layout.arcs["forehead_low"] = (-17.0, -25.0), (0.0, -26.0 - lift), (17.0, -25.0)
    layout.arcs["forehead_high"] = (-15.0, -29.5), (0.0, -30.5 - lift), (15.0, -29.5)


def _lay_out_brows(layout: _Layout, identity: Identity, units: Units) -> None:
    inner_raise, outer_raise, lowering = units["AU1"], units["AU2"], units["AU4"]
    base = identity.eye_y - identity.brow_gap
    inner = identity.eye_distance - 9.0 - 5.0 * lowering, base - 8.0 * inner_raise + 6.5 * lowering + identity.brow_tilt
    middle = (
        identity.eye_distance,
        base - identity.brow_arch - 3.0 * inner_raise - 5.5 * outer_raise + 3.0 * lowering,
    )
    outer = identity.eye_distance + 10.5, base + 1.0 - 8.0 * outer_raise + 1.5 * lowering - identity.brow_tilt
    half = identity.brow_thickness
    for side, name in SIDES:
        for edge, sign in (("_top", -1.0), ("_bottom", 1.0)):
            layout.arcs[f"brow{edge}{name}"] = (
                (side * inner[0], inner[1] + sign * 0.7 * half),
                (side * middle[0], middle[1] + sign * half),
                (side * outer[0], outer[1] + sign * 0.25 * half),
            )
        layout.arcs[f"furrow{name}"] = (side * 3.0, base + 7.0), (side * 2.3, base + 2.5), (side * 3.2, base - 3.5)


def _lay_out_eyes(layout: _Layout, identity: Identity, units: Units, gaze: tuple[float, float], blink: float) -> None:
    scale, open_share = identity.eye_scale, 1.0 - blink
    half = 7.8 * scale
    widening = 0.7 * min(units["AU1"], units["AU2"])
    upper = 4.3 * scale * (1.0 + widening - 0.6 * units["AU7"] - 0.15 * units["AU4"]) * open_share - 0.8 * blink
    lower = 2.9 * scale * (1.0 - 0.7 * units["AU7"] - 0.5 * units["AU6"]) * open_share + 0.8 * blink
    for side, name in SIDES:
        x, y = side * identity.eye_distance, identity.eye_y
        inner, outer = (x - side * half, y + 0.8), (x + side * half, y - identity.eye_tilt)
        layout.arcs["upper_lid" + name] = inner, (x, y - upper), outer
        layout.arcs["lower_lid" + name] = inner, (x, y + max(lower, 0.3)), outer
        layout.arcs["lid_fold" + name] = inner, (x, y - max(upper, 2.0) - 2.4), outer
        layout.ovals["lens" + name] = Oval(x, y + 2.0, 14.0, 11.0)
        centre = np.array([x + 2.6 * gaze[0], y - 0.6 + 1.4 * gaze[1]])
        for part, radius in (("iris", 3.6 * scale), ("pupil", 1.6 * scale)):
            disc = centre + radius * CIRCLE
            # The lids are parabolas over x; a disc clipped to them never shows on the skin.
            position = np.clip((disc[:, 0] - inner[0]) / (outer[0] - inner[0]), 0.0, 1.0)
            chord, bulge = inner[1] + (outer[1] - inner[1]) * position, 4.0 * position * (1.0 - position)
            sag = y - (inner[1] + outer[1]) / 2
            disc[:, 1] = np.clip(disc[:, 1], chord + (sag - upper) * bulge, chord + (sag + max(lower, 0.3)) * bulge)
            layout.polygons[part + name] = disc


def _lay_out_nose(layout: _Layout, identity: Identity, units: Units) -> None:
    scale, root, raised = identity.nose_scale, identity.eye_y, units["AU10"]
    tip = root + identity.nose_length
    wing = 7.0 * scale * (1.0 + 0.15 * raised + 0.1 * units["AU12"]), tip + 1.0 - 2.5 * raised
    layout.arcs["nose_bridge"] = (3.5, root + 1), (4.5 * scale, tip - 7), (wing[0] - 1, wing[1])
    layout.arcs["nose_base"] = (-wing[0], wing[1]), (0.0, tip + 4.0 - raised), wing
    layout.arcs["glasses_bridge"] = (-5.0, root), (0.0, root - 2.0), (5.0, root)
    layout.ovals["nose_light"] = Oval(0.0, tip - 5.0, 2.2 * scale, 6.5)
    for side, name in SIDES:
        layout.ovals["nostril" + name] = Oval(side * 3.4 * scale, tip + 1.8 - 1.5 * raised, 1.8 * scale, 1.0)
        layout.arcs["nose_wrinkle" + name] = (
            (side * 1.0, root + 3.5),
            (side * 3.5, root + 4.0),
            (side * 5.5, root + 7.0),
        )


def _lay_out_mouth(layout: _Layout, identity: Identity, units: Units) -> None:
    pull, depress, tighten, press = units["AU12"], units["AU15"], units["AU23"], units["AU24"]
    half = 12.5 * identity.mouth_scale
    half *= 1.0 + 0.45 * pull + 0.1 * depress - 0.55 * tighten - 0.12 * press - 0.12 * units["AU26"]
    corner = identity.mouth_y - 7.5 * pull + 7.5 * depress + 2.0 * units["AU26"]
    middle = identity.mouth_y + 1.5 * units["AU26"] + 1.0 * pull
    raised = 5.5 * units["AU10"] + 0.8 * depress
    gap = 6.0 * units["AU25"] + 11.0 * units["AU26"]
    fullness = identity.lip_fullness * (1.0 - 0.5 * tighten) * (1.0 - 0.8 * press)
    top = middle - raised - 0.3 * gap
    bottom = max(middle + 0.7 * gap - 0.5 * raised, top + 0.2)
    teeth = top + min(0.5 * gap, 3.5) * (0.35 + 0.65 * max(pull, units["AU10"]))
    left, right = (-half, corner), (half, corner)
    layout.arcs["lip_top"] = left, (0.0, top - 2.9 * fullness), right
    layout.arcs["lip_upper"] = left, (0.0, top), right
    layout.arcs["teeth"] = (-0.85 * half, corner), (0.0, teeth), (0.85 * half, corner)
    layout.arcs["lip_lower"] = left, (0.0, bottom), right
    layout.arcs["lip_bottom"] = left, (0.0, bottom + 3.8 * fullness), right
    layout.arcs["press_top"] = (-8.0, middle - 5.0), (0.0, middle - 4.0), (8.0, middle - 5.0)
    layout.arcs["press_bottom"] = (-8.0, middle + 5.5), (0.0, middle + 4.5), (8.0, middle + 5.5)
    layout.arcs["moustache_top"] = (-half - 3, corner + 2), (0.0, top - 6.5), (half + 3, corner + 2)


def _lay_out_creases(layout: _Layout, identity: Identity, units: Units) -> None:
    eye_y, wing_y = identity.eye_y, identity.eye_y + identity.nose_length
    corner = 15.0 + 4.5 * units["AU12"] - 4.0 * units["AU23"]
    corner_y = identity.mouth_y - 7.5 * units["AU12"] + 6.5 * units["AU15"]
    cheek_y = eye_y + 13.0 - 4.5 * units["AU6"]
    squaring = 2.0 * units["AU10"]
    for side, name in SIDES:
        x, eye_end = side * identity.eye_distance, side * (identity.eye_distance + 9.5)
        layout.ovals["cheek" + name] = Oval(x + side * 2.0, cheek_y + 2.0, 10.0, 6.0)
        layout.arcs["lid_bag" + name] = (x - side * 7, eye_y + 5.0), (x, cheek_y - 4.5), (x + side * 8, eye_y + 4.0)
        layout.arcs["fold" + name] = (
            (side * 8.5, wing_y - 3.0 - 1.5 * squaring),
            (side * (corner - 0.5 + squaring), (wing_y + corner_y) / 2 - squaring),
            (side * (corner + 2.0), corner_y + 2.0),
        )
        layout.arcs["droop" + name] = (
            (side * (corner - 2), corner_y + 1.0),
            (side * corner, corner_y + 4.0),
            (side * corner, corner_y + 8.0),
        )
        for ray, rise in (("_high", -3.5), ("_middle", 1.5), ("_low", 5.0)):
            layout.arcs[f"crow{ray}{name}"] = (
                (eye_end, eye_y + 0.3 * rise),
                (eye_end + side * 3, eye_y + 0.6 * rise),
                (eye_end + side * 6, eye_y + rise),
            )


def _evaluated(layout: _Layout) -> dict[str, FloatArray]:
    through = np.array(list(layout.arcs.values()))  # (arcs, 3, 2)
    through[:, 1] = 2 * through[:, 1] - (through[:, 0] + through[:, 2]) / 2  # the point halfway -> control point
    ovals = np.array(list(layout.ovals.values()))
    arc_points = _ARC_BASIS @ through
    oval_points = ovals[:, None, :2] + ovals[:, None, 2:] * CIRCLE
    return {
        **dict(zip(layout.arcs, arc_points, strict=True)),
        **dict(zip(layout.ovals, oval_points, strict=True)),
        **layout.polygons,
    }


def _turned(flat: dict[str, FloatArray], pose: tuple[float, float, float]) -> dict[str, FixedPoints]:
    """Set the flat parts on the head, turn it by yaw, pitch and roll, and project along the line of sight."""
    lengths = [len(points) for points in flat.values()]
    x, y = np.concatenate(list(flat.values())).T
    depth = _HEAD_DEPTH * np.sqrt(np.clip(1.0 - (x / 50.0) ** 2 - (y / 60.0) ** 2, 0.0, 1.0))
    depth += 8.0 * np.exp(-((x / 7.0) ** 2) - ((y - 6.0) / 9.0) ** 2)  # the nose stands out
    depth *= np.repeat([name not in _CONTOURS for name in flat], lengths)
    (cos_yaw, cos_pitch, cos_roll), (sin_yaw, sin_pitch, sin_roll) = np.cos(pose), np.sin(pose)
    yawed_x, yawed_depth = x * cos_yaw + depth * sin_yaw, depth * cos_yaw - x * sin_yaw
    pitched_y = y * cos_pitch + (yawed_depth - 0.6 * _HEAD_DEPTH) * sin_pitch
    rolled = np.array([[cos_roll, sin_roll], [-sin_roll, cos_roll]])
    points = fixed_point(np.column_stack([yawed_x, pitched_y]) @ rolled + _CENTRE)
    ends = np.cumsum(lengths).tolist()
    return {name: points[end - length : end] for name, end, length in zip(flat, ends, lengths, strict=True)}


def fixed_point(points: FloatArray) -> FixedPoints:
    """Round points in crop pixels."""
    return np.rint(points * FIXED_POINT).astype(np.int32)
