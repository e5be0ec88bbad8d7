"""Which expressions are shown when: segments over the videos of a split, in Aff-Wild2's class shares."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vnaw_pipeline.tasks import EXPRESSIONS

NEUTRAL = EXPRESSIONS.index("Neutral")

TRAIN_FRAMES = (179434, 17153, 10978, 9110, 94344, 80671, 30639, 169887)
"""Labelled frames of Aff-Wild2's training videos by class, in the order of EXPRESSIONS."""

_LEAST_SHARE = 0.04  # in a few minutes of video 1.5% would be one single occurrence
_SEGMENT_FRAMES = 60
_LEAST_SEGMENTS = 3


class Segment(NamedTuple):
    """Frames [start, stop) in which an expression, an index into EXPRESSIONS, is shown."""

    expression: int
    start: int
    stop: int


def class_shares() -> list[float]:
    """Share of the frames that each expression gets: Aff-Wild2's, but none under 4%."""
    shares = np.maximum(np.array(TRAIN_FRAMES) / sum(TRAIN_FRAMES), _LEAST_SHARE)
    return [float(share) for share in shares / shares.sum()]


def schedule_expressions(video_frames: Sequence[int], generator: np.random.Generator) -> list[list[Segment]]:
    """Spread the expressions of one split over its videos; what no segment covers is Neutral.

    Every class gets its share of all frames in at least three segments, and its segments go to different videos as far
    as there is room, so that no person and no video stands for a class.

    Args:
        video_frames: number of frames of each video.

    Returns:
        For each video its segments, in order of time, apart or adjacent.
    """
    total = sum(video_frames)
    wanted: list[tuple[int, int]] = []
    for expression, share in enumerate(class_shares()):
        if expression != NEUTRAL:
            wanted += [(length, expression) for length in _cut(round(share * total), generator)]
    free = list(video_frames)
    placed: list[list[tuple[int, int]]] = [[] for _ in video_frames]
    for length, expression in sorted(wanted, reverse=True):
        video = _choose_video(length, expression, free, placed)
        fitting = min(length, free[video])
        free[video] -= fitting
        placed[video].append((fitting, expression))
    return [_arrange(segments, room, generator) for segments, room in zip(placed, free, strict=True)]


def _cut(frames: int, generator: np.random.Generator) -> list[int]:
    """Cut a class's frames into segments of moderately different lengths."""
    count = max(_LEAST_SEGMENTS, round(frames / _SEGMENT_FRAMES))
    bounds = np.rint(np.cumsum(generator.dirichlet(np.full(count, 12.0))) * frames).astype(int)
    return [length for length in np.diff(bounds, prepend=0).tolist() if length > 0]


def _choose_video(length: int, expression: int, free: list[int], placed: list[list[tuple[int, int]]]) -> int:
    """The video that has room, shows this expression least often, and has the most room; else the emptiest."""
    roomy = [video for video, room in enumerate(free) if room >= length]
    if not roomy:
        return max(range(len(free)), key=free.__getitem__)
    shown = {video: Counter(other for _, other in placed[video])[expression] for video in roomy}
    return min(roomy, key=lambda video: (shown[video], -free[video], video))


def _arrange(segments: list[tuple[int, int]], neutral_frames: int, generator: np.random.Generator) -> list[Segment]:
    """Put segments in random order with neutral gaps of random lengths before, between and after them."""
    edges = np.cumsum(generator.dirichlet(np.full(len(segments) + 1, 1.5))) * neutral_frames
    gaps = np.diff(np.rint(edges).astype(int), prepend=0).tolist()
    arranged, position = [], 0
    for gap, index in zip(gaps, generator.permutation(len(segments)), strict=False):
        length, expression = segments[index]
        if length:
            arranged.append(Segment(expression, position + gap, position + gap + length))
        position += gap + length
    return arranged
