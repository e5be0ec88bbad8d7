"""Which of a frame's faces is the main person's."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vnaw_pipeline.crops.detect import Face

SAME_FACE_IOU = 0.3
"""Least overlap with the box followed so far. Between neighbouring frames a face keeps far more than this, and
two people side by side share far less."""


def follow_face(faces: Sequence[Face], previous_box: npt.NDArray[np.float32] | None) -> Face | None:
    """The face that overlaps most with the one followed so far, else the largest; None if there is no face.

    Args:
        faces: all faces of one frame.
        previous_box: (4,) x0, y0, x1, y1 where the person was last seen; None at the start.
    """
    if not faces:
        return None
    if previous_box is not None:
        nearest = max(faces, key=lambda face: intersection_over_union(face.box, previous_box))
        if intersection_over_union(nearest.box, previous_box) >= SAME_FACE_IOU:
            return nearest
    return max(faces, key=lambda face: _area(face.box))


def intersection_over_union(box: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Shared area of two boxes (x0, y0, x1, y1) by the area they cover together, in [0, 1]."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    covered = _area(box) + _area(other) - shared
    return shared / covered if covered > 0 else 0.0


def _area(box: npt.NDArray[np.float32]) -> float:
    return float(np.prod(np.maximum(box[2:] - box[:2], 0)))
