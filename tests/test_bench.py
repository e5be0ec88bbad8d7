"""Every measurement runs at a tiny size and yields figures of the right form; goals, table and refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vnaw_pipeline.bench import run
from vnaw_pipeline.bench.data import FULL_VIDEOS, make_videos, manifest_of, write_annotations, write_crops
from vnaw_pipeline.bench.encoding import centred_cosine
from vnaw_pipeline.bench.figure import Figure, Goal, markdown_table
from vnaw_pipeline.bench.measure import of_turns, peak_memory_of
from vnaw_pipeline.bench.run import MEASUREMENTS, run_bench
from vnaw_pipeline.bench.size import FULL, QUICK, TINY_ENCODER, Size
from vnaw_pipeline.cli import app
from vnaw_pipeline.config import TemporalConfig
from vnaw_pipeline.errors import ConfigError, DataError
from vnaw_pipeline.manifests import build_manifest
from vnaw_pipeline.tasks import TASKS

TINY = replace(
    QUICK,
    repeats=1,
    disk_bytes=1,
    encoder=TINY_ENCODER,
    encoder_px=32,
    extraction_frames=64,
    eager_frames=32,
    drawn=replace(QUICK.drawn, train_videos=4, validation_videos=2, frames=(60, 70), short_frames=30),
    drawn_epochs=1,
    widths=(16, 24),
    temporal=TemporalConfig(width=16, layers=1, feed_forward=16),
    bank_videos=3,
    npy_frames=10,
    batch_windows=8,  # more than a forward pass of the default model takes on a CPU
    step_windows=4,
    steps=1,
    prediction_videos=3,
    extraction_memory_frames=(20, 40),
    prediction_memory_frames=(200, 400),
    scale_videos=(3, 4, 6),
)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_gives_figures_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    figures = list(run_bench(tmp_path, TINY, [name]))
    assert figures
    for figure in figures:
        assert math.isfinite(figure.value), figure
        assert list(figure.as_json()) == ["name", "value", "goal", "holds", "detail"]
        assert figure.detail
    assert len({figure.name for figure in figures}) == len(figures)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_figures_as_json_and_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = [Figure("a / b", 0.5, Goal("at least", 0.7), "slow"), Figure("c", 2.0, None, "seen")]
    monkeypatch.setattr(run, "MEASUREMENTS", {"some": lambda work, size: figures})
    done = CliRunner().invoke(
        app, ["bench", "--quick", "--work-dir", str(tmp_path), "--json", str(tmp_path / "b.json")]
    )
    assert done.exit_code == 0, done.output
    assert markdown_table(figures) in done.output
    assert json.loads((tmp_path / "b.json").read_text()) == [
        {"name": "a / b", "value": 0.5, "goal": 0.7, "holds": False, "detail": "slow"},
        {"name": "c", "value": 2.0, "goal": None, "holds": None, "detail": "seen"},
    ]


def test_figures_that_were_found_stay_when_a_later_measurement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(work: Path, size: Size) -> list[Figure]:
        raise DataError("no room left")

    found = [Figure("c", 2.0, None, "seen")]
    monkeypatch.setattr(run, "MEASUREMENTS", {"some": lambda work, size: found, "broken": broken})
    done = CliRunner().invoke(
        app, ["bench", "--quick", "--work-dir", str(tmp_path / "work"), "--json", str(tmp_path / "b.json")]
    )
    assert done.exit_code != 0
    assert [row["name"] for row in json.loads((tmp_path / "b.json").read_text())] == ["c"]
    assert list((tmp_path / "work").iterdir()) == []


def test_the_table_says_what_holds() -> None:
    lines = markdown_table(
        [Figure("a", 0.5, Goal("at least", 0.7), "x"), Figure("b", 1.0, Goal("at most", 1.03), "y")]
    ).splitlines()
    assert lines[2:] == ["| a | 0.5 | at least 0.7 | **no** | x |", "| b | 1 | at most 1.03 | yes | y |"]


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_goal_holds_on_its_side_only(value: float, bound: float) -> None:
    assert Goal("at least", bound).holds(value) == (value >= bound)
    assert Goal("at most", bound).holds(value) == (value <= bound)
    assert not Goal("at most", bound).holds(math.nan)


def test_turns_are_medians_and_the_ratio_is_that_of_each_turn() -> None:
    """A machine that is slow for one turn is slow for both sides of it."""
    assert of_turns([(1.0, 2.0), (10.0, 20.0), (1.2, 2.0)]) == (1.2, 2.0, 0.5)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no measurement memcpy; there are extraction, backend"):
        list(run_bench(tmp_path, TINY, ["bank", "memcpy"]))


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    needed = shutil.disk_usage(tmp_path).total * 2
    with pytest.raises(DataError, match="GB free; measurements write"):
        list(run_bench(tmp_path, replace(TINY, disk_bytes=needed), ["bank"]))
    assert list(tmp_path.iterdir()) == []


def test_synthetic_videos_have_the_sizes_of_aff_wild2() -> None:
    videos = make_videos(FULL_VIDEOS)
    lengths = np.array([video.num_frames for video in videos])
    assert (lengths.min(), lengths.max()) == (73, 47_435)
    assert np.median(lengths) == pytest.approx(4_002, rel=0.01)
    assert lengths.sum() == pytest.approx(2_700_000, rel=0.02)
    of_split = {
        split: [video.num_frames for video in videos if video.split == split]
        for split in ("train", "validation", "test")
    }
    assert [len(of_split[split]) for split in of_split] == [250, 70, 228]
    assert sum(of_split["validation"]) == pytest.approx(453_535, rel=0.02)
    assert sum(of_split["test"]) == pytest.approx(1_022_655, rel=0.002)
    for num_videos in range(3, 30):
        assert {video.split for video in make_videos(num_videos)} == {"train", "validation", "test"}


def test_the_synthetic_folders_are_those_of_their_manifest(tmp_path: Path) -> None:
    videos = [replace(video, num_frames=20 + index) for index, video in enumerate(make_videos(6))]
    write_annotations(tmp_path / "annotations", videos)
    write_crops(tmp_path / "crops", videos, 32)
    built = build_manifest(
        tmp_path / "annotations", tmp_path / "crops", TASKS["expr8"], test_list=_test_list(tmp_path, videos)
    )
    order = ["video_id"]
    assert built.sort_values(order).to_dict("list") == manifest_of(videos).sort_values(order).to_dict("list")


def test_centred_cosine_sees_what_a_common_part_hides() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(50, 8)).astype(np.float32)
    np.testing.assert_allclose(centred_cosine(3 * wanted + 5, wanted), 1, atol=1e-6)
    assert centred_cosine(rng.normal(size=(50, 8)).astype(np.float32) + 100, wanted + 100).mean() < 0.5


def test_peak_memory_is_that_of_its_own_process() -> None:
    """What this process holds beside is no part of it, and what the call takes is."""
    held = np.ones(400_000_000, np.uint8)
    few, many = peak_memory_of(np.ones, 10), peak_memory_of(np.ones, 25_000_000)
    assert few < len(held)
    assert many - few == pytest.approx(200_000_000, rel=0.1)


def _test_list(folder: Path, videos: list) -> Path:
    path = folder / "list.txt"
    path.write_text("".join(f"{video.video_id}\n" for video in videos if video.split == "test"))
    return path


def test_a_size_of_other_videos_needs_room_for_them() -> None:
    large = FULL.of_videos(2 * FULL_VIDEOS)
    assert large.disk_bytes == 2 * FULL.disk_bytes
    assert large.scale_videos[-1] == large.prediction_videos == 2 * FULL_VIDEOS
    assert sorted(set(QUICK.of_videos(30).scale_videos)) == [3, 5, 30]
