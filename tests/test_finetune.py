"""Fine-tuning on labelled frames: what it hears, what it leaves alone, and what it hands to extraction."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vnaw_pipeline.annotations import read_annotation
from vnaw_pipeline.checkpoints import load_tensors, read_header
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.experiments import cross_validate
from vnaw_pipeline.features.encoder import build_encoder, encoder_of_weights, load_encoder, parameter_groups
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.folds import fold_split, recordings_in
from vnaw_pipeline.layouts import find_annotations
from vnaw_pipeline.manifests import build_manifest
from vnaw_pipeline.metrics import affect_scores, expression_scores, unit_scores
from vnaw_pipeline.runs import RunFolder, open_run
from vnaw_pipeline.tasks import TASKS
from vnaw_pipeline.training import frames
from vnaw_pipeline.training.frames import LabelledFrames, finetune_encoder
from vnaw_pipeline.training.loop import Recipe, fit
from vnaw_pipeline.training.windows import train_windows

from .conftest import DrawnData
from .test_training import changed, losses, optimisation


def test_finetuning_writes_an_encoder_that_extraction_loads(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    run = tmp_path / "ft"
    config = tiny_config.model_copy(update={"encoder": tiny_config.encoder.model_copy(update={"pool": "avg"})})
    report = finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, run, config)
    assert report.ok
    assert len(losses(run)) == 2
    best = run / "checkpoint" / "best.safetensors"
    tuned = load_encoder(tiny_config.encoder.model_copy(update={"weights": best}))
    assert tuned.weights_digest != load_encoder(tiny_config.encoder).weights_digest
    assert tuned.pool == "avg", "the file says how its model pools"
    weights = load_file(best)
    for name, value in tuned.model.state_dict().items():
        assert torch.equal(value, weights[name])
    with pytest.raises(CheckpointError, match="not the checkpoint of a temporal model"):
        open_run(run)


def test_finetuning_goes_on_without_a_video_that_has_no_crops_and_refuses_other_labels(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    rows = drawn.manifest.copy()
    rows.loc[0, "crops"] = ""
    report = finetune_encoder(rows, drawn.annotations, drawn.crops, tmp_path / "ft", tiny_config)
    assert [failure.video_id for failure in report.failures] == [rows.video_id[0]]
    assert len(losses(tmp_path / "ft")) == 2
    with pytest.raises(CheckpointError, match=r"labels\.train: found"):
        finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "ft", tiny_config)


def test_finetuning_names_crops_it_cannot_read(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path) -> None:
    shutil.copytree(drawn.crops, tmp_path / "crops")
    rows = drawn.manifest[drawn.manifest.split == "train"]
    for image in (tmp_path / "crops" / rows.crops.iloc[0]).glob("*.jpg"):
        image.write_bytes(b"")
    report = finetune_encoder(drawn.manifest, drawn.annotations, tmp_path / "crops", tmp_path / "ft", tiny_config)
    assert not report.ok
    assert {failure.video_id for failure in report.failures} == {rows.video_id.iloc[0]}
    assert "empty" in (tmp_path / "ft" / "status.csv").read_text()


def test_validation_frames_that_cannot_be_read_do_not_score(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def count(labels: Any, predicted: Any, num_classes: int) -> Any:
        scored.append(len(labels))
        return expression_scores(labels, predicted, num_classes)

    monkeypatch.setattr(frames, "expression_scores", count)
    shutil.copytree(drawn.crops, tmp_path / "crops")
    rows = drawn.manifest[drawn.manifest.split == "validation"]
    folders = [tmp_path / "crops" / crops for crops in rows.crops]
    every = sorted(image for folder in folders for image in folder.glob("*.jpg"))
    for image in every[::2]:
        image.write_bytes(b"")
    report = finetune_encoder(drawn.manifest, drawn.annotations, tmp_path / "crops", tmp_path / "ft", tiny_config)
    unread = len({(failure.video_id, failure.frame_index) for failure in report.failures})
    assert 0 < unread < tiny_config.finetune.validation_frames
    assert scored == [tiny_config.finetune.validation_frames - unread] * tiny_config.finetune.epochs
    for image in every:
        image.write_bytes(b"")
    with pytest.raises(DataError, match="None of the validation frames"):
        finetune_encoder(drawn.manifest, drawn.annotations, tmp_path / "crops", tmp_path / "none", tiny_config)


FINETUNE_VALUES: list[dict[str, Any]] = [
    {"frames_per_epoch": 48},
    {"batch_frames": 8},
    {"learning_rate": 1e-3},
    {"weight_decay": 0.9},
    {"warmup_share": 0.6},
    {"loss": {"label_smoothing": 0.2}},
    {"loss": {"weighting": "naw"}},
    {"valence_arousal_weight": 0.5},
    {"action_units_weight": 0.5},
    {"valence_arousal_weight": 0.5, "action_units_weight": 0.5},
    {"layer_decay": 0.5},
    {"frozen_stages": 1},
    {"vary_images": False},
    {"erase_probability": 1.0},
    {"precision": "bf16"},
]


def test_every_value_changes_the_finetuning(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path) -> None:
    seen: dict[tuple[float, ...], Any] = {}
    for number, values in enumerate([{}, *FINETUNE_VALUES]):
        config = changed(tiny_config, "finetune", **{"learning_rate": 3e-3, **values})
        finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / str(number), config)
        found = tuple(losses(tmp_path / str(number)))
        assert found not in seen, f"{values} trains like {seen.get(found)}"
        seen[found] = values


def test_heads_beside_the_expression_are_learnt_and_left_out_of_the_encoder(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, "finetune", valence_arousal_weight=1.0, action_units_weight=1.0, ema_decay=0.9)
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "ft", config)
    best = tmp_path / "ft" / "checkpoint" / "best.safetensors"
    tensors, header = load_tensors(best)
    assert tensors["head.fc.weight"].shape == (8 + 2 + 12, 16)
    assert header["extra_heads"] == ["va", "au"]
    encoder = load_encoder(encoder_of_weights(best))
    assert encoder.head is not None
    assert torch.equal(encoder.head.weight, tensors["head.fc.weight"][:8])
    averaged, _ = load_tensors(tmp_path / "ft" / "checkpoint" / "last.safetensors")
    assert not torch.equal(averaged["average.head.fc.bias"], averaged["model.head.fc.bias"])


def test_heads_beside_the_expression_are_scored(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path) -> None:
    """By the metrics themselves on the outputs of the model that was kept; float32 twice, in other batches."""
    config = changed(tiny_config, "finetune", valence_arousal_weight=1.0, action_units_weight=1.0, epochs=1)
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "ft", config)
    (row,) = [json.loads(line) for line in (tmp_path / "ft" / "metrics.jsonl").read_text().splitlines()]
    encoder = encoder_of_weights(RunFolder(tmp_path / "ft").best)
    model, preprocessing, _ = build_encoder(encoder, 8 + 2 + 12)
    rows = drawn.manifest[drawn.manifest.split == "validation"]
    frames = LabelledFrames(rows, drawn.annotations, drawn.crops, TASKS["expr8"], preprocessing, ["va", "au"])
    chosen = torch.linspace(0, len(frames) - 1, config.finetune.validation_frames).round().long()
    with torch.inference_mode():
        outputs = model.eval()(preprocessing.normalise(frames.read(chosen).of_expression.images))
    of_affect = affect_scores(frames.affect[chosen].numpy(), outputs[:, 8:10].tanh().numpy())
    of_units = unit_scores(frames.units[chosen].numpy(), (outputs[:, 10:] >= 0).numpy())
    assert row["mean_ccc"] == pytest.approx(of_affect.mean_ccc, abs=1e-5)
    assert row["mean_au_f1"] == pytest.approx(of_units.mean_au_f1, abs=1e-5)
    assert abs(row["mean_ccc"]) > 1e-4
    assert row["mean_au_f1"] > 0


def test_a_head_without_labels_is_not_trained_and_not_scored(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, "finetune", valence_arousal_weight=1.0, epochs=1)
    annotations = tmp_path / "annotations"
    shutil.copytree(drawn.annotations, annotations)
    (folder,) = (annotations / name for name in TASKS["va"].annotation_dirs)
    shutil.rmtree(folder / "Validation_Set")
    finetune_encoder(drawn.manifest, annotations, drawn.crops, tmp_path / "ft", config)
    assert "mean_ccc" not in (tmp_path / "ft" / "metrics.jsonl").read_text()
    for file in (folder / "Train_Set").iterdir():
        header, *rows = file.read_text().splitlines()
        file.write_text("\n".join([header, *["-5,-5"] * len(rows)]) + "\n")
    with pytest.raises(DataError, match="No frame of the split 'train' has a label for task 'va'"):
        finetune_encoder(drawn.manifest, annotations, drawn.crops, tmp_path / "none", config)
    assert not (tmp_path / "none").exists(), "said before anything is trained"


def test_a_trained_head_is_kept_when_others_come_beside_it(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "first", tiny_config)
    first = tmp_path / "first" / "checkpoint" / "best.safetensors"
    config = changed(tiny_config, "finetune", valence_arousal_weight=1.0, learning_rate=1e-12)
    config = changed(config, "encoder", weights=first)
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "second", config)
    before, after = (load_file(tmp_path / run / "checkpoint" / "best.safetensors") for run in ("first", "second"))
    torch.testing.assert_close(after["head.fc.weight"][:8], before["head.fc.weight"])
    assert after["head.fc.weight"].shape == (10, 16)


def test_labels_of_other_tasks_belong_to_their_frames(drawn: DrawnData, tiny_config: PipelineConfig) -> None:
    """The rows that finetuning reads beside the expression are those of the same frame in the other trees."""
    preprocessing = load_encoder(tiny_config.encoder).preprocessing
    rows = drawn.manifest[drawn.manifest.split == "train"]
    frames = LabelledFrames(rows, drawn.annotations, drawn.crops, TASKS["expr8"], preprocessing, ["va", "au"])
    trees = {
        name: {file.video_id: read_annotation(drawn.annotations / file.path, TASKS[name])}
        for name in ("va", "au")
        for file in find_annotations(drawn.annotations, TASKS[name])
        if file.video_id == rows.video_id.iloc[0]
    }
    video = rows.video_id.iloc[0]
    of_video = frames._video == 0
    at = frames._frame[of_video]
    expressions = read_annotation(drawn.annotations / rows.annotation.iloc[0], TASKS["expr8"])
    assert np.array_equal(frames.labels.numpy()[of_video], expressions[at])
    np.testing.assert_array_equal(frames.affect.numpy()[of_video], trees["va"][video][at])
    np.testing.assert_array_equal(frames.units.numpy()[of_video], trees["au"][video][at])
    assert not np.isnan(frames.affect.numpy()).all()


def test_frozen_stages_stay_and_layers_learn_slower_towards_the_image(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, "finetune", frozen_stages=2, layer_decay=0.5)
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "ft", config)
    before = build_encoder(tiny_config.encoder, 8)[0].state_dict()
    after = load_file(tmp_path / "ft" / "checkpoint" / "best.safetensors")
    for name, value in after.items():
        frozen = name.startswith(("patch_embed", "layers.0."))
        assert torch.equal(value, before[name]) == frozen or value.numel() == 0, name
    model = build_encoder(tiny_config.encoder, 8)[0]
    scales = {
        name: group["lr_scale"]
        for group in parameter_groups(model, 0.1, layer_decay=0.5, frozen_stages=0)
        for name, parameter in model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert (
        scales["patch_embed.proj.weight"] < scales["layers.1.blocks.0.mlp.fc1.weight"] < scales["head.fc.weight"] == 1
    )
    with pytest.raises(ConfigError, match="frozen_stages 9 leaves nothing to train of 4 stages"):
        parameter_groups(model, 0.1, layer_decay=1.0, frozen_stages=9)


def test_frozen_norms_keep_their_running_statistics(tmp_path: Path) -> None:
    """Batch norm moves its statistics in training mode even without a gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    data = 5 + torch.randn(8, 4)
    recipe = Recipe(
        model=model,
        steps=lambda epoch: [[data]],
        objective=lambda model, batch, progress: (model(batch).square().sum(), torch.tensor(8)),
        evaluate=lambda model: {"macro_f1": 0.0},
        header={},
        label="test",
    )
    before = model[1].weight.detach().clone()
    fit(recipe, optimisation(epochs=2, steps_per_epoch=1), RunFolder(tmp_path))
    assert (model[0].running_mean == 0).all()
    assert not torch.equal(model[1].weight, before)


