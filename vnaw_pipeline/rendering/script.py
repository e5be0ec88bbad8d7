"""What happens in a video, frame by frame, and what is true of it.

A script is made of segments (`schedule`). An expression rises, stays and falls; the action units of its pattern wax and
wane each in its own time, so that a single frame may show only part of it. Talking, blinks, raised brows, turned heads,
hands and blur come and go whatever is felt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vnaw_pipeline.rendering.anatomy import FloatArray
from vnaw_pipeline.rendering.identity import Identity
from vnaw_pipeline.rendering.schedule import NEUTRAL, Segment
from vnaw_pipeline.tasks import ACTION_UNITS, EXPRESSIONS

UNIT_PRESENT = 0.3
"""Intensity from which an action unit counts as present."""

EXPRESSION_SHOWN = 0.2
"""Share of its own peak from which a segment's expression is true of a frame; below it the truth is Neutral."""

Pattern = Mapping[str, float]

# Action units of each expression, after EMFACS; each expression has variants. Other is what fits none.
PATTERNS: Mapping[str, tuple[Pattern, ...]] = {
    "Anger": (
        {"AU4": 0.9, "AU7": 0.7, "AU23": 0.9},
        {"AU4": 0.9, "AU7": 0.6, "AU24": 0.8},
        {"AU4": 1.0, "AU7": 0.8, "AU10": 0.3, "AU23": 0.6, "AU25": 0.4},
    ),
    "Disgust": (
        {"AU10": 0.95, "AU4": 0.4, "AU15": 0.3},
        {"AU10": 0.9, "AU7": 0.5, "AU25": 0.4},
        {"AU10": 0.8, "AU4": 0.6, "AU6": 0.3, "AU15": 0.5},
    ),
    "Fear": (
        {"AU1": 0.9, "AU2": 0.6, "AU4": 0.7, "AU7": 0.4, "AU25": 0.7},
        {"AU1": 0.9, "AU2": 0.5, "AU4": 0.6, "AU25": 0.5, "AU26": 0.3},
    ),
    "Happiness": (
        {"AU6": 0.8, "AU12": 0.9},
        {"AU6": 0.8, "AU12": 1.0, "AU25": 0.6},
        {"AU6": 0.4, "AU12": 0.8, "AU25": 0.3},
    ),
    "Sadness": (
        {"AU1": 0.8, "AU4": 0.5, "AU15": 0.9},
        {"AU1": 0.9, "AU15": 0.6},
        {"AU1": 0.5, "AU4": 0.4, "AU15": 0.8, "AU24": 0.3},
    ),
    "Surprise": (
        {"AU1": 0.9, "AU2": 1.0, "AU25": 0.6, "AU26": 0.7},
        {"AU1": 0.9, "AU2": 0.9, "AU25": 0.5, "AU26": 0.3},
    ),
    "Other": (
        {"AU12": 0.5, "AU24": 0.7},
        {"AU24": 0.9, "AU4": 0.2},
        {"AU7": 0.9, "AU6": 0.4},
        {"AU2": 0.9, "AU15": 0.4, "AU24": 0.3},
        {"AU12": 0.4, "AU15": 0.5, "AU4": 0.4},
        {"AU4": 0.5, "AU7": 0.6, "AU25": 0.3},
    ),
}

# Valence and arousal in the order of ACTION_UNITS; see `affect_of`.
_VALENCE = np.array([-0.15, 0.10, -0.55, 0.50, -0.10, -0.65, 1.10, -0.75, -0.35, -0.25, 0.00, 0.00])
_AROUSAL = np.array([0.25, 0.40, 0.35, 0.25, 0.30, 0.45, 0.25, -0.65, 0.45, 0.20, 0.30, 0.55])
_CALM = -0.10
_MOUTH_SHAPES = [ACTION_UNITS.index(name) for name in ("AU12", "AU15", "AU23", "AU24")]
_LIPS_PART, _JAW_DROP = ACTION_UNITS.index("AU25"), ACTION_UNITS.index("AU26")
_BROW_RAISE = [ACTION_UNITS.index(name) for name in ("AU1", "AU2")]


