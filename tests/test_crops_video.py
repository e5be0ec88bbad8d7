"""Decoding: every frame, upright, with its time; and an honest account of what is lost."""

import gc
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clips import (
    CARPHONE_FPS,
    CARPHONE_FRAMES,
    Rgb,
    carphone_frames,
    carphone_path,
    cut_off,
    scenery,
    write_clip,
)
from vnaw_pipeline.crops.video import open_video, upright
from vnaw_pipeline.errors import DataError

# --- whole files ---


def test_real_clip_gives_every_frame_with_its_index_and_time() -> None:
    with open_video(carphone_path()) as video:
        frames = list(video)
        assert video.loss() is None
        assert video.expected_frames == CARPHONE_FRAMES
        assert video.fps == pytest.approx(CARPHONE_FPS)
    assert [frame.frame_index for frame in frames] == list(range(CARPHONE_FRAMES))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(CARPHONE_FRAMES) / CARPHONE_FPS)
    # PyAV alone, stretched to what 176 pixels of 128:117 are.
    for frame, rgb in zip(frames, decoded_alone(carphone_path(), width=193, height=144), strict=True):
        assert frame.rgb.dtype == np.uint8
        np.testing.assert_array_equal(frame.rgb, rgb)


def decoded_alone(path: Path, **size: int) -> list[Rgb]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24", **size) for frame in container.decode(video=0)]


def test_frames_come_one_at_a_time() -> None:
    with open_video(carphone_path()) as video:
        next(iter(video))
        assert video.decoded_frames <= 1


def test_frames_are_let_go_without_the_garbage_collector() -> None:
    """Else memory grows by hundreds of frames: their pixels lie outside Python, which sees no reason to collect."""

    def frames_alive() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = frames_alive()
        with open_video(carphone_path()) as video:
            for _ in video:
                pass
        assert frames_alive() - before < 20
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_counts_frames_and_keeps_their_times(tmp_path: Path, suffix: str) -> None:
    times_ms = [0, 40, 80, 500, 510, 520, 900, 1900, 1940, 2400]
    with open_video(write_clip(tmp_path / f"vfr{suffix}", scenery(10), times_ms)) as video:
        frames = list(video)
        assert video.loss() is None
    assert [frame.frame_index for frame in frames] == list(range(10))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.array(times_ms) / 1000, atol=1e-3)


def test_pictures_that_an_avi_leaves_out_are_no_loss(tmp_path: Path) -> None:
    """Where nothing moved, cameras and FFmpeg write empty chunks, and the header counts them."""
    path = write_clip(tmp_path / "drops.avi", scenery(6), [0, 40, 80, 2320, 2360, 2400])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 6
    with open_video(path) as video:
        assert len(list(video)) == 6
        assert video.loss() is None


def test_an_avi_that_breaks_off_is_a_loss(tmp_path: Path) -> None:
    with open_video(cut_off(write_clip(tmp_path / "broken.avi", scenery(150)), 0.5)) as video:
        assert len(list(video)) < 125
        assert video.loss() is not None


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_outlasts_the_picture_is_no_loss(tmp_path: Path, suffix: str) -> None:
    with open_video(write_clip(tmp_path / f"sound{suffix}", scenery(25), sound_s=4.0)) as video:
        assert len(list(video)) == 25
        assert video.loss() is None


def test_colon_in_a_name_is_not_a_protocol(tmp_path: Path) -> None:
    with open_video(write_clip(tmp_path / "a:b.mp4", scenery(3))) as video:
        assert len(list(video)) == 3


# --- rotation metadata ---


