"""The demo's pieces: the committed manifest is the rendered data's, the shipped encoder is fit for use, all runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vnaw_pipeline import demo
from vnaw_pipeline.config import PipelineConfig, load_config
from vnaw_pipeline.features.encoder import find_weights, load_encoder
from vnaw_pipeline.manifests import read_manifest, write_manifest
from vnaw_pipeline.rendering.dataset import render_annotations

from .conftest import TINY_PLAN

ROOT = Path(__file__).parent.parent


def test_the_committed_manifest_is_that_of_the_rendered_data(tmp_path: Path) -> None:
    """Rendered without its pictures; one empty image stands for those of a folder. To renew it, run `vnaw demo` and
    copy its manifest.csv."""
    render_annotations(tmp_path, seed=load_config(demo.DEMO_CONFIG).seed)
    for folder in (tmp_path / "crops").glob("*/*/"):
        (folder / "00001.jpg").touch()
    write_manifest(demo.demo_manifest(tmp_path), tmp_path / "m.csv")
    committed = ROOT / "data_manifests" / "demo_expr.csv"
    assert committed.read_bytes() == (tmp_path / "m.csv").read_bytes()
    table = read_manifest(committed)
    assert (table.num_frames < 100).any()
    assert table.video_id.str.endswith("_left").any()
    assert {"train", "validation", "test"} == set(table.split)


def test_the_shipped_encoder_loads_by_name() -> None:
    config = load_config(demo.DEMO_CONFIG).encoder
    assert isinstance(config.weights, Path)
    assert find_weights(config.weights).is_file()
    encoder = load_encoder(config)
    assert encoder.embedding_dim == 192
    assert find_weights(Path("nowhere.safetensors")) == Path("nowhere.safetensors")


def test_the_whole_demo_runs_and_runs_again(
    tiny_config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vnaw_pipeline.rendering.dataset.DatasetPlan", lambda: TINY_PLAN)
    monkeypatch.setattr("vnaw_pipeline.demo.FOLDS", 2)
    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    work = Path("demo_run")
    demo.run_demo(work, tiny_config, said.append)
    results = json.loads((work / "results.json").read_text())
    assert list(results) == [
        "majority class",
        "per-frame linear probe",
        "temporal, cross-entropy",
        "temporal, V-NAW",
    ]
    for scores in results.values():
        assert scores["truth"]["num_frames"] > scores["given"]["num_frames"], "the truth labels every frame"
        assert np.sum(scores["truth"]["confusion"]) == scores["truth"]["num_frames"]
    table = next(line for line in said if "macro-F1 on validation" in line)
    for name, scores in results.items():
        row = next(line for line in table.splitlines() if line.startswith(name))
        assert row.split()[-1] == f"{100 * scores['truth']['macro_f1']:.1f}"
    for name in ("confusion_given.png", "confusion_truth.png", "timeline.png", "infer.png"):
        assert (work / "figures" / name).stat().st_size > 5_000
    assert (work / "submission.txt").is_file()
    said.clear()
    demo.run_demo(work, tiny_config, said.append)
    assert any(line.startswith("extract: 0 chunks done") for line in said)
    assert json.loads((work / "results.json").read_text()) == results
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block.replace("talk.mp4", str(work / "infer" / "drawn_person.mp4")), "README.md", "exec"), {})
    assert "video_id" in capsys.readouterr().out