@dataclass(frozen=True, kw_only=True)
class VideoScript:
    """One video of T frames: what is drawn, and what is true.

    Attributes:
        action_units: (T, 12) drawn intensities in [0, 1].
        pose: (T, 3) yaw, pitch and roll in radians.
        gaze: (T, 2) in [-1, 1].
        blink: (T,) 0 open to 1 closed.
        hand: (T, 4) centre x and y, half width in crop pixels (0: no hand) and turn in radians.
        exposure: (T, 5) the fields of `camera.Exposure`.
        expression: (T,) int64 true class.
    """

    action_units: FloatArray
    pose: FloatArray
    gaze: FloatArray
    blink: FloatArray
    hand: FloatArray
    exposure: FloatArray
    expression: NDArray[np.int64]


def affect_of(action_units: FloatArray) -> NDArray[np.float32]:
    """Valence and arousal of drawn intensities (T, 12): tanh of one weighted sum each, to three decimals.

    Smiles and raised cheeks are pleasant, raised lips, lowered brows and lip corners are not; open mouths, wide eyes
    and tension are aroused, drooping lip corners are not. A face at rest is a little calm.
    """
    sums = np.column_stack([action_units @ _VALENCE, _CALM + action_units @ _AROUSAL])
    return np.asarray(np.round(np.tanh(sums), 3), dtype=np.float32)


def present_units(action_units: FloatArray) -> NDArray[np.int8]:
    """Which of the drawn action units (T, 12) are present: 1 from UNIT_PRESENT on."""
    return (action_units >= UNIT_PRESENT).astype(np.int8)


def write_script(
    identity: Identity, num_frames: int, segments: Sequence[Segment], generator: np.random.Generator
) -> VideoScript:
    """Play one video's segments with one person's face."""
    shown = np.full(num_frames, EXPRESSION_SHOWN)
    expression = np.full(num_frames, NEUTRAL, dtype=np.int64)
    action_units = np.zeros((num_frames, 12))
    for segment in segments:
        envelope = _envelope(segment, num_frames, generator)
        expression[envelope > shown] = segment.expression
        shown = np.maximum(shown, envelope)
        pattern = identity.expressiveness * _sample_pattern(segment.expression, generator)
        waves = 1.0 - generator.uniform(0.5, 1.0, 12) * np.column_stack(
            [_wave(num_frames, 14.0, generator) ** 2 for _ in range(12)]
        )
        action_units = np.maximum(action_units, envelope[:, None] * pattern * waves)
    action_units = np.maximum(action_units, identity.resting_units)
    action_units = _converse(action_units, generator)
    burst = _bursts(num_frames, 0.12, (6, 18), generator)
    turned = _bursts(num_frames, 0.10, (15, 45), generator)
    return VideoScript(
        action_units=np.clip(action_units, 0.0, 1.0),
        pose=_head_motion(num_frames, turned, generator),
        gaze=np.column_stack([_drift(num_frames, 20.0, 0.8, generator) for _ in range(2)]),
        blink=_blinks(num_frames, generator),
        hand=_hand_motion(num_frames, generator),
        exposure=np.column_stack(
            [
                generator.uniform(0.93, 1.03) + _drift(num_frames, 60.0, 0.06, generator),
                _drift(num_frames, 90.0, 0.12, generator),
                _drift(num_frames, 90.0, 0.08, generator),
                generator.uniform(0.0, 0.7) + 2.2 * _bursts(num_frames, 0.12, (8, 24), generator),
                14.0 * burst,
            ]
        ),
        expression=expression,
    )


def _sample_pattern(expression: int, generator: np.random.Generator) -> FloatArray:
    """One showing of an expression, (12,): a variant, its strength, and each action unit's own share in it."""
    variants = PATTERNS[EXPRESSIONS[expression]]
    variant = variants[generator.integers(len(variants))]
    strength = generator.uniform(0.75, 1.15)
    amounts = np.array([variant.get(name, 0.0) for name in ACTION_UNITS])
    return np.asarray(strength * amounts * generator.uniform(0.75, 1.15, 12))


def _envelope(segment: Segment, num_frames: int, generator: np.random.Generator) -> FloatArray:
    """Intensity of a segment over all frames (T,), 0 to 1. It passes EXPRESSION_SHOWN at about start and stop."""
    length = segment.stop - segment.start
    onset, offset = np.minimum(generator.uniform((8.0, 12.0), (22.0, 32.0)), length / 2)
    frame = np.arange(num_frames)
    crossing = 0.287  # where the smooth step reaches EXPRESSION_SHOWN
    rise = np.clip((frame - segment.start + 0.5) / onset + crossing, 0.0, 1.0)
    fall = np.clip((segment.stop - frame - 0.5) / offset + crossing, 0.0, 1.0)
    step = np.minimum(rise, fall)
    return np.asarray(step * step * (3.0 - 2.0 * step))