def _quadrants() -> Rgb:
    """Four flat colours, so that each of the eight orientations looks different."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48], image[32:, 48:] = 40, 90, 150, 210
    return image


@pytest.mark.parametrize(("degrees", "hflip"), list(product([0, 90, 180, -90], [False, True])))
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int, hflip: bool) -> None:
    path = write_clip(tmp_path / "turned.mp4", [_quadrants()] * 3, rotation=degrees, hflip=hflip)
    expected = np.rot90(_quadrants(), degrees // 90)  # both count counter-clockwise
    if hflip:
        expected = np.fliplr(expected)
    with open_video(path) as video:
        for frame in video:
            assert frame.rgb.shape == expected.shape
            assert np.abs(frame.rgb.astype(int) - expected).mean() < 4  # JPEG-like coding noise at the edges


@given(
    transposed=st.booleans(),
    sign_x=st.sampled_from([-1, 1]),
    sign_y=st.sampled_from([-1, 1]),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_every_pixel_lands_where_the_matrix_says(
    transposed: bool, sign_x: int, sign_y: int, height: int, width: int
) -> None:
    linear = np.array([[0, sign_y], [sign_x, 0]] if transposed else [[sign_x, 0], [0, sign_y]])
    matrix = np.zeros((3, 3), np.int32)
    matrix[:2, :2] = linear * 65536
    rgb = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    shown = upright(rgb, matrix)
    stored = np.array(list(product(range(width), range(height))))  # x, y
    points = stored @ linear
    points -= points.min(axis=0)
    for (x, y), (shown_x, shown_y) in zip(stored, points, strict=True):
        np.testing.assert_array_equal(shown[shown_y, shown_x], rgb[y, x])


# --- pixels that are not square ---


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("pixel_ratio", "degrees", "shown"),
    [
        (Fraction(4, 3), 0, (64, 128)),
        (Fraction(3, 4), 0, (85, 96)),
        (Fraction(4, 3), 90, (128, 64)),
        (Fraction(1), 0, (64, 96)),
        (Fraction(0), 0, (64, 96)),
    ],
    ids=["wide", "high", "turned", "square", "unknown"],
)
def test_pixels_become_square(
    tmp_path: Path, pixel_ratio: Fraction, degrees: int, shown: tuple[int, int], suffix: str
) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", [_quadrants()] * 3, rotation=degrees, pixel_ratio=pixel_ratio)
    expected = np.rot90(_quadrants(), degrees // 90)
    rows, columns = (np.arange(shown[axis]) * expected.shape[axis] // shown[axis] for axis in (0, 1))
    with open_video(path) as video:
        for frame in video:
            assert frame.rgb.shape == (*shown, 3)
            # Coding noise, and up to two pixels of a ramp where two colours meet.
            assert np.abs(frame.rgb.astype(int) - expected[np.ix_(rows, columns)]).mean() < 4


def test_square_pixels_stay_as_they_are_stored(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "man.mp4", carphone_frames(5))
    with open_video(path) as video:
        for frame, rgb in zip(video, decoded_alone(path), strict=True):
            np.testing.assert_array_equal(frame.rgb, rgb)


def test_an_impossible_shape_of_pixels_is_named(tmp_path: Path) -> None:
    for pixel_ratio in (Fraction(7), Fraction(1, 50)):
        path = write_clip(tmp_path / "mistake.mp4", [_quadrants()] * 3, pixel_ratio=pixel_ratio)
        with (
            open_video(path) as video,
            pytest.raises(DataError, match=f"are said to be {float(pixel_ratio):g} times as wide as high; expected"),
        ):
            list(video)


# --- broken files ---


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_broken_tail_keeps_what_decodes_and_says_what_was_lost(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"broken{suffix}", list(carphone_frames(60)))
    with open_video(path) as video:
        whole = [frame.rgb for frame in video]
    with open_video(cut_off(path, 0.6)) as video:
        kept = [frame.rgb for frame in video]
        loss = video.loss()
    assert 20 < len(kept) < 60
    for left, right in zip(kept[:-1], whole, strict=False):  # the last one may be cut through
        np.testing.assert_array_equal(left, right)
    assert loss is not None
    assert f"{60 - len(kept)} of " in loss
    assert f"60 frames lost, {len(kept)} decoded" in loss


def test_hole_in_the_middle_is_skipped_and_told(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "hole.mp4", list(carphone_frames(60)))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8000] = bytes(8000)
    path.write_bytes(content)
    with open_video(path) as video:
        frames = list(video)
        assert [frame.frame_index for frame in frames] == list(range(len(frames)))
        assert 30 < len(frames) < 60
        assert video.loss() is not None


def test_index_without_frames_is_an_error(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "empty.mp4", scenery(5))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])
    with open_video(path) as video, pytest.raises(DataError, match="not one frame could be decoded"):
        list(video)


def test_what_is_no_video_is_told_apart(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 50)
    nothing = tmp_path / "nothing.mp4"
    nothing.touch()
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    for path, message in [
        (text, "text.mp4 cannot be read as a video"),
        (nothing, "nothing.mp4 cannot be read as a video"),
        (sound, "holds no video stream"),
        (tmp_path / "missing.mp4", "No such video"),
        (tmp_path, "is not a file"),
    ]:
        with pytest.raises(DataError, match=message):
            open_video(path)
