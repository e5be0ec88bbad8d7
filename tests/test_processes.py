"""Several processes: they agree before they write, none outlives another for long, and a rerun does what is missing."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vnaw_pipeline import processes
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import ProcessError
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import create_store, open_store
from vnaw_pipeline.locations import files_below
from vnaw_pipeline.processes import agree
from vnaw_pipeline.training.windows import train_windows

from .conftest import DrawnData
from .launch import ROOT, SLOW_WRITES, ends, free_port, start, wait_until
from .test_extract import store_digest
from .test_training import changed, losses


def extract_line(drawn: DrawnData, config: PipelineConfig, store: Path, name: str = "config") -> list[str]:
    path = store.parent / f"{name}.yaml"
    path.write_text(dump_config(config))
    options = {"--manifest": drawn.manifest_path, "--crops": drawn.crops, "--store": store, "--config": path}
    return ["extract", *(str(part) for pair in options.items() for part in pair)]


def train_line(drawn: DrawnData, config: PipelineConfig, store: Path, run: Path) -> list[str]:
    path = run.parent / "train.yaml"
    path.write_text(dump_config(config))
    options = {"--manifest": drawn.manifest_path, "--annotations": drawn.annotations, "--store": store}
    options |= {"--run-dir": run, "--config": path}
    return ["train", *(str(part) for pair in options.items() for part in pair)]


def chunks_of(store: Path) -> int:
    """Finished chunks."""
    return len([path for path in (store / "plain").glob("*/c/*/*") if path.suffix != ".partial"])


def test_processes_that_differ_are_named_and_write_nothing(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    """A copy of the program that differs in a comment, and a config that differs in a value."""
    shutil.copytree(ROOT / "vnaw_pipeline", tmp_path / "other" / "vnaw_pipeline")
    with (tmp_path / "other" / "vnaw_pipeline" / "errors.py").open("a") as module:
        module.write("# changed\n")
    other = changed(tiny_config, "extract", batch_frames=8)
    lines = [extract_line(drawn, tiny_config, tmp_path / "s"), extract_line(drawn, other, tmp_path / "s", "other")]
    port = free_port()
    both = [start(0, 2, lines[0], port=port), start(1, 2, lines[1], port=port, code=tmp_path / "other")]
    for code, _, errors in ends(both):
        assert code == 1
        assert "nothing was written" in errors
        assert "process 1 on " in errors
        assert "extract.batch_frames: found 8, wanted 16" in errors
        assert "code: found " in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "s").exists()


def test_every_fact_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes the last has other weights; nested facts are named by their path."""

    weights = ["4567", "4567", "4567"]

    def as_three(items: list[tuple[str, dict[str, object]]]) -> list[tuple[str, dict[str, object]]]:
        ((_, facts),) = items
        return [(host, {**facts, "fingerprint.weights": of}) for host, of in zip("abc", weights, strict=True)]

    class Three:
        num_processes = 3

    monkeypatch.setattr(processes, "process_state", Three)
    monkeypatch.setattr(processes, "gather_all", as_three)
    agree({"fingerprint": {"weights": "4567"}})
    weights[2] = "0123"
    with pytest.raises(ProcessError, match=r"process 2 on c: fingerprint.weights: found '0123', wanted '4567'\n"):
        agree({"fingerprint": {"weights": "4567"}})
    other_stage = {f"train.{number}": number for number in range(30)}  # the last process runs another stage
    monkeypatch.setattr(processes, "gather_all", lambda items: [*items, *items, ("c", {**items[0][1], **other_stage})])
    with pytest.raises(ProcessError, match=r"train\.15: [^;]*; \.\.\. and 22 more\n"):
        agree({"fingerprint": {"weights": "4567"}})


