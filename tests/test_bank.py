"""The bank goes where it fits and changes no number there; training takes its memory and little more."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.errors import ConfigError, StoreError
from vnaw_pipeline.features.bank import _first_that_fits, open_bank
from vnaw_pipeline.features.store import CHUNK_FRAMES, create_store
from vnaw_pipeline.prediction.predict import predict_videos
from vnaw_pipeline.processes import cgroup_room, memory_share
from vnaw_pipeline.stages import usable_cores
from vnaw_pipeline.training.windows import _compile, train_windows

from .conftest import DrawnData
from .test_store import FINGERPRINT, fill
from .test_training import changed, losses, train

NO_ROOM = "vnaw_pipeline.features.bank.memory_share"


def test_a_bank_that_does_not_fit_is_mapped_says_so_and_gives_the_same_numbers(
    drawn: DrawnData,
    drawn_store: Path,
    tiny_config: PipelineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tables(run: Path) -> pd.DataFrame:
        predict_videos(drawn.manifest, drawn_store, run, "validation")
        return pd.read_parquet(run / "predictions" / "validation_raw.parquet")

    train(drawn, drawn_store, tmp_path / "memory", tiny_config)
    wanted = tables(tmp_path / "memory")
    assert "do not fit" not in capsys.readouterr().err
    monkeypatch.setattr(NO_ROOM, lambda: 1_000)
    train(drawn, drawn_store, tmp_path / "mapped", tiny_config)
    assert losses(tmp_path / "mapped") == losses(tmp_path / "memory")
    pd.testing.assert_frame_equal(tables(tmp_path / "mapped"), wanted)
    said = [line for line in capsys.readouterr().err.splitlines() if "do not fit into 80% of the memory" in line]
    assert len(said) == 3, "a line for each of the banks of training, validation and prediction"
    monkeypatch.undo()
    elsewhere = changed(tiny_config.model_copy(update={"bank": "mapped"}), "train", accumulation=2)
    elsewhere = changed(elsewhere, "predict", batch_windows=7)
    report = train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "memory", elsewhere)
    assert report.skipped == 3, "a run may go on with its bank in another place, in parts"


def test_a_mapped_bank_equals_the_one_in_memory_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "s", FINGERPRINT, 3)
    for name, count in (("a", 7), ("b", CHUNK_FRAMES + 5)):
        fill(store, name, count)
    (tmp_path / "scratch").mkdir()
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    banks = [open_bank(store, ["b", "a"], shown=False, place=place) for place in ("memory", "mapped")]
    for name in ("embeddings", "valid", "first"):
        assert torch.equal(*(getattr(bank, name) for bank in banks))
    mapped = {line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if "(deleted)" in line}
    assert any("vnaw_bank." in name for name in mapped), "it lies in a file"
    assert list((tmp_path / "scratch").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match="Set TMPDIR to a folder"):
        open_bank(store, shown=False, place="mapped")
    memory = SimpleNamespace(mountpoint=str(tmp_path / "scratch"), fstype="tmpfs")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [SimpleNamespace(mountpoint="/", fstype="ext4"), memory])
    with pytest.raises(StoreError, match=r"scratch, whose files lie in memory \(tmpfs\)\. Set TMPDIR"):
        open_bank(store, shown=False, place="mapped")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(StoreError, match=r"TMPDIR is .*gone, which is no folder that can be written to"):
        open_bank(store, shown=False, place="mapped")


def test_the_smallest_room_of_all_processes_decides_and_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(NO_ROOM, lambda: 10_000)
    monkeypatch.setattr("vnaw_pipeline.features.bank.gather_all", lambda items: [*items, 4_000_000, 2_000])
    assert [_first_that_fits("device", size, torch.device("cpu")) for size in (1_600, 1_601)] == ["memory", "mapped"]
    trying = f"80% of the memory's free 2e-06 GB; trying a file in {tempfile.gettempdir()}.\n"
    assert capsys.readouterr().err.count(trying) == 1


def test_a_chunk_that_is_cut_off_or_gone_is_named_with_its_video(tmp_path: Path) -> None:
    store = create_store(tmp_path / "s", FINGERPRINT, 3)
    for name in ("a", "b"):
        fill(store, name, CHUNK_FRAMES + 5)
    chunk = tmp_path / "s" / "plain" / "b" / "c" / "1" / "0"
    whole = chunk.read_bytes()
    for damage in (lambda: chunk.write_bytes(whole[:-1]), chunk.unlink):
        damage()
        with pytest.raises(StoreError, match="lacks 1 of 2 videos in view 'plain', or parts of them: b"):
            open_bank(store, shown=False)
    chunk.write_bytes(whole)
    assert open_bank(store, shown=False).zero_row == 2 * (CHUNK_FRAMES + 5)


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts_and_cached_files_do_not(tmp_path: Path, version: int) -> None:
    assert cgroup_room(tmp_path) == float("inf"), "a system without them"
    names = ("max", "current", "") if version == 2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/\n{'0::' if version == 2 else '4:memory:'}/job/step\n")
    top = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    for folder, limit in ((top / "job", "5000"), (top / "job/step", "max" if version == 2 else str(2**62))):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"memory.{names[0]}").write_text(limit)
        (folder / f"memory.{names[1]}").write_text("3000")
        (folder / "memory.stat").write_text(f"{names[2]}inactive_file 700\n{names[2]}active_file 200\nanon 9\n")
    assert cgroup_room(tmp_path) == 5000 - 3000 + 900


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_cpu_quota_counts_and_a_part_of_a_core_is_one(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert usable_cores(tmp_path) == 64, "a system without control groups"
    (tmp_path / "proc/self").mkdir(parents=True)
    lines = "0::/job/step\n" if version == 2 else "3:memory:/other\n4:cpu,cpuacct:/job/step\n"
    (tmp_path / "proc/self/cgroup").write_text(lines)
    folder = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "cpu") / "job/step"
    folder.mkdir(parents=True)

    def limit(place: Path, quota: str) -> None:
        if version == 2:
            (place / "cpu.max").write_text(f"{quota} 100000\n")
        else:
            (place / "cpu.cfs_quota_us").write_text(f"{quota}\n".replace("max", "-1"))
            (place / "cpu.cfs_period_us").write_text("100000\n")

    limit(folder, "max")
    assert usable_cores(tmp_path) == 64
    limit(folder.parent, "250000")
    assert usable_cores(tmp_path) == 3
    limit(folder, "1000")
    assert usable_cores(tmp_path) == 1


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory_share()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_share() == pytest.approx(alone / 4, rel=0.2)


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="only Linux has this limit in psutil")
def test_a_limit_of_addresses_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = psutil.Process().memory_info().vms + 10**8
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: (limit, limit))
    assert memory_share() == pytest.approx(10**8, rel=0.5)
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: (1000, 1000))
    assert memory_share() == 0


WIDE = """
import os, resource, sys
from pathlib import Path
import torch
from vnaw_pipeline.bench.measure import peak_memory
from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.stages import usable_cores
from vnaw_pipeline.training.windows import train_windows

