"""Two nodes for real: two network namespaces of this machine, a cable between them, one shared folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.training.windows import train_windows

from .conftest import DrawnData
from .launch import QUICK, ROOT, SLOW_WRITES, ends, start, wait_until
from .test_extract import store_digest
from .test_processes import chunks_of, extract_line, train_line
from .test_training import changed, losses

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NODES = [f"vnaw{os.getpid()}{letter}" for letter in "ab"]
INSIDE = [["ip", "netns", "exec", node] for node in NODES]
CUT = "another process of this run has ended or cannot be reached"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def cable(state: str) -> None:
    """Plug it in ("up") or out ("down")."""
    ip("-n", NODES[0], "link", "set", "eth0", state)


@pytest.fixture
def _two_nodes() -> Iterator[None]:
    if shutil.which("ip") is None:
        pytest.skip("needs the program `ip` (iproute2) to make network namespaces")
    try:
        try:
            for node in NODES:
                ip("netns", "add", node)
            ip("link", "add", "eth0", "netns", NODES[0], "type", "veth", "peer", "name", "eth0", "netns", NODES[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces may not be made here: {error.stderr.strip()}")
        for node, address in zip(NODES, ADDRESSES, strict=True):
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                ip("-n", node, "link", "set", interface, "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False, capture_output=True)


def on_both(line: list[str], before: str = "") -> list[subprocess.Popen[str]]:
    """A process on each node, found by environment variables."""
    return [
        start(
            index,
            2,
            line,
            port=29500,
            host=ADDRESSES[0],
            before=before,
            inside=INSIDE[index],
            GLOO_SOCKET_IFNAME="eth0",
        )
        for index in range(2)
    ]


def torchrun_on_both(script: Path, line: list[str]) -> list[subprocess.Popen[str]]:
    """The same under a torchrun on each node."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29500"]
    return [
        subprocess.Popen(
            [*inside, sys.executable, "-m", "torch.distributed.run", *where, "--node-rank", str(index), script, *line],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index, inside in enumerate(INSIDE)
    ]


@pytest.mark.usefixtures("_two_nodes")
def test_two_nodes_extract_through_a_cut_cable(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "s"
    line = extract_line(drawn, tiny_config, store)
    both = on_both(line, before=QUICK + SLOW_WRITES)
    wait_until(lambda: chunks_of(store) >= 2, both)
    cable("down")
    for index, (code, _, errors) in enumerate(ends(both)):
        assert code == 1
        assert f"Process {index} of 2 on " in errors
        assert CUT in errors
        assert "Traceback" not in errors
    made = chunks_of(store)
    assert 2 <= made <= len(drawn.manifest)
    cable("up")
    (first, said, errors), (second, _, _) = ends(on_both(line))
    assert (first, second) == (0, 0), errors
    assert f"extract: {len(drawn.manifest) - made} chunks done, {made} skipped" in said
    assert store_digest(store) == store_digest(drawn_store)
    assert extract_features(drawn.manifest, drawn.crops, store, tiny_config).skipped == len(drawn.manifest)


@pytest.mark.usefixtures("_two_nodes")
def test_two_nodes_train_through_a_cut_cable(
    drawn: DrawnData, tiny_config: PipelineConfig, drawn_store: Path, tmp_path: Path
) -> None:
    """The losses are those of one process that nothing stopped, up to sums in another order. Dropout is off: its draws
    differ with the shape of a pass."""
    config = changed(changed(tiny_config, "temporal", dropout=0.0), "train", epochs=40)
    run = tmp_path / "run"
    line = train_line(drawn, config, drawn_store, run)
    script = tmp_path / "train.py"
    script.write_text(f"{QUICK}\nfrom vnaw_pipeline.cli import main\nmain()\n")
    both = torchrun_on_both(script, line)
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(losses(run)) >= 2, both)
    cable("down")
    for index, (code, _, errors) in enumerate(ends(both)):
        assert code == 1
        assert f"Process {index} of 2 on " in errors
        assert CUT in errors
    made = losses(run)
    assert 2 <= len(made) < 40
    cable("up")
    (first, said, errors), (second, _, _) = ends(torchrun_on_both(script, line))
    assert (first, second) == (0, 0), errors
    assert f"train: {40 - len(made)} epochs done, {len(made)} skipped" in said
    train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "one", config)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
