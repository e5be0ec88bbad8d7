"""Who is who: synthetic boxes and colours with known truth, then the signature and the cuts on real pictures."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from vnaw_pipeline.config import CropConfig
from vnaw_pipeline.crops.detect import load_detector
from vnaw_pipeline.inference.inputs import read_image
from vnaw_pipeline.inference.people import (
    SAME_COLOURS,
    PeopleTracker,
    colours_of,
    contrast,
    contrast_of_people,
    difference,
    is_cut,
    thumbnail,
)

from .clips import carphone_frames, scenery

FPS = 25
RED, BLUE = np.full((2, 48), 60, np.float32), np.full((2, 48), 120, np.float32)
Floats = npt.NDArray[np.float32]
Face = tuple[float, Floats]
"""x of the box's left side, colours."""


def follow(frames: list[list[Face]], cuts: tuple[int, ...] = (), jitter: float = 1.0) -> list[list[int]]:
    """The tracker's numbers for boxes of 60 x 80 pixels that jitter by a pixel, colours by a few units."""
    generator = np.random.default_rng(0)
    tracker = PeopleTracker(return_s=5.0)
    numbers = []
    for frame_index, faces in enumerate(frames):
        boxes = [(np.array([x, 50, x + 60, 130]) + generator.normal(0, jitter, 4)).astype(np.float32) for x, _ in faces]
        colours = [(seen + generator.normal(0, 3, seen.shape)).astype(np.float32) for _, seen in faces]
        numbers.append(tracker.update(boxes, colours, frame_index / FPS, frame_index in cuts))
    same_person = tracker.same_person()
    return [same_person[seen].tolist() if seen else [] for seen in numbers]


@pytest.mark.parametrize("other", [BLUE, RED], ids=["unlike", "alike"])
def test_two_people_who_cross_keep_their_numbers(other: Floats) -> None:
    """People who look alike are told apart by their motion: 8 pixels a frame, the faces overlap for 15 frames."""
    frames = [[(100 + 8 * k, RED), (500 - 8 * k, other)] for k in range(50)]
    assert follow(frames) == [[0, 1]] * 50


def test_one_hidden_while_they_cross_keeps_the_number() -> None:
    frames = [[(100 + 8 * k, RED), *([] if 20 <= k < 32 else [(500 - 8 * k, BLUE)])] for k in range(50)]
    numbers = follow(frames)
    assert all(seen[0] == 0 for seen in numbers)
    assert {seen[1] for seen in numbers if len(seen) == 2} == {1}


@pytest.mark.parametrize(("settles", "same"), [(10, True), (100, False)], ids=[".4 s", "4 s"])
def test_who_comes_out_half_hidden_is_known_once_the_colours_settle(settles: int, same: bool) -> None:
    shares = np.linspace(0.75, 1, settles, dtype=np.float32)
    coming: list[list[Face]] = [[(300.0 + k, RED + share * (BLUE - RED))] for k, share in enumerate(shares)]
    numbers = follow([[(300.0, BLUE)]] * 5 + [[]] * 20 + coming)
    assert len({seen[0] for seen in numbers if seen}) == (1 if same else 2)


def test_who_was_there_all_the_time_is_nobody_new() -> None:
    """A second person comes in half-hidden, and turns out to have the colours of the first, who is still there."""
    coming: list[list[Face]] = [[(100.0, RED), (300.0, RED + np.float32(18 - 1.5 * k))] for k in range(12)]
    assert follow([[(100.0, RED)]] * 5 + coming)[5:] == [[0, 1]] * 12


def test_colours_that_change_at_once_where_somebody_stays_keep_the_number() -> None:
    darker = RED + np.float32(13)
    assert SAME_COLOURS < difference(RED, darker) < 1.5 * SAME_COLOURS
    assert follow([[(100.0, RED)]] * 5 + [[(100.0, darker)]] * 5) == [[0]] * 10
    left_and_came: list[list[Face]] = [[(100.0, RED)]] * 5 + [[]] * 10 + [[(100.0, darker)]] * 30
    assert follow(left_and_came)[-1] == [1]


def test_the_order_of_faces_in_a_frame_does_not_matter() -> None:
    frames = [[(100.0, RED), (300.0, BLUE)], [(300.0, BLUE), (100.0, RED)]] * 3
    assert follow(frames) == [[0, 1], [1, 0]] * 3


@pytest.mark.parametrize("cuts", [(5,), ()], ids=["cut seen", "cut not seen"])
def test_another_person_in_the_same_place_after_a_cut_is_another(cuts: tuple[int, ...]) -> None:
    numbers = follow([[(100.0, RED)]] * 5 + [[(100.0, BLUE)]] * 5, cuts)
    assert numbers == [[0]] * 5 + [[1]] * 5


def test_shot_and_reverse_shot_return_to_the_same_people() -> None:
    shots = [[(100.0, RED)]] * 5 + [[(400.0, BLUE)]] * 5 + [[(130.0, RED)]] * 5 + [[(380.0, BLUE)]] * 5
    assert follow(shots, (5, 10, 15)) == [[0]] * 5 + [[1]] * 5 + [[0]] * 5 + [[1]] * 5


def test_people_who_swap_places_at_a_cut_keep_their_numbers() -> None:
    numbers = follow([[(100.0, RED), (400.0, BLUE)]] * 5 + [[(100.0, BLUE), (400.0, RED)]] * 5, (5,))
    assert numbers == [[0, 1]] * 5 + [[1, 0]] * 5


