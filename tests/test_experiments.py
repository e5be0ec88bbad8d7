"""Cross-validation and ablation: which runs they are, that their tables say what the runs scored, and reruns."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from vnaw_pipeline.cli import app
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError, StoreError
from vnaw_pipeline.experiments import Variant, ablation_variants, cascade, cross_validate, format_table, score_table
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.manifests import build_manifest, read_manifest, write_manifest
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.evaluate import evaluate_predictions, scores_as_json
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.tasks import TASKS

from .conftest import DrawnData


def short(config: PipelineConfig) -> PipelineConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})


def run_command(command: str, drawn: DrawnData, store: Path, config: PipelineConfig, work: Path, *more: str) -> Result:
    """A command as a user gives it, on the rendered data with two folds."""
    folded = build_manifest(drawn.annotations, drawn.crops, TASKS["expr8"], template=drawn.template, folds=2)
    write_manifest(folded, work / "m.csv")
    (work / "config.yaml").write_text(dump_config(config))
    line = [command, "--manifest", work / "m.csv", "--annotations", drawn.annotations, "--store", store]
    line += ["--out", work / "out", "--config", work / "config.yaml", *more]
    return CliRunner().invoke(app, list(map(str, line)))


def test_crossval_trains_and_scores_every_fold_and_a_rerun_does_nothing(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = short(tiny_config)
    done = run_command("crossval", drawn, drawn_store, config, tmp_path)
    assert done.exit_code == 0, done.output
    assert "crossval: 3 runs done, 0 skipped" in done.output
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [run["name"] for run in table["runs"]] == ["official", "fold0", "fold1"]
    folded = pd.read_csv(tmp_path / "m.csv", keep_default_na=False, dtype={"fold": str})
    for run in table["runs"]:
        videos = folded if run["name"] == "official" else fold_split(folded, int(run["name"][-1]))
        predictions = RunFolder(tmp_path / "out" / run["name"]).predictions("validation")
        assert run["macro_f1"] == evaluate_predictions(videos, drawn.annotations, predictions).macro_f1
    of_folds = [run["macro_f1"] for run in table["runs"][1:]]
    (group,) = table["groups"]
    assert (group["group"], group["runs"]) == ("folds", 2)
    assert group["mean"]["macro_f1"] == pytest.approx(np.mean(of_folds), rel=1e-12)
    assert group["deviation"]["macro_f1"] == pytest.approx(np.std(of_folds, ddof=1), rel=1e-9)
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"| folds, mean of 2 | {100 * np.mean(of_folds):.2f} ± {100 * statistics.stdev(of_folds):.2f} |" in text

    (tmp_path / "out" / "fold1" / "scores.json").unlink()
    (tmp_path / "out" / "official" / "checkpoint" / "best.safetensors").unlink()  # a finished run is not opened again
    again = run_command("crossval", drawn, drawn_store, config, tmp_path)
    assert "crossval: 1 run done, 2 skipped" in again.output, again.output
    assert (tmp_path / "out" / "table.md").read_text() == text
    other = config.model_copy(update={"seed": 9})
    refused = run_command("crossval", drawn, drawn_store, other, tmp_path)
    assert isinstance(refused.exception, CheckpointError)
    assert "another config: seed" in str(refused.exception)
    assert str(refused.exception).endswith(
        f". Give another --out, or remove {tmp_path / 'out' / 'official'} to train it afresh."
    ), "there is no --overwrite here"


def test_ablation_trains_four_recipes(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    done = run_command("ablate", drawn, drawn_store, short(tiny_config), tmp_path, "--seed", "4")
    assert done.exit_code == 0, done.output
    names = ["plain_seed4", "aug_seed4", "naw_seed4", "both_seed4"]
    losses = set()
    for name in names:
        (row,) = (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()
        losses.add(json.loads(row)["train_loss"])
        assert f"| {name} |" in done.output
    assert len(losses) == 4, "four recipes, four trainings"
    assert json.loads((tmp_path / "out" / "table.json").read_text())["groups"] == [], "one seed has no deviation"


def test_the_variants_of_an_ablation(tiny_config: PipelineConfig) -> None:
    variants = {of.name: of for of in ablation_variants(tiny_config, [0, 3])}
    assert list(variants) == [f"{name}_seed{seed}" for name in ("plain", "aug", "naw", "both") for seed in (0, 3)]
    for seed in (0, 3):
        assert variants[f"both_seed{seed}"].config == tiny_config.model_copy(update={"seed": seed})
    for name, weighting, skip, erase in (
        ("plain", "none", "none", 0.0),
        ("aug", "none", "drop", 0.2),
        ("naw", "naw", "none", 0.0),
    ):
        config = variants[f"{name}_seed0"].config
        found = (config.loss.weighting, config.windows.skip.mode, config.windows.erase_share)
        assert found == (weighting, skip, erase)
    plain = variants["plain_seed0"].config
    with pytest.raises(ConfigError, match=r"found loss.weighting=none, windows.skip.mode=none"):
        ablation_variants(plain, [0])
    for seeds in ([], [1, 1]):
        with pytest.raises(ConfigError, match="Give each seed once"):
            ablation_variants(tiny_config, seeds)
    with pytest.raises(ConfigError, match="are for expressions, not va"):
        ablation_variants(tiny_config.model_copy(update={"task": "va"}), [0])


def test_a_fold_with_a_missing_class_is_scored_as_scikit_learn_does_and_said() -> None:
    task = TASKS["expr8"]
    labels = np.array([0, 0, 1, 2, 4, 5, 6, 7])
    predicted = np.array([0, 3, 1, 2, 4, 5, 6, 7])
    scores = scores_as_json(expression_scores(labels, predicted, 8), task)
    variants = [Variant(f"fold{fold}", "folds", PipelineConfig(), fold) for fold in range(2)]
    table = score_table(variants, {"fold0": scores, "fold1": scores})
    assert table["runs"][0]["Fear"] == 0
    assert table["runs"][0]["macro_f1"] == pytest.approx((2 / 3 + 6) / 8)
    assert "fold0: no frame is labelled Fear; that F1 is 0" in format_table(table)
    assert table["groups"][0]["deviation"]["macro_f1"] == 0


def test_what_an_experiment_cannot_start_from_is_said(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="built without folds"):
        cross_validate(drawn.manifest, drawn.annotations, drawn_store, tmp_path / "out", tiny_config)
    gone = run_command("ablate", drawn, tmp_path / "gone", tiny_config, tmp_path, "--seed", "0")
    assert isinstance(gone.exception, StoreError)
    assert "There is no feature store at" in str(gone.exception)
    assert not (tmp_path / "out").exists()


def test_a_cascade_is_two_runs_and_two_answers(
    drawn: DrawnData, drawn_store: Path, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = short(tiny_config)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"min_labelled": 0.1})})
    done = run_command("cascade", drawn, drawn_store, config, tmp_path)
    assert done.exit_code == 0, done.output
    assert "cascade: 2 runs done, 0 skipped" in done.output
    runs = {run["name"]: run for run in json.loads((tmp_path / "out" / "table.json").read_text())["runs"]}
    assert list(runs) == ["coarse5", "negative4", "hard", "soft"]
    videos = read_manifest(tmp_path / "m.csv")
    for how in ("hard", "soft"):
        scores = evaluate_predictions(
            videos, drawn.annotations, RunFolder(tmp_path / "out" / how).predictions("validation")
        )
        assert (runs[how]["macro_f1"], runs[how]["accuracy"]) == (scores.macro_f1, scores.accuracy)
    again = run_command("cascade", drawn, drawn_store, config, tmp_path)
    assert "cascade: 0 runs done, 2 skipped" in again.output
    biased = config.model_copy(update={"predict": config.predict.model_copy(update={"bias": (0.0,) * 8})})
    with pytest.raises(ConfigError, match=r"predict.bias holds 8 numbers; the task has 5 outputs"):
        cascade(videos, drawn.annotations, drawn_store, tmp_path / "c", biased)
    with pytest.raises(ConfigError, match="the config has coarse5"):
        cascade(videos, drawn.annotations, drawn_store, tmp_path / "b", config.model_copy(update={"task": "coarse5"}))
    shutil.copytree(drawn.annotations, tmp_path / "relabelled")
    for path in (tmp_path / "relabelled").rglob("*.txt"):
        header, *labels = path.read_text().splitlines()
        swapped = {"1": "3", "3": "1"}  # anger and fear, which coarse5 does not tell apart
        path.write_text("\n".join([header, *(swapped.get(label, label) for label in labels)]) + "\n")
    with pytest.raises(
        CheckpointError, match=r"labels.* Give another --out, or remove .*negative4 to train it afresh\.$"
    ):
        cascade(videos, tmp_path / "relabelled", drawn_store, tmp_path / "out", config)