place, limit, *paths = sys.argv[1:]
open_store(paths[2]).valid("a")  # starts Zarr's threads, whose stacks are memory too
torch.ones(100, 100, requires_grad=True).mm(torch.ones(100, 100)).sum().backward()
config = PipelineConfig.model_validate({
    "bank": place,
    "windows": {"window_frames": 50, "train_stride": 50, "predict_stride": 50},
    "temporal": {"width": 16, "layers": 1, "feed_forward": 16},
    "train": {"epochs": 1, "batch_windows": 8},
})
used = {line.split(":")[0]: 1024 * int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")}
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (used["VmData"] + int(limit), resource.RLIM_INFINITY))
train_windows(*map(Path, paths), config)
print(peak_memory() - used["VmRSS"])
"""
WIDTH, FRAMES = 4096, 60_000
BANK_BYTES = 2 * WIDTH * FRAMES


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Manifest, annotations and store of two videos whose features take 490 MB."""
    root = tmp_path_factory.mktemp("wide")
    store = create_store(root / "store", FINGERPRINT, WIDTH)
    rows = []
    for video_id, split, count in (("a", "train", FRAMES - 500), ("b", "validation", 500)):
        store.add_video(video_id, count)
        for unit in store.units(video_id):
            size = unit.stop - unit.start
            store.write_unit(unit, np.full((size, WIDTH), 0.1, np.float16), np.ones(size, np.bool_))
        (root / f"{video_id}.txt").write_text(
            "Neutral,Anger,Disgust,Fear,Happiness,Sadness,Surprise,Other\n" + "\n".join(["0", "4"] * (count // 2))
        )
        rows.append((video_id, split, count, "", f"{video_id}.txt", "", video_id))
    columns = ["video_id", "split", "num_frames", "crops", "annotation", "fold", "source_video"]
    pd.DataFrame(rows, columns=columns).to_csv(root / "manifest.csv", index=False)
    return [str(root / "manifest.csv"), str(root), str(root / "store")]


def train_wide(wide: list[str], run: Path, place: str, limit: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", WIDE, place, str(limit), *wide, str(run)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_a_mapped_bank_trains_in_less_memory_than_it_has_bytes(wide: list[str], tmp_path: Path) -> None:
    limit = BANK_BYTES * 3 // 4
    mapped = train_wide(wide, tmp_path / "mapped", "mapped", limit)
    assert mapped.returncode == 0, mapped.stderr[-2000:]
    in_memory = train_wide(wide, tmp_path / "memory", "memory", limit)
    assert in_memory.returncode != 0
    assert "MemoryError" in in_memory.stderr, "the limit is a real one"


@pytest.mark.skipif(sys.platform != "linux", reason="memory in use as Linux counts it")
def test_training_takes_the_memory_of_its_bank_and_little_more(wide: list[str], tmp_path: Path) -> None:
    """A second bank, or a copy of the first in float32, would show."""
    finished = train_wide(wide, tmp_path / "run", "memory", 0)
    assert finished.returncode == 0, finished.stderr[-2000:]
    taken = int(finished.stdout.splitlines()[-1])
    assert BANK_BYTES < taken < BANK_BYTES + 4e8


def test_a_compiled_model_has_the_same_losses(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same float32 operations, fused: sums may run in another order. Dropout is off, since it draws otherwise."""
    plain = changed(changed(tiny_config, "temporal", dropout=0.0), "train", epochs=2)
    config = changed(plain, "train", compile=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="there is no g"):
        train(drawn, drawn_store, tmp_path / "none", config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"there is no gcc or clang.*in CC"):
        _compile(torch.nn.Identity())
    monkeypatch.undo()
    train(drawn, drawn_store, tmp_path / "plain", plain)
    torch._dynamo.utils.counters.clear()
    train(drawn, drawn_store, tmp_path / "compiled", config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