def test_people_who_swap_places_at_an_unseen_cut_are_never_merged() -> None:
    numbers = follow([[(100.0, RED), (600.0, BLUE)]] * 5 + [[(100.0, BLUE), (600.0, RED)]] * 5)
    red = {seen[0] for seen in numbers[:5]} | {seen[1] for seen in numbers[5:]}
    blue = {seen[1] for seen in numbers[:5]} | {seen[0] for seen in numbers[5:]}
    assert not red & blue


@pytest.mark.parametrize(("away", "same"), [(100, True), (140, False)], ids=["4 s", "5.6 s"])
def test_who_comes_back_within_five_seconds_is_the_same(away: int, same: bool) -> None:
    frames: list[list[Face]] = [[(100.0, RED)]] * 5 + [[]] * away + [[(400.0, RED)]] * 5
    numbers = follow(frames)
    assert (numbers[-1] == numbers[0]) is same


def test_who_comes_in_while_another_is_out_is_another() -> None:
    frames: list[list[Face]] = [[(100.0, RED)]] * 5 + [[]] * 20 + [[(100.0, BLUE)]] * 5
    assert follow(frames)[-1] == [1]


def test_a_face_far_away_in_the_next_frame_is_another_however_alike() -> None:
    assert follow([[(100.0, RED)], [(500.0, RED)]]) == [[0], [1]]


def test_who_stays_keeps_the_number_when_others_come_and_go() -> None:
    """One in the middle stays; the one at the right leaves and an alike one comes in at the left. Two pairs that are
    just possible are no better than one that is perfect."""
    frames: list[list[Face]] = [[(300.0, RED), (370.0, RED)]] * 5 + [[(300.0, RED), (230.0, RED)]] * 5
    assert follow(frames, jitter=0.1) == [[0, 1]] * 5 + [[0, 2]] * 5


@pytest.mark.parametrize("gap_s", [6.0, 60.0])
def test_who_is_in_two_frames_in_a_row_is_the_same_however_far_apart_they_are(gap_s: float) -> None:
    tracker = PeopleTracker(return_s=5.0)
    box = np.array([100, 50, 160, 130], np.float32)
    assert [tracker.update([box], [RED], gap_s * frame) for frame in range(4)] == [[0]] * 4


def test_slow_change_of_light_keeps_the_number() -> None:
    frames = [[(100.0, RED + np.float32(0.4 * k))] for k in range(100)]
    assert follow(frames) == [[0]] * 100


def picture(name: str) -> Path:
    found = importlib.util.find_spec("insightface")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "data" / "images" / name


def test_colours_tell_real_people_apart() -> None:
    """Six people in one photograph, and one over two seconds of video."""
    detect = load_detector(CropConfig())
    photograph = read_image(picture("t1.jpg"))
    group = [colours_of(photograph, face.landmarks) for face in detect(photograph)]
    assert len(group) == 6
    man = [colours_of(rgb, detect(rgb)[0].landmarks) for rgb in carphone_frames(60)[::10]]
    assert max(difference(man[0], later) for later in man) < SAME_COLOURS
    people = [*group, man[0]]
    assert min(difference(a, b) for i, a in enumerate(people) for b in people[:i]) > SAME_COLOURS


@pytest.mark.parametrize("brightness", [0.5, 0.3, 0.2])
def test_dim_light_makes_people_no_more_alike(brightness: float) -> None:
    photograph = read_image(picture("t1.jpg"))
    faces = load_detector(CropConfig())(photograph)
    dim = (photograph * brightness).astype(np.uint8)
    group = [colours_of(dim, face.landmarks) for face in faces]
    limit = SAME_COLOURS * contrast(thumbnail(dim))
    assert min(difference(a, b) for i, a in enumerate(group) for b in group[:i]) > limit
    man = [(rgb * brightness).astype(np.uint8) for rgb in carphone_frames(60)[::10]]
    seen = [colours_of(rgb, load_detector(CropConfig())(rgb)[0].landmarks) for rgb in man]
    assert max(difference(seen[0], later) for later in seen) < SAME_COLOURS * contrast(thumbnail(man[0]))


def test_people_in_grey_pictures_are_no_more_alike() -> None:
    def grey(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.uint8)

    photograph = read_image(picture("t1.jpg"))
    group = [colours_of(grey(photograph), face.landmarks) for face in load_detector(CropConfig())(photograph)]
    share = contrast_of_people(thumbnail(grey(photograph))) / contrast_of_people(thumbnail(photograph))
    assert share == pytest.approx(0.75, abs=0.05)
    assert min(difference(a, b) for i, a in enumerate(group) for b in group[:i]) > share * SAME_COLOURS
    seen = [colours_of(grey(rgb), load_detector(CropConfig())(rgb)[0].landmarks) for rgb in carphone_frames(60)[::10]]
    assert max(difference(seen[0], later) for later in seen) < share * SAME_COLOURS


def test_colours_do_not_depend_on_the_size_of_the_picture() -> None:
    rgb = carphone_frames(1)[0]
    detect = load_detector(CropConfig())
    landmarks = detect(rgb)[0].landmarks
    larger = cv2.resize(rgb, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    moved = (landmarks + 0.5) * 3 - 0.5
    assert difference(colours_of(rgb, landmarks), colours_of(larger, moved)) < 1.5


def test_a_cut_is_a_change_of_the_whole_picture() -> None:
    man, road = map(thumbnail, (carphone_frames(1)[0], scenery(1, 144, 176)[0]))
    assert is_cut(man, road)
    assert is_cut(man // 5, road // 5)
    assert not is_cut(None, road)
    later = [thumbnail(rgb) for rgb in carphone_frames(30)]
    assert not any(is_cut(before, after) for before, after in pairwise(later))