@pytest.mark.parametrize(
    ("error", "least"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer"), 120),
        (torch.distributed.DistNetworkError("no route"), 120),
        (RuntimeError("cannot read /data/gloomy"), 10),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 10),
    ],
)
def test_only_an_error_of_the_network_waits_until_the_others_are_known_to_be_gone(
    error: RuntimeError, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was frozen comes back to closed connections, and knows why a minute later."""
    waited: list[float] = []
    heartbeat = SimpleNamespace(thread=SimpleNamespace(join=waited.append))
    monkeypatch.setattr(processes, "_heartbeat", heartbeat)
    processes.hear_out_heartbeat(error)
    assert waited == [least]


def test_a_lost_process_stops_the_extraction_and_a_rerun_does_the_rest(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    line = extract_line(drawn, tiny_config, tmp_path / "s")
    port = free_port()
    both = [start(index, 2, line, port=port, before=SLOW_WRITES) for index in range(2)]
    wait_until(lambda: chunks_of(tmp_path / "s") >= 2, both)
    both[1].kill()
    (code, _, errors), (killed, _, _) = ends(both, timeout=60)
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "Process 0 of 2 on " in errors
    assert "another process of this run has ended or cannot be reached" in errors
    assert "Traceback" not in errors
    made = chunks_of(tmp_path / "s")
    assert 2 <= made < len(drawn.manifest), "the survivor must not have made the rest"
    again = extract_features(drawn.manifest, drawn.crops, tmp_path / "s", tiny_config)
    assert (again.skipped, again.done) == (made, len(drawn.manifest) - made)
    assert store_digest(tmp_path / "s") == store_digest(drawn_store)


@pytest.mark.parametrize("others", [set(), {"s/zarr.json"}], ids=["nothing there", "another store there"])
def test_a_process_that_does_not_see_the_store_says_so_and_makes_none(
    others: set[str], drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    """Each process in a folder of its own, as on two machines without a shared file system."""
    line = extract_line(drawn, tiny_config, tmp_path / "s")
    line[line.index(str(tmp_path / "s"))] = "s"
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    if others:
        create_store(folders[1] / "s", {"encoder": "another"}, 3)
    before = [f"import os, vnaw_pipeline; os.chdir({str(folder)!r})" for folder in folders]
    port = free_port()
    _, (code, _, errors) = ends([start(index, 2, line, port=port, before=before[index]) for index in range(2)])
    assert code == 1
    assert "Process 1 of 2 on " in errors
    assert "does not see the store that process 0 made at s." in errors
    assert "Traceback" not in errors
    assert files_below(folders[1]).keys() == others
    assert (folders[1] / "s").exists() == bool(others)


def test_more_processes_than_chunks_leave_one_without_work(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    video = drawn.manifest.iloc[:1]
    video.to_csv(tmp_path / "one.csv", index=False)
    line = extract_line(drawn, tiny_config, tmp_path / "s")
    line[line.index(str(drawn.manifest_path))] = str(tmp_path / "one.csv")
    port = free_port()
    (code, said, errors), (other, _, _) = ends([start(index, 2, line, port=port) for index in range(2)])
    assert (code, other) == (0, 0), errors
    assert "extract: 1 chunk done" in said
    found, wanted = (open_store(path).embeddings(video.video_id[0]) for path in (tmp_path / "s", drawn_store))
    assert found.tobytes() == wanted.tobytes()


def test_a_lost_process_stops_the_training_and_a_rerun_goes_on(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    """On with another number of processes too. Dropout is off: its draws differ with the shape of a pass."""
    config = changed(changed(tiny_config, "temporal", dropout=0.0), "train", epochs=60)
    line = train_line(drawn, config, drawn_store, tmp_path / "a")
    port = free_port()
    both = [start(index, 2, line, port=port) for index in range(2)]
    metrics = tmp_path / "a" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(losses(tmp_path / "a")) >= 2, both)
    both[1].kill()
    (code, _, errors), _ = ends(both, timeout=60)
    assert code == 1
    assert "another process of this run has ended or cannot be reached" in errors
    assert "Traceback" not in errors
    made = losses(tmp_path / "a")
    assert 2 <= len(made) < 60
    report = train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "a", config)
    assert report.skipped == len(made)
    assert losses(tmp_path / "a")[: len(made)] == made
    train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "whole", config)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_a_process_that_waits_in_vain_says_for_whom(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    soon = "import datetime, vnaw_pipeline.processes as p; p._PATIENCE = datetime.timedelta(seconds=2)"
    line = extract_line(drawn, tiny_config, tmp_path / "s")
    port = free_port()
    ((code, _, errors),) = ends([start(0, 2, line, port=port, before=soon)])
    assert code == 1
    assert "Process 0 of 2 on " in errors
    assert f"could not join the others at 127.0.0.1:{port}" in errors
    assert not (tmp_path / "s").exists()


def test_a_terminated_command_says_that_it_can_go_on() -> None:
    """As a queue ends a job, or torchrun the processes beside one that died."""
    program = (
        "import os, signal, vnaw_pipeline.cli as c; c.app = lambda: os.kill(os.getpid(), signal.SIGTERM); c.main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert "run the same command again to finish" in ended.stderr


def test_a_process_that_cannot_know_its_gpu_does_not_become_a_run_of_its_own() -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True; import vnaw_pipeline.processes as p; p.process_state()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    finished = subprocess.run(
        [sys.executable, "-c", f"{code}; process_state()"],
        cwd=ROOT,
        env={**environment, "RANK": "2", "WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Process 2 of 4" in finished.stderr
    assert "Start it with LOCAL_RANK set too" in finished.stderr