def _converse(action_units: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Add what faces do in talk: moving lips, which blur a mouth's own shape, and quick raises of the brows."""
    num_frames = len(action_units)
    talk = _bursts(num_frames, 0.4, (15, 60), generator)
    phase = np.cumsum(generator.uniform(0.5, 1.1, num_frames))
    syllables = talk * (0.5 + 0.5 * np.sin(phase)) * (0.5 + 0.5 * _wave(num_frames, 9.0, generator))
    spoken = action_units.copy()
    spoken[:, _MOUTH_SHAPES] *= 1.0 - 0.7 * talk[:, None]
    spoken[:, _LIPS_PART] = np.maximum(spoken[:, _LIPS_PART] * (1.0 - 0.5 * talk), 0.9 * syllables)
    spoken[:, _JAW_DROP] = np.maximum(spoken[:, _JAW_DROP] * (1.0 - 0.5 * talk), 0.6 * syllables**2)
    flash = _bursts(num_frames, 0.06, (8, 16), generator) * generator.uniform(0.4, 0.9)
    spoken[:, _BROW_RAISE] = np.maximum(spoken[:, _BROW_RAISE], flash[:, None])
    return spoken


def _head_motion(num_frames: int, turned: FloatArray, generator: np.random.Generator) -> FloatArray:
    side = generator.choice([-1.0, 1.0])
    yaw = _drift(num_frames, 35.0, 0.16, generator) + generator.uniform(-0.1, 0.1) + 0.45 * side * turned
    pitch = _drift(num_frames, 30.0, 0.10, generator)
    roll = _drift(num_frames, 40.0, 0.08, generator)
    return np.column_stack([yaw, pitch, roll])


def _hand_motion(num_frames: int, generator: np.random.Generator) -> FloatArray:
    """A hand that comes up from below, rests on mouth, cheek or brow, and goes."""
    near = _bursts(num_frames, 0.05, (12, 40), generator)
    x = generator.uniform(34.0, 78.0) + _drift(num_frames, 25.0, 8.0, generator)
    y = 130.0 - (130.0 - generator.uniform(40.0, 90.0)) * near
    half_width = np.where(near > 0.02, generator.uniform(13.0, 18.0), 0.0)
    return np.column_stack([x, y, half_width, np.full(num_frames, generator.uniform(-0.7, 0.7))])


def _blinks(num_frames: int, generator: np.random.Generator) -> FloatArray:
    starts = np.cumsum(generator.gamma(2.0, 40.0, num_frames // 30 + 2))
    distance = np.abs(np.arange(num_frames)[:, None] - starts[None, :]).min(axis=1)
    return np.asarray(np.clip(1.6 - distance / 2.0, 0.0, 1.0))


def _bursts(num_frames: int, share: float, frames: tuple[int, int], generator: np.random.Generator) -> FloatArray:
    """(T,) in [0, 1]: zero but for bumps of random length that together fill about a share of the time."""
    level = np.zeros(num_frames)
    count = generator.poisson(share * num_frames / np.mean(frames))
    for start, length in zip(
        generator.integers(0, num_frames, count), generator.integers(*frames, count, endpoint=True), strict=True
    ):
        position = np.clip((np.arange(num_frames) - start) / length, 0.0, 1.0)
        level = np.maximum(level, np.clip(3.0 * np.sin(np.pi * position), 0.0, 1.0))
    return level


def _wave(num_frames: int, period: float, generator: np.random.Generator) -> FloatArray:
    """A smooth random course (T,) in [0, 1] with a new value about every `period` frames."""
    knots = generator.random(int(num_frames / period) + 3)
    position = np.arange(num_frames) / period + generator.random()
    left = position.astype(int)
    mixing = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    return np.asarray(knots[left] * (1.0 - mixing) + knots[left + 1] * mixing)


def _drift(num_frames: int, period: float, reach: float, generator: np.random.Generator) -> FloatArray:
    """A smooth random course (T,) in [-reach, reach]."""
    return reach * (2.0 * _wave(num_frames, period, generator) - 1.0)
