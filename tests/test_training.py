"""Training: it learns, it is repeatable, it goes on after a kill, and processes and passes change nothing."""

import itertools
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig, PredictConfig, SmoothConfig, dump_config, load_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError, StoreError
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import create_store, open_store
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.manifests import build_manifest
from vnaw_pipeline.prediction.evaluate import evaluate_predictions
from vnaw_pipeline.prediction.predict import predict_videos
from vnaw_pipeline.runs import RunFolder, open_run
from vnaw_pipeline.tasks import TASKS
from vnaw_pipeline.temporal import TemporalModel
from vnaw_pipeline.training.loop import Optimisation, Recipe, fit, learning_rate_share, split_step
from vnaw_pipeline.training.windows import train_windows
from vnaw_pipeline.windows.batches import WindowBatch, gather_windows

from .conftest import DrawnData


def changed(config: PipelineConfig, section: str, **values: object) -> PipelineConfig:
    part = getattr(config, section)
    return PipelineConfig.model_validate({**config.model_dump(), section: {**part.model_dump(), **values}})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def scores(run: Path) -> list[float]:
    return [json.loads(line)["macro_f1"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train(drawn: DrawnData, store: Path, run: Path, config: PipelineConfig, **options: bool) -> None:
    train_windows(drawn.manifest, drawn.annotations, store, run, config, **options)


def optimisation(epochs: int, **changes: object) -> Optimisation:
    values = {
        "epochs": epochs,
        "steps_per_epoch": 4,
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "warmup_share": 0.0,
        "max_grad_norm": None,
        "precision": "fp32",
        "tracker": None,
        "seed": 0,
    }
    return Optimisation(**{**values, **changes})  # type: ignore[arg-type]


def regression(accumulation: int = 1) -> tuple[Recipe[torch.Tensor], nn.Module]:
    """Fit y = 2x with dropout in the way, so that the random state matters."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2 if accumulation == 1 else 0.0), nn.Linear(8, 1))

    def steps(epoch: int) -> list[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        return [list(torch.randn(12, 1, generator=generator).tensor_split(accumulation)) for _ in range(4)]

    def objective(model: nn.Module, x: torch.Tensor, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        return (model(x) - 2 * x).square().sum(), torch.tensor(len(x))

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training, "an epoch is scored in eval mode"
        x = torch.linspace(-1, 1, 9)[:, None]
        with torch.inference_mode():
            return {"macro_f1": -float((model(x) - 2 * x).square().mean())}

    return Recipe(model=model, steps=steps, objective=objective, evaluate=evaluate, header={}, label="fit"), model


def test_fit_learns_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    recipe, _ = regression()
    history = fit(recipe, optimisation(12), RunFolder(tmp_path))
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    best = max(history, key=lambda row: row["macro_f1"])
    _, header = load_tensors(RunFolder(tmp_path).best)
    assert header["epoch"] == best["epoch"]
    assert [row["epoch"] for row in history] == list(range(12))


def test_a_loss_that_is_no_number_ends_the_training_and_keeps_what_was_written(tmp_path: Path) -> None:
    recipe, _ = regression()
    steps = recipe.steps
    broken = replace(recipe, steps=lambda epoch: [[x * (math.nan if epoch == 2 else 1)] for (x,) in steps(epoch)])
    with pytest.raises(DataError, match=r"loss became nan in epoch 2, at learning rate 0\.05 in fp32; .*epochs before"):
        fit(broken, optimisation(4), RunFolder(tmp_path))
    assert len(losses(tmp_path)) == 2
    assert all(tensor.isfinite().all() for tensor in load_tensors(RunFolder(tmp_path).last)[0].values())


def test_going_on_equals_not_having_stopped(tmp_path: Path) -> None:
    recipe, whole = regression()
    fit(recipe, optimisation(6), RunFolder(tmp_path / "whole"))

    class KilledError(Exception):
        pass

    recipe, _ = regression()
    real_evaluate = recipe.evaluate
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KilledError
        return real_evaluate(model)

    interrupted = Recipe(**{**recipe.__dict__, "evaluate": evaluate})
    with pytest.raises(KilledError):
        fit(interrupted, optimisation(6), RunFolder(tmp_path / "parts"))
    assert len(losses(tmp_path / "parts")) == 3
    recipe, resumed = regression()
    fit(recipe, optimisation(6), RunFolder(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """The gradient of a step is the mean over its units however they are split, also unevenly (12 into 5)."""
    for parts in (2, 5):
        once, twice = [
            fit(regression(count)[0], optimisation(3), RunFolder(tmp_path / f"{parts}-{index}"))
            for index, count in enumerate((parts, 12))
        ]
        for a, b in zip(once, twice, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_learning_rate_curve() -> None:
    plan = optimisation(10, warmup_share=0.1)
    shares = [learning_rate_share(step, plan) for step in range(40)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[22] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(shares[4:]))
    assert 0 < shares[-1] < 0.01


def test_a_step_is_split_without_loss() -> None:
    units = torch.arange(11)
    parts = [part for index in range(2) for part in split_step(units, index, 2, 2)]
    assert sorted(torch.cat(parts).tolist()) == list(range(11))
    assert {len(part) for part in parts} == {2, 3}
    with pytest.raises(ConfigError, match="A step of 3 cannot be split over 2 processes x 2 passes"):
        split_step(torch.arange(3), 0, 2, 2)


def test_same_seed_same_losses_other_seed_other(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    train(drawn, drawn_store, tmp_path / "a", tiny_config)
    train(drawn, drawn_store, tmp_path / "b", tiny_config)
    other = tiny_config.model_copy(update={"seed": 1})
    with pytest.raises(CheckpointError, match="seed: found 0, wanted 1"):
        train(drawn, drawn_store, tmp_path / "b", other)
    train(drawn, drawn_store, tmp_path / "other", other)
    assert losses(tmp_path / "other") != losses(tmp_path / "a")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    record = json.loads((tmp_path / "a" / "record.json").read_text())
    assert record["features"] == open_store(drawn_store).fingerprint
    assert load_config(tmp_path / "a" / "config.yaml") == tiny_config


def test_a_rerun_of_a_finished_run_does_nothing_and_overwrite_starts_afresh(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    train(drawn, drawn_store, tmp_path / "a", tiny_config)
    kept = [
        tmp_path / "a" / "checkpoint" / "last.safetensors",
        tmp_path / "a" / "record.json",
    ]  # where `tune` writes too
    before = [path.stat().st_mtime_ns for path in kept]
    report = train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "a", tiny_config)
    assert (report.done, report.skipped) == (0, 3)
    assert [path.stat().st_mtime_ns for path in kept] == before
    (tmp_path / ".a.removed" / "left by a kill").mkdir(parents=True)
    report = train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "a", tiny_config, overwrite=True)
    assert (report.done, report.skipped) == (3, 0)


def test_it_can_learn_two_windows_by_heart(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, "train", epochs=200, batch_windows=16)
    config = changed(config, "temporal", dropout=0.0, width=64, feed_forward=128)
    config = changed(config, "windows", erase_share=0.0, skip={"mode": "none"})
    config = changed(config, "loss", weighting="none")
    few = drawn.manifest[(drawn.manifest.split == "validation") | (drawn.manifest.index < 1)]
    train_windows(few, drawn.annotations, drawn_store, tmp_path / "a", config)
    found = losses(tmp_path / "a")
    assert found[-1] < 0.35 * found[0], found[::10]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("loss", {"level": "window"}),
        ("loss", {"weighting": "none"}),
        ("loss", {"preset": "public-code"}),
        ("loss", {"normalised": False}),
        ("loss", {"weights_carry_gradient": True}),
        ("loss", {"mix": "one-plus"}),
        ("loss", {"lam_a": 0.1}),
        ("loss", {"naw_from": 0.5}),
        ("loss", {"label_smoothing": 0.2}),
        ("loss", {"objective": "focal"}),
        ("loss", {"objective": "gce"}),
        ("loss", {"objective": "elr"}),
        ("loss", {"objective": "bootstrap"}),
        ("loss", {"weighting": "class"}),
        ("loss", {"weighting": "complement"}),
        ("windows", {"erase_share": 0.5}),
        ("windows", {"skip": {"mode": "mask"}}),
        ("windows", {"skip": {"mode": "resample"}}),
        ("windows", {"skip": {"mode": "drop", "share": [0.7, 0.8]}}),
        ("windows", {"random_masking": {"mode": "frames"}}),
        ("windows", {"random_masking": {"mode": "elements"}}),
        ("windows", {"train_stride": 10}),
        ("temporal", {"position": "sinusoidal"}),
        ("temporal", {"position": "rotary"}),
        ("temporal", {"causal": True}),
        ("temporal", {"tcn_blocks": 1}),
        ("temporal", {"drop_path": 0.5}),
        ("temporal", {"dropout": 0.5}),
        ("train", {"sampling": "uniform"}),
        ("train", {"sampling": "square-root"}),
        ("train", {"weight_decay": 0.5}),
        ("train", {"warmup_share": 0.5}),
        ("train", {"windows_per_epoch": 7}),
        ("train", {"max_grad_norm": 0.01}),
        ("train", {"precision": "bf16"}),
    ],
)
def test_every_value_changes_the_training(
    section: str,
    values: dict[str, object],
    drawn: DrawnData,
    drawn_store: Path,
    tiny_config: PipelineConfig,
    reference_losses: list[float],
    tmp_path: Path,
) -> None:
    """No flag that nothing reads."""
    train(drawn, drawn_store, tmp_path / "a", changed(tiny_config, section, **values))
    assert losses(tmp_path / "a") != reference_losses


@pytest.fixture(scope="module")
def viewed_store(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The drawn store with a mirrored and an erased view beside the plain one."""
    path = tmp_path_factory.mktemp("viewed") / "features.zarr"
    shutil.copytree(drawn_store, path)
    config = changed(tiny_config, "extract", views=["plain", "mirror", "erase0"])
    assert extract_features(drawn.manifest, drawn.crops, path, config).ok
    return path


@pytest.mark.parametrize(
    ("section", "values", "view"),
    [
        ("windows", {"views": ["plain", "erase0"]}, "erase0"),
        ("windows", {"views": ["mirror"]}, "mirror"),
        ("loss", {"consistency": 0.4}, "mirror"),
    ],
)
def test_views_of_the_store_are_trained_on(
    section: str,
    values: dict[str, object],
    view: str,
    drawn: DrawnData,
    drawn_store: Path,
    viewed_store: Path,
    tiny_config: PipelineConfig,
    reference_losses: list[float],
    tmp_path: Path,
) -> None:
    config = changed(tiny_config, section, **values)
    train(drawn, viewed_store, tmp_path / "a", config)
    assert losses(tmp_path / "a") != reference_losses
    with pytest.raises(StoreError, match=f"has no view '{view}', only plain"):
        train(drawn, drawn_store, tmp_path / "b", config)


def test_views_that_are_not_asked_for_change_nothing(
    drawn: DrawnData, viewed_store: Path, tiny_config: PipelineConfig, reference_losses: list[float], tmp_path: Path
) -> None:
    train(drawn, viewed_store, tmp_path / "a", tiny_config)
    assert losses(tmp_path / "a") == reference_losses


@pytest.mark.parametrize(
    ("section", "choice", "values"),
    [
        ("loss", {"objective": "focal"}, {"focal_gamma": 1.0}),
        ("loss", {"objective": "gce"}, {"gce_q": 0.2}),
        ("loss", {"objective": "elr"}, {"elr_weight": 1.0}),
        ("loss", {"objective": "elr"}, {"level": "window"}),
        ("loss", {"objective": "bootstrap"}, {"bootstrap_beta": 0.5}),
        ("loss", {"level": "window"}, {"mix": "one-plus"}),
        ("windows", {"skip": {"mode": "resample"}}, {"skip": {"mode": "resample", "speed": [0.9, 1.1]}}),
        (
            "windows",
            {"random_masking": {"mode": "elements"}},
            {"random_masking": {"mode": "elements", "probability": 0.2}},
        ),
    ],
)
def test_every_value_of_a_choice_changes_the_training(
    section: str,
    choice: dict[str, object],
    values: dict[str, object],
    drawn: DrawnData,
    drawn_store: Path,
    tiny_config: PipelineConfig,
    tmp_path: Path,
) -> None:
    """Keys that only one objective or mode reads."""
    train(drawn, drawn_store, tmp_path / "a", changed(tiny_config, section, **choice))
    train(drawn, drawn_store, tmp_path / "b", changed(tiny_config, section, **{**choice, **values}))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_frame_is_learnt_with_the_label_on_its_own_line_and_a_window_has_one_set_of_erased_channels(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every channel of a frame's embedding tells the label that line k of the text file gives to image k.

    Public codes are one frame off there, count frames without a label (here 9) as a class, and erase another set of
    channels in each frame.
    """
    store = create_store(tmp_path / "told", open_store(drawn_store).fingerprint, 16)
    for row in drawn.manifest[drawn.manifest.annotation != ""].itertuples():
        told = np.array([int(line) for line in (drawn.annotations / row.annotation).read_text().split()[1:]])
        store.add_video(row.video_id, row.num_frames)
        (unit,) = store.units(row.video_id)
        embeddings = np.where(told < 0, 9, told + 1).astype(np.float16)[:, None].repeat(16, axis=1)
        store.write_unit(unit, embeddings, np.ones(row.num_frames, np.bool_))
    batches = []
    seen: list[torch.Tensor] = []

    def recorded(*arguments: Any) -> WindowBatch:
        batch = gather_windows(*arguments)
        batches.append(batch._replace(embeddings=batch.embeddings.clone()))  # erasing changes the batch itself
        return batch

    def see(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, TemporalModel) and module.training:
            seen.append(arguments[0])

    monkeypatch.setattr("vnaw_pipeline.training.windows.gather_windows", recorded)
    hook = nn.modules.module.register_module_forward_pre_hook(see)
    train(drawn, store.path, tmp_path / "run", tiny_config)
    hook.remove()
    assert len(seen) == len(batches) > 0
    for batch, embeddings in zip(batches, seen, strict=True):
        labels = torch.where(batch.labels["expr8"] < 0, 9, batch.labels["expr8"] + 1)
        assert torch.equal(batch.embeddings[batch.valid], labels[batch.valid][:, None].expand(-1, 16).half())
        for window, valid in zip(embeddings, batch.valid, strict=True):
            erased = window[valid] == 0
            assert (erased == erased[0]).all()
            assert int(erased[0].sum()) == round(0.2 * 16)
    assert any((batch.labels["expr8"][batch.valid] < 0).any() for batch in batches), "some frames have no label"


def test_remembered_predictions_survive_a_stop(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_config, "loss", objective="elr", level="window")
    train(drawn, drawn_store, tmp_path / "whole", config)
    real = RunFolder.write_metrics

    def stop_after_two(self: RunFolder, history: list[dict[str, object]]) -> None:
        real(self, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_metrics", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train(drawn, drawn_store, tmp_path / "parts", config)
    memory = load_tensors(tmp_path / "parts" / "checkpoint" / "last.safetensors")[0]["memory.predictions"]
    assert ((memory > 0).all(dim=1) | (memory == 0).all(dim=1)).all()
    assert (memory[:-1] > 0).any()
    assert (memory[-1] == 0).all(), "the row of no frame is never remembered"
    learnt = drawn.manifest.video_id[drawn.manifest.split == "train"]
    valid = np.concatenate([open_store(drawn_store).valid(video_id) for video_id in learnt])
    assert not valid.all()
    assert (memory[:-1][~torch.from_numpy(valid)] == 0).all(), "nor is one without a face"
    train(drawn, drawn_store, tmp_path / "parts", config)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.fixture(scope="module")
def reference_losses(
    drawn: DrawnData,
    drawn_store: Path,
    tiny_config: PipelineConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[float]:
    run = tmp_path_factory.mktemp("reference")
    train(drawn, drawn_store, run, tiny_config)
    return losses(run)


def test_accumulation_and_processes_change_nothing(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    """Same loss per step up to float32 sums, and the same scores, which count every validation frame once. Dropout is
    off: its draws differ with the shape of a pass. Six windows over four processes are shares of two and of one."""
    config = changed(changed(tiny_config, "temporal", dropout=0.0), "train", batch_windows=6)
    train(drawn, drawn_store, tmp_path / "one", config)
    train(drawn, drawn_store, tmp_path / "parts", changed(config, "train", accumulation=2))
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config.model_copy(update={"bank": "mapped"})))  # one file for all
    for processes in ("2", "4"):
        options = {
            "--manifest": drawn.manifest_path,
            "--annotations": drawn.annotations,
            "--store": drawn_store,
            "--run-dir": tmp_path / processes,
            "--config": config_path,
        }
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "-m", "vnaw_pipeline"]
        line += ["train", *(str(part) for pair in options.items() for part in pair)]
        finished = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
        assert finished.returncode == 0, finished.stderr[-2000:]
    for other in ("parts", "2", "4"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        assert scores(tmp_path / other) == pytest.approx(scores(tmp_path / "one"), abs=1e-6)


def test_a_killed_training_goes_on_with_the_same_losses(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, "train", epochs=40)
    config_path = tmp_path / "config.yaml"
    config_path.write_text(dump_config(config))
    train(drawn, drawn_store, tmp_path / "whole", config)
    options = {
        "--manifest": drawn.manifest_path,
        "--annotations": drawn.annotations,
        "--store": drawn_store,
        "--run-dir": tmp_path / "killed",
        "--config": config_path,
    }
    line = [sys.executable, "-m", "vnaw_pipeline", "train", *(str(part) for pair in options.items() for part in pair)]
    process = subprocess.Popen(line)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(losses(tmp_path / "killed")) >= 3):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run must not have ended before the kill"
    finished = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_run_from_before_a_setting_was_there_goes_on(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    train(drawn, drawn_store, tmp_path / "run", tiny_config)
    last = RunFolder(tmp_path / "run").last
    tensors, header = load_tensors(last)
    del header["config"]["temporal"]["causal"]
    save_tensors(last, tensors, header)
    again = train_windows(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "run", tiny_config)
    assert (again.done, again.skipped) == (0, tiny_config.train.epochs)
    header["config"]["temporal"]["causal"] = True
    save_tensors(last, tensors, header)
    with pytest.raises(CheckpointError, match=r"config\.temporal\.causal: found True, wanted False"):
        train(drawn, drawn_store, tmp_path / "run", tiny_config)


def test_a_fold_is_predicted_and_scored_with_its_own_splits(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    folded = build_manifest(drawn.annotations, drawn.crops, TASKS["expr8"], template=drawn.template, folds=2)
    train_windows(folded, drawn.annotations, drawn_store, tmp_path / "a", tiny_config, fold=1)
    predict_videos(folded, drawn_store, tmp_path / "a", "validation")
    run = open_run(tmp_path / "a")
    rows = fold_split(folded, run.header["fold"])
    predictions = pd.read_parquet(run.folder.predictions("validation"))
    assert set(predictions.video_id) == set(folded.video_id[folded.fold.str.split().map(lambda of: "1" in of)])
    scores = evaluate_predictions(rows, drawn.annotations, run.folder.predictions("validation"))
    assert scores.macro_f1 == pytest.approx(run.header["macro_f1"], abs=1e-9)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train_windows(folded, drawn.annotations, drawn_store, tmp_path / "a", tiny_config, fold=0)
    otherwise = folded.assign(fold=folded.fold.map({"0": "1", "1": "0"}).fillna(folded.fold))
    with pytest.raises(DataError, match=r"has learnt from \d+ videos of the split 'validation'"):
        predict_videos(otherwise, drawn_store, tmp_path / "a", "validation")
    predict_videos(folded, drawn_store, tmp_path / "a", "train")


def test_a_start_that_failed_does_not_stand_in_the_way(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    unused = changed(changed(tiny_config, "windows", window_frames=4000), "loss", min_labelled=1.0)
    with pytest.raises(DataError, match=r"Lower loss\.min_labelled"):
        train(drawn, drawn_store, tmp_path / "run", unused)
    train(drawn, drawn_store, tmp_path / "run", tiny_config)
    assert len(losses(tmp_path / "run")) == tiny_config.train.epochs
    with pytest.raises(CheckpointError, match="another config"):
        train(drawn, drawn_store, tmp_path / "run", unused)


def test_smoothing_can_be_chosen_after_training(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    train(drawn, drawn_store, tmp_path / "a", tiny_config)
    tables = []
    for half_width in (0, 5):
        config = PredictConfig(smooth=SmoothConfig(kind="mean", half_width=half_width))
        predict_videos(drawn.manifest, drawn_store, tmp_path / "a", "validation", config)
        tables.append(pd.read_parquet(tmp_path / "a" / "predictions" / "validation.parquet").filter(like="p_"))
    assert tables[1].diff().abs().mean().mean() < tables[0].diff().abs().mean().mean()


def test_what_the_stage_does_not_read_may_change_in_a_run_folder(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    train(drawn, drawn_store, tmp_path / "a", tiny_config)
    train(drawn, drawn_store, tmp_path / "a", changed(tiny_config, "extract", batch_frames=99))


def test_a_full_disk_in_training_is_an_os_error(tmp_path: Path) -> None:
    """safetensors reports a failed write as its own error; the command line knows OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w\.safetensors"):
            save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions_have_a_row_for_every_frame_and_score_as_training_said(
    precision: str, drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    train(drawn, drawn_store, run, changed(tiny_config, "train", epochs=4, precision=precision))
    for split in ("train", "validation", "test"):
        predict_videos(drawn.manifest, drawn_store, run, split)
    for split in ("train", "validation", "test"):
        table = pd.read_parquet(run / "predictions" / f"{split}.parquet")
        raw = pd.read_parquet(run / "predictions" / f"{split}_raw.parquet")
        rows = drawn.manifest[drawn.manifest.split == split]
        counts = table.groupby("video_id", observed=True).frame_index.agg(["count", "max"])
        assert counts["count"].to_dict() == dict(zip(rows.video_id, rows.num_frames, strict=True))
        assert (counts["max"] == counts["count"] - 1).all()
        p = table.filter(like="p_")
        assert p.columns.tolist()[:2] == ["p_neutral", "p_anger"]
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-4)
        assert (~table.valid).any()
        assert (p[table.valid] == raw.filter(like="p_")[table.valid]).all(axis=None)
    assert drawn.manifest.num_frames.min() < 40, "a video shorter than a window is among them"
    scores = evaluate_predictions(drawn.manifest, drawn.annotations, run / "predictions" / "validation.parquet")
    best = max(json.loads(line)["macro_f1"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert scores.macro_f1 == pytest.approx(best, abs=1e-9)


def test_runs_of_other_features_tasks_and_widths_are_refused(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    run = tmp_path / "a"
    train(drawn, drawn_store, run, tiny_config)
    fingerprint = open_store(drawn_store).fingerprint
    other = create_store(tmp_path / "other", {**fingerprint, "weights": "others"}, 16)
    for row in drawn.manifest.itertuples():
        other.add_video(row.video_id, row.num_frames)
        (unit,) = other.units(row.video_id)
        other.write_unit(unit, np.zeros((row.num_frames, 16), np.float16), np.ones(row.num_frames, np.bool_))
    with pytest.raises(CheckpointError, match="weights: found 'others'"):
        predict_videos(drawn.manifest, other.path, run, "test")
    with pytest.raises(CheckpointError, match=r"weights.*Give a new run folder"):
        train(drawn, other.path, run, tiny_config)
    with pytest.raises(StoreError, match="There is no feature store"):
        predict_videos(drawn.manifest, tmp_path / "gone", run, "test")
    with pytest.raises(DataError, match="no videos in split 'test'"):
        predict_videos(drawn.manifest[drawn.manifest.split != "test"], drawn_store, run, "test")
    tensors, header = load_tensors(run / "checkpoint" / "best.safetensors")
    save_tensors(run / "checkpoint" / "best.safetensors", tensors, {**header, "embedding_dim": 99})
    with pytest.raises(CheckpointError, match="does not fit the config it carries"):
        open_run(run)
    save_tensors(run / "checkpoint" / "best.safetensors", tensors, {**header, "kind": "encoder"})
    with pytest.raises(CheckpointError, match="not the checkpoint of a temporal model"):
        open_run(run)
    (run / "checkpoint" / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        open_run(run)
    with pytest.raises(CheckpointError, match="not a run folder"):
        open_run(tmp_path / "nowhere")


def test_a_folder_that_is_no_run_is_left_alone(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="not empty and is not a run folder"):
            train(drawn, drawn_store, tmp_path, tiny_config, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_fp16_without_a_gpu_is_refused(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        train(drawn, drawn_store, tmp_path / "a", changed(tiny_config, "train", precision="fp16"))


def test_nothing_to_train_or_validate_on_is_said(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no annotated videos in split 'validation'"):
        train_windows(
            drawn.manifest[drawn.manifest.split == "train"], drawn.annotations, drawn_store, tmp_path / "a", tiny_config
        )
    none = changed(tiny_config, "loss", min_labelled=1.0)
    none = changed(none, "windows", window_frames=90, train_stride=90, predict_stride=90)
    with pytest.raises(DataError, match="No training window of 90 frames has 100% of its frames labelled"):
        train(drawn, drawn_store, tmp_path / "b", none)


def test_coarse_label_space_trains_and_predicts(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = PipelineConfig.model_validate({**tiny_config.model_dump(), "task": "coarse5"})
    train(drawn, drawn_store, tmp_path / "a", config)
    predict_videos(drawn.manifest, drawn_store, tmp_path / "a", "validation")
    predictions = tmp_path / "a" / "predictions" / "validation.parquet"
    scores = evaluate_predictions(drawn.manifest, drawn.annotations, predictions, "coarse5")
    assert scores.confusion.shape == (5, 5)
    with pytest.raises(DataError, match="no column p_anger"):
        evaluate_predictions(drawn.manifest, drawn.annotations, predictions, "expr8")


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_kept_memory_is_not_fetched_from_the_system_again() -> None:
    code = """
import resource, torch
from vnaw_pipeline.processes import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    torch.ones(16_000_000).add(1)  # 64 MB each, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000).add(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    runs = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(4))
    # Without it always 31,250 pages, or 62 large ones; with it now and then, where the heap cannot grow in one piece.
    assert min(int(run.stdout) for run in runs) < 20


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_kept_memory_is_given_back_when_asked() -> None:
    """Also what lies below something that is still in use."""
    code = """
import psutil, torch
from vnaw_pipeline.processes import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
freed = [torch.ones(1_000_000) for _ in range(50)]  # 4 MB each
above = torch.ones(1_000_000)
del freed
resident = psutil.Process().memory_info
before = resident().rss
give_back_freed_memory()
print(before - resident().rss)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 150_000_000


def test_passes_may_change_in_a_run_unless_they_change_what_is_learnt(tmp_path: Path) -> None:
    """null stands for one pass there, which folders of before have written out."""
    for name, objective in (("plain", "ce"), ("memory", "elr")):
        folder = RunFolder(tmp_path / name)

        def begin(accumulation: int | None, folder: RunFolder = folder, objective: str = objective) -> None:
            values = {"train": {"accumulation": accumulation}, "loss": {"objective": objective, "weighting": "none"}}
            folder.begin(PipelineConfig.model_validate(values), {"train", "loss"}, overwrite=False)

        begin(1)
        folder.last.parent.mkdir()
        folder.last.touch()
        begin(None)
        if objective == "ce":
            begin(4)
        else:
            with pytest.raises(CheckpointError, match=r"train\.accumulation: found 1, wanted 4"):
                begin(4)


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    """Both the file that is to become the checkpoint and the one that safetensors fills first."""
    folder = RunFolder(tmp_path)
    folder.begin(PipelineConfig(), {"seed"}, overwrite=False)
    (tmp_path / "checkpoint").mkdir()
    for name in (".last.0.partial.safetensors", ".tmpsk6F9U"):
        (tmp_path / "checkpoint" / name).write_bytes(b"half")
    folder.begin(PipelineConfig(), {"seed"}, overwrite=False)
    assert list((tmp_path / "checkpoint").iterdir()) == []
