"""Reading crops back, from a folder or a pack, and telling broken images apart."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from tests.clips import Rgb, scenery
from vnaw_pipeline.crops.source import CropPack, JpegFolder, decode_crop, open_video_crops
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.layouts import crop_set_name

IMAGE: Rgb = scenery(1, 32, 32)[0]
JPEG = simplejpeg.encode_jpeg(IMAGE, 95, "RGB")


def _write_folder(path: Path, images: dict[int, bytes]) -> Path:
    """`images` by 0-based frame_index."""
    path.mkdir()
    for frame_index, jpeg in images.items():
        (path / f"{frame_index + 1:05d}.jpg").write_bytes(jpeg)
    return path


def _write_pack(path: Path, images: list[bytes | None]) -> Path:
    with h5py.File(path, "w") as pack:
        pack["jpeg"] = np.frombuffer(b"".join(image or b"" for image in images), np.uint8)
        pack["offset"] = np.cumsum([0, *(len(image or b"") for image in images)], dtype=np.int64)
    return path


# --- folder and pack ---


def test_folder_knows_its_last_image_and_ignores_other_files(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "video", {0: b"first", 2: b"third", 99999: b"last"})
    for name in (".DS_Store", "Thumbs.db", "1.jpg", "00000.jpg", "00002.png"):
        (folder / name).touch()
    with open_video_crops(folder) as crops:
        assert isinstance(crops, JpegFolder)
        assert crops.num_frames == 100_000
        assert crops.read(0, 4) == [b"first", None, b"third", None]
        assert crops.read(99_999, 100_001) == [b"last", None]
        assert crops.present(4).tolist() == [True, False, True, False]
        assert crops.read(5, 5) == []


def test_empty_folder_has_no_frames(tmp_path: Path) -> None:
    with open_video_crops(_write_folder(tmp_path / "video", {})) as crops:
        assert crops.num_frames == 0
        assert crops.read(0, 2) == [None, None]


def test_folder_is_listed_once(tmp_path: Path) -> None:
    folder = _write_folder(tmp_path / "video", {0: b"first"})
    with open_video_crops(folder) as crops:
        (folder / "00002.jpg").write_bytes(b"later")
        assert crops.read(0, 2) == [b"first", None]


def test_pack_is_found_with_and_without_its_ending(tmp_path: Path) -> None:
    path = _write_pack(tmp_path / "2-30-640x360.v1.h5", [b"a", None, b"ccc", None])
    for given_path in (path, tmp_path / "2-30-640x360.v1"):
        with open_video_crops(given_path) as crops:
            assert isinstance(crops, CropPack)
            assert crops.num_frames == 4
            assert crops.read(0, 4) == [b"a", None, b"ccc", None]


@given(
    images=st.lists(st.none() | st.binary(min_size=1, max_size=9), min_size=1, max_size=12),
    start=st.integers(0, 14),
    length=st.integers(0, 14),
)
def test_any_span_of_a_pack_is_that_span_of_the_list(
    tmp_path_factory: pytest.TempPathFactory, images: list[bytes | None], start: int, length: int
) -> None:
    path = _write_pack(tmp_path_factory.mktemp("pack") / "video.h5", images)
    endless = images + [None] * 28
    with open_video_crops(path) as crops:
        assert crops.read(start, start + length) == endless[start : start + length]
        assert crops.present(start + length).tolist() == [image is not None for image in endless[: start + length]]


@pytest.mark.parametrize("layout", ["tree", "pack"])
def test_threads_may_share_a_source(tmp_path: Path, layout: str) -> None:
    images = [bytes([k]) * (k + 1) for k in range(200)]
    if layout == "tree":
        path = _write_folder(tmp_path / "video", dict(enumerate(images)))
    else:
        path = _write_pack(tmp_path / "video.h5", list(images))
    with open_video_crops(path) as crops, ThreadPoolExecutor(8) as pool:
        spans = list(pool.map(lambda start: crops.read(start, start + 10), range(0, 190)))
    assert spans == [images[start : start + 10] for start in range(190)]


def test_what_is_no_crops_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "features.h5", "w") as other:
        other["features"] = np.zeros(3)
    cut = _write_pack(tmp_path / "cut.h5", [JPEG] * 50)
    cut.write_bytes(cut.read_bytes()[:3000])
    for name, message in [
        ("missing", "No crops at .*missing"),
        ("text", "cannot be read as HDF5"),
        ("cut.h5", "cannot be read as HDF5"),
        ("features.h5", "not a pack of crops: it has no jpeg and no offset"),
    ]:
        with pytest.raises(DataError, match=message):
            open_video_crops(tmp_path / name)


def test_crop_set_has_a_name_only_where_it_was_recorded(tmp_path: Path) -> None:
    assert (
        crop_set_name(tmp_path, ["batch1/cropped_aligned/a", "cropped_aligned_new_50_vids/b", ""]) == "cropped_aligned"
    )
    record = tmp_path / "crops.json"
    record.write_text(json.dumps({"crop_set": "mine"}))
    assert crop_set_name(tmp_path, ["video"]) == "mine"
    for content in ("{", "[]", "{}"):
        record.write_text(content)
        with pytest.raises(DataError, match="no readable 'crop_set'"):
            crop_set_name(tmp_path, ["video"])


# --- decoding ---


def test_decoded_crop_is_the_image() -> None:
    decoded = decode_crop(JPEG)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - IMAGE).mean() < 3


def test_grey_jpeg_becomes_rgb() -> None:
    grey = np.ascontiguousarray(IMAGE[..., :1])
    decoded = decode_crop(simplejpeg.encode_jpeg(grey, 95, "GRAY", "Gray"))
    assert decoded.shape == (32, 32, 3)
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])
    assert np.abs(decoded[..., 0].astype(int) - grey[..., 0]).mean() < 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "empty"),
        (cv2.imencode(".png", IMAGE)[1].tobytes(), "PNG"),
        (b"GIF89a" + bytes(20), r"not a JPEG: it begins with b'GIF8'"),
        (JPEG[: len(JPEG) // 2], "damaged or cut off"),
        (JPEG[:20], "damaged or cut off"),
        (JPEG[:2], "damaged or cut off"),
        (b"\xff\xd8" + bytes(300), "damaged or cut off"),
    ],
    ids=["zero bytes", "PNG", "GIF", "half", "header only", "two bytes", "garbage"],
)
def test_broken_image_says_what_is_wrong(image: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_crop(image)


@given(st.integers(1, len(JPEG) - 3))
def test_no_cut_goes_unnoticed(length: int) -> None:
    """Also a cut in the last bytes of the image, which a lenient decoder would fill with grey."""
    with pytest.raises(DataError):
        decode_crop(JPEG[:length])