def test_two_processes_finetune_like_one(drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path) -> None:
    """The mean over all frames of a step, whoever saw them; float32 sums in another order, hence the tolerance."""
    config = changed(tiny_config, "finetune", vary_images=False)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    finetune_encoder(drawn.manifest, drawn.annotations, drawn.crops, tmp_path / "one", config)
    options = {"--manifest": drawn.manifest_path, "--annotations": drawn.annotations, "--crops": drawn.crops}
    options |= {"--run-dir": tmp_path / "two", "--config": tmp_path / "config.yaml"}
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vnaw_pipeline", "finetune"]
    line += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finetune: 2 epochs done") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


def test_a_fold_is_fine_tuned_alone_and_scores_that_its_encoder_knows_are_said(
    drawn: DrawnData, tiny_config: PipelineConfig, tmp_path: Path
) -> None:
    folded = build_manifest(drawn.annotations, drawn.crops, TASKS["expr8"], template=drawn.template, folds=2)
    config = changed(changed(tiny_config, "train", epochs=1), "finetune", epochs=1)
    finetune_encoder(folded, drawn.annotations, drawn.crops, tmp_path / "ft", config, fold=0)
    best = RunFolder(tmp_path / "ft").best
    with pytest.raises(CheckpointError, match="belongs to another run"):
        finetune_encoder(folded, drawn.annotations, drawn.crops, tmp_path / "ft", config, fold=1)
    config = changed(config, "encoder", weights=best)
    extract_features(folded, drawn.crops, tmp_path / "s", config)
    finetune_encoder(folded, drawn.annotations, drawn.crops, tmp_path / "again", config, fold=1)
    of_both = recordings_in(fold_split(folded, 0), "train") | recordings_in(fold_split(folded, 1), "train")
    assert set(read_header(RunFolder(tmp_path / "again").best)["learnt_from"]) == of_both
    learnt = set(open_store(tmp_path / "s").fingerprint["learnt_from"])
    assert learnt == recordings_in(fold_split(folded, 0), "train")
    notes = {}
    for fold in (0, 1):
        report = train_windows(folded, drawn.annotations, tmp_path / "s", tmp_path / f"run{fold}", config, fold=fold)
        notes[fold] = " ".join(report.notes)
    of_fold = recordings_in(fold_split(folded, 1), "validation")
    assert "the encoder has learnt from" not in notes[0]
    assert f"the encoder has learnt from {len(of_fold & learnt)} of {len(of_fold)} validation recordings" in notes[1]
    done = cross_validate(folded, drawn.annotations, tmp_path / "s", tmp_path / "cv", config)
    assert sum("the encoder has learnt from" in note for note in done.notes) >= 1
