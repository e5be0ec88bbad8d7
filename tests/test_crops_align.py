"""Alignment against known motions and scikit-image; which face is followed."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.transform import SimilarityTransform

from vnaw_pipeline.crops.align import ARCFACE_LANDMARKS, align_face, similarity_transform
from vnaw_pipeline.crops.detect import Face
from vnaw_pipeline.crops.track import follow_face, intersection_over_union

Matrix = npt.NDArray[np.float64]

_pixels = st.floats(-2000, 2000, allow_subnormal=False)
_points = arrays(np.float64, (5, 2), elements=_pixels).filter(lambda points: points.std(axis=0).max() > 1)


def _motion(scale: float, degrees: float, shift: tuple[float, float]) -> Matrix:
    cos, sin = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])


def _moved(points: Matrix, motion: Matrix) -> Matrix:
    return points @ motion[:, :2].T + motion[:, 2]


# --- the transform ---


@given(_points, st.floats(0.05, 20), st.floats(-180, 180), st.tuples(_pixels, _pixels))
def test_known_motion_is_recovered(points: Matrix, scale: float, degrees: float, shift: tuple[float, float]) -> None:
    motion = _motion(scale, degrees, shift)
    found = similarity_transform(points, _moved(points, motion))
    np.testing.assert_allclose(_moved(points, found), _moved(points, motion), atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_equals_umeyama_on_points_that_fit_no_motion(seed: int) -> None:
    source, target = np.random.default_rng(seed).normal(scale=50, size=(2, 5, 2))
    target = target + source  # agree in part, so that the best motion is unique and no reflection
    reference = SimilarityTransform.from_estimate(source, target).params[:2]
    np.testing.assert_allclose(similarity_transform(source, target), reference, rtol=1e-6, atol=1e-6)


@given(_points, _points)
def test_no_nearby_motion_fits_better(source: Matrix, target: Matrix) -> None:
    best = similarity_transform(source, target)

    def misfit(matrix: Matrix) -> float:
        return float(np.sum((_moved(source, matrix) - target) ** 2))

    a, b = best[0, 0], best[1, 0]
    for da, db, shift in [(1e-3, 0, 0), (-1e-3, 0, 0), (0, 1e-3, 0), (0, -1e-3, 0), (0, 0, 0.5), (0, 0, -0.5)]:
        other = np.array([[a + da, -b - db, best[0, 2] + shift], [b + db, a + da, best[1, 2] + shift]])
        assert misfit(best) <= misfit(other) * (1 + 1e-12)


def test_points_on_one_spot_have_no_transform() -> None:
    with pytest.raises(ValueError, match="two different source points"):
        similarity_transform(np.ones((5, 2)), ARCFACE_LANDMARKS)


# --- the crop ---


@pytest.mark.parametrize("crop_px", [112, 224])
@pytest.mark.parametrize(("scale", "degrees"), [(0.5, 0), (1.0, 25), (2.5, -40), (6.0, 170)])
def test_landmarks_land_on_the_template(crop_px: int, scale: float, degrees: float) -> None:
    """Dots drawn at the landmarks of a turned, scaled face are found again at ArcFace's places."""
    size = 800
    landmarks = _moved(ARCFACE_LANDMARKS - 56, _motion(scale, degrees, (size / 2, size / 2)))
    across, down = np.meshgrid(np.arange(size), np.arange(size))
    for landmark, expected in zip(landmarks, ARCFACE_LANDMARKS * crop_px / 112, strict=True):
        distance = np.hypot(across - landmark[0], down - landmark[1])
        dot = 255 * np.exp(-0.5 * (distance / (3 * scale)) ** 2)
        crop = align_face(np.repeat(dot[..., None], 3, axis=2).astype(np.uint8), landmarks, crop_px)
        assert crop.shape == (crop_px, crop_px, 3)
        assert crop.dtype == np.uint8
        weight = crop[..., 0] / crop[..., 0].sum()
        x, y = np.meshgrid(np.arange(crop_px), np.arange(crop_px))
        found = np.array([(x * weight).sum(), (y * weight).sum()])
        np.testing.assert_allclose(found, expected, atol=0.15)  # px


def test_image_that_is_aligned_already_stays_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(align_face(image, ARCFACE_LANDMARKS, 112), image)


def test_large_face_is_averaged_and_not_sampled() -> None:
    """A checkerboard of single pixels, eight times too large, becomes its mean; plain sampling gives stripes."""
    checkerboard = (np.indices((896, 896)).sum(axis=0) % 2 * 255).astype(np.uint8)
    crop = align_face(np.repeat(checkerboard[..., None], 3, axis=2), ARCFACE_LANDMARKS * 7.9, 112)
    inside = crop[4:-4, 4:-4].astype(float)
    assert inside.std() < 6
    assert inside.mean() == pytest.approx(127.5, abs=2)


def test_outside_the_frame_is_black() -> None:
    white = np.full((50, 50, 3), 255, np.uint8)
    crop = align_face(white, ARCFACE_LANDMARKS, 112)  # the frame covers the top left quarter only
    assert crop[:45, :45].min() == 255
    assert crop[55:, 55:].max() == 0


# --- following ---


def _face(x: float, y: float, side: float) -> Face:
    return Face(0.9, np.array([x, y, x + side, y + side], np.float32), np.zeros((5, 2), np.float32))


def test_largest_face_starts_and_the_same_person_is_kept() -> None:
    small, large = _face(0, 0, 40), _face(100, 0, 60)
    assert follow_face([small, large], None) is large
    closer = _face(3, 2, 42)
    assert follow_face([large, closer], small.box) is closer


def test_lost_person_gives_way_to_the_largest() -> None:
    other, larger = _face(100, 0, 30), _face(200, 0, 50)
    assert follow_face([other, larger], _face(0, 0, 40).box) is larger
    assert follow_face([], _face(0, 0, 40).box) is None


def test_intersection_over_union_of_known_boxes() -> None:
    box = np.array([0, 0, 10, 10], np.float32)
    assert intersection_over_union(box, box) == 1
    assert intersection_over_union(box, box + 10) == 0
    assert intersection_over_union(box, np.array([5, 0, 15, 10], np.float32)) == pytest.approx(1 / 3)
    assert intersection_over_union(box[[0, 0, 0, 0]], box[[0, 0, 0, 0]]) == 0
