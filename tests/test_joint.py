"""Valence-arousal and action units, alone and beside expressions: from the challenge's trees to scores and submissions.

The store is written by hand: embeddings from which all labels follow, so that no image is decoded.
"""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vnaw_pipeline.annotations import image_name, write_annotation
from vnaw_pipeline.checks import check_manifest
from vnaw_pipeline.cli import app
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import ConfigError, DataError, StoreError
from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.features.store import create_store
from vnaw_pipeline.inference.analyse import open_models
from vnaw_pipeline.losses.joint import count_units, joint_loss
from vnaw_pipeline.losses.units import balanced_class_weights
from vnaw_pipeline.manifests import build_manifest, read_labels, write_manifest
from vnaw_pipeline.runs import open_run
from vnaw_pipeline.tasks import SPLIT_DIRS, TASKS, TaskName
from vnaw_pipeline.temporal import kept_bytes
from vnaw_pipeline.training import windows as training
from vnaw_pipeline.training.frames import finetune_encoder
from vnaw_pipeline.training.labels import LabelledBank
from vnaw_pipeline.training.loop import split_step
from vnaw_pipeline.training.windows import (
    Drawing,
    WindowDraw,
    gather_draw,
    passes_of_step,
    train_windows,
    training_plan,
)

EXPR, VA, AU = TASKS["expr8"], TASKS["va"], TASKS["au"]
ALL = (EXPR, VA, AU)
D = 8
LENGTHS = {"a": 45, "a2": 30, "b_left": 40, "b_right": 25, "c": 35, "d": 50, "e": 7, "t": 33, "t_no_face": 12}
ANNOTATED: dict[TaskName, dict[str, str]] = {
    "expr8": {"a": "train", "a2": "train", "b_left": "train", "b_right": "train", "d": "validation"},
    "va": {"a": "train", "c": "train", "b_right": "validation", "d": "validation"},
    "au": {"c": "train", "a2": "train", "d": "validation", "e": "validation"},
}
"""Video c has no expression, b is in training for expressions and in validation for valence and arousal."""


class World:
    """Trees of the three tasks, crops that are names only, a store, and a template per task."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.annotations, self.crops, self.store = root / "annotations", root / "crops", root / "features.zarr"
        store = create_store(self.store, {"encoder": "none", "crops": "none"}, D)
        for seed, (video_id, num_frames) in enumerate(LENGTHS.items()):
            folder = self.crops / "cropped_aligned" / video_id
            folder.mkdir(parents=True)
            for frame_index in range(num_frames):
                (folder / image_name(frame_index)).touch()
            embeddings = self.embeddings(seed, num_frames)
            valid = np.arange(num_frames) % 9 != 4 if video_id != "t_no_face" else np.zeros(num_frames, np.bool_)
            store.add_video(video_id, num_frames)
            (unit,) = store.missing_units([video_id])
            store.write_unit(unit, embeddings * valid[:, None], valid)
            for name, splits in ANNOTATED.items():
                if video_id in splits:
                    self.annotate(TASKS[name], video_id, embeddings.astype(np.float64))
        for task in ALL:
            lines = [f"{video}/{image_name(k)}{',0' * (1 if task is EXPR else len(task.header))}"
                     for video in ("t", "t_no_face") for k in range(LENGTHS[video])]  # fmt: skip
            self.template(task).write_text("\n".join([task.template_header, *lines, ""]))

    @staticmethod
    def embeddings(seed: int, num_frames: int) -> np.ndarray:
        steps = np.random.default_rng(seed).standard_normal((num_frames + 8, D))
        return np.stack([steps[k : k + 8].sum(axis=0) / 2 for k in range(num_frames)]).astype(np.float16)

    def annotate(self, task, video_id: str, e: np.ndarray) -> None:
        labels = {
            "expr8": e.argmax(axis=1).astype(np.int64),
            "va": np.tanh(e[:, :2]).astype(np.float32),
            "au": (np.concatenate([e, e[:, :4]], axis=1) > 0.7).astype(np.int8),
        }[task.name]
        labels[::6] = task.unlabelled
        split = SPLIT_DIRS[ANNOTATED[task.name][video_id]]
        write_annotation(self.annotations / task.annotation_dirs[0] / split / f"{video_id}.txt", labels, task)

    def template(self, task) -> Path:
        return self.root / f"template_{task.name}.txt"

    def manifest(self, *tasks, **options) -> pd.DataFrame:
        first, *further = tasks
        return build_manifest(
            self.annotations, self.crops, first, template=self.template(first), further_tasks=further, **options
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def config_of(task: TaskName, further: dict[TaskName, float] | None = None, **sections) -> PipelineConfig:
    values = {
        "task": task,
        "further_tasks": further or {},
        "windows": {"window_frames": 20, "train_stride": 5, "predict_stride": 10, "skip": {"share": [0.1, 0.2]}},
        "temporal": {"width": 16, "layers": 1, "heads": 1, "feed_forward": 16, "dropout": 0.0},
        "loss": {"level": "frame"},
        "train": {"epochs": 2, "batch_windows": 8, "learning_rate": 1e-2, "sampling": "uniform"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return PipelineConfig.model_validate(values)


LEARN = {"train": {"epochs": 60, "batch_windows": 4, "learning_rate": 2e-2}, "windows": {"erase_share": 0}}


def vnaw(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


# Manifest and labels


def test_a_manifest_of_several_tasks(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = world.manifest(*ALL)
    folder = "EXPR_Recognition_Challenge"
    assert manifest[["video_id", "split", "num_frames", "annotation"]].to_numpy().tolist() == [
        ["a", "train", 45, f"{folder}/Train_Set/a.txt"],
        ["a2", "train", 30, f"{folder}/Train_Set/a2.txt"],
        ["c", "train", 35, ""],
        ["b_right", "validation", 25, ""],  # its recording validates valence and arousal
        ["d", "validation", 50, f"{folder}/Validation_Set/d.txt"],
        ["e", "validation", 7, ""],
        ["t", "test", 33, ""],
        ["t_no_face", "test", 12, ""],
    ]
    assert "2 annotation files are not used" in caplog.text
    found = [str(problem) for problem in check_manifest(manifest, world.annotations, world.crops, EXPR,
             template=world.template(AU), further_tasks=(VA, AU))]  # fmt: skip
    unused = "no row of the manifest uses this Train_Set annotation"
    assert [line.partition("Train_Set/")[2] for line in found] == [
        f"b_left.txt: {unused}",
        f"b_right.txt: {unused}; the video is in validation",
    ]
    assert all(line.startswith("warning") for line in found)
    manifest.loc[len(manifest)] = ["b_left", "validation", 40, "cropped_aligned/b_left", "", "", "b"]
    found = [str(p) for p in check_manifest(manifest, world.annotations, world.crops, EXPR, further_tasks=(VA, AU))]
    assert "error: manifest:10: video b_left: is in validation and has no annotation" in found


def test_the_check_knows_the_lengths_of_every_task(world: World) -> None:
    manifest = world.manifest(*ALL)
    manifest.loc[manifest.video_id == "c", "num_frames"] = 38
    found = [str(p) for p in check_manifest(manifest, world.annotations, world.crops, EXPR, further_tasks=(VA, AU))]
    of_c = [line for line in found if "video c: num_frames 38, but" in line]
    assert sum("VA_Estimation_Challenge/Train_Set/c.txt has 35 rows" in line for line in of_c) == 1
    assert sum("AU_Detection_Challenge/Train_Set/c.txt has 35 rows" in line for line in of_c) == 1
    assert all(line.startswith("error") for line in of_c)
    config = config_of("va", {"expr8": 1.0})
    with pytest.raises(StoreError, match="holds 35 frames of 'c', the manifest 38"):
        train_windows(manifest, world.annotations, world.store, world.root / "run", config)


def test_labels_of_further_tasks_are_cut_and_filled_to_the_rows_length(world: World) -> None:
    manifest = world.manifest(*ALL)
    assert set(read_labels(manifest, world.annotations, EXPR)) == {"a", "a2", "d"}
    whole = read_labels(manifest, world.annotations, VA)
    assert set(whole) == {"a", "c", "b_right", "d"}
    lengths = manifest.assign(num_frames=manifest.num_frames.where(manifest.video_id != "c", 40))
    lengths.loc[lengths.video_id == "a", "num_frames"] = 9
    changed = read_labels(lengths, world.annotations, VA)
    np.testing.assert_array_equal(changed["a"], whole["a"][:9])
    np.testing.assert_array_equal(changed["c"][:35], whole["c"])
    assert np.isnan(changed["c"][35:]).all()


def test_tasks_mixed_in_one_tree_or_missing_are_named(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "annotations" / "AU_Detection_Challenge" / "Train_Set"
    for name, task, labels in (("a", AU, np.zeros((3, 12), np.int8)), ("b", VA, np.zeros((3, 2), np.float32))):
        write_annotation(folder / f"{name}.txt", labels, task)
        (tmp_path / "crops" / name).mkdir(parents=True)
    manifest = build_manifest(tmp_path / "annotations", tmp_path / "crops", AU)
    with pytest.raises(DataError, match=r"b\.txt:1: this is an annotation file of task va; expected 'AU1"):
        read_labels(manifest, tmp_path / "annotations", AU)
    with pytest.raises(DataError, match="task va needs one folder VA_Estimation_Challenge"):
        build_manifest(tmp_path / "annotations", tmp_path / "crops", AU, further_tasks=[VA])
    manifest = manifest[manifest.video_id == "a"]
    config = config_of("au", {"expr8": 1.0})
    with pytest.raises(DataError, match="task expr8 needs one folder EXPR_Recognition_Challenge"):
        train_windows(manifest, tmp_path / "annotations", world.store, tmp_path / "run", config)


# Labels beside embeddings


def labelled_bank() -> LabelledBank:
    """Five frames, the third without a face, and the row of zeros."""
    valid = torch.tensor([True, True, False, True, True, False])
    bank = FeatureBank(["v"], torch.zeros(6, 2, dtype=torch.float16), valid, torch.tensor([0, 5]))
    nan = torch.nan
    units = torch.full((6, 12), -1, dtype=torch.int8)
    units[3, :2] = torch.tensor([1, 0])
    units[4, 0] = 0
    return LabelledBank(
        bank,
        {
            "expr8": torch.tensor([0, -1, 3, -1, -1, -1]),
            "va": torch.tensor([[0.5, 0.0], [nan, nan], [1, 1], [-0.25, 1.0], [nan, nan], [nan, nan]]),
            "au": units,
        },
    )


def test_labels_are_counted_for_any_task_and_only_where_there_is_a_face() -> None:
    train = labelled_bank()
    assert train.labelled().tolist() == [True, False, True, True, True, False]
    learnable = train.learnable()
    assert learnable.labelled().tolist() == [True, False, False, True, True, False]
    expected = [1, *[0] * 7, 0.125, 0.5, 0.5, 0.0, *[0] * 10]
    assert learnable.means() == pytest.approx(expected)
    assert train.digest() != learnable.digest()


def test_windows_that_only_a_further_task_labels_are_drawn_in_their_share() -> None:
    """Video 0 has expressions, one class in 3 of its 4 windows; video 1, as long, has valence and arousal alone."""
    first = torch.tensor([0, 80, 160])
    bank = FeatureBank(["x", "y"], torch.zeros(161, 2, dtype=torch.float16), torch.ones(161, dtype=torch.bool), first)
    classes, affect = torch.full((161,), -1), torch.full((161, 2), torch.nan)
    classes[:60], classes[60:80], affect[80:160] = 1, 5, 0.5
    config = config_of(
        "expr8",
        {"va": 1.0},
        windows={"train_stride": 20},
        train={"sampling": "balanced", "windows_per_epoch": 4000, "batch_windows": 4000},
    )
    train = LabelledBank(bank, {"expr8": classes, "va": affect})
    plan = training_plan(train, config)
    assert len(plan) == 8
    ((draw,),) = Drawing(train, plan, config).steps(epoch=0)
    batch = gather_draw(train, draw, config)
    assert draw.step_units["va"] == count_units(VA, batch.labels["va"], config) > 0
    drawn = batch.labels["expr8"].amax(dim=1)
    # Shares of 4,000 draws deviate by less than .008 (one sigma).
    for label, share in ((-1, 0.5), (1, 0.25), (5, 0.25)):
        assert float((drawn == label).double().mean()) == pytest.approx(share, abs=0.04)

    without = LabelledBank(bank, {"expr8": torch.full((161,), -1), "va": affect})
    with pytest.raises(DataError, match=r"label of task 'expr8', by which windows are drawn. Set train.sampling"):
        Drawing(without, training_plan(without, config), config)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (3, 1), (2, 5), (7, 2)])
def test_processes_together_draw_what_one_draws(
    processes: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 700 windows, which is augmented in three blocks, in parts that do not begin where blocks do."""
    bank = FeatureBank(["x"], torch.zeros(161, 3).half(), torch.ones(161).bool(), torch.tensor([0, 160]))
    train = LabelledBank(bank, {"expr8": torch.arange(161) % 8})
    windows = {"train_stride": 1, "views": ["plain", "mirror"], "random_masking": {"mode": "elements"}}

    def parts(index: int, of: int, accumulation: int) -> list[WindowDraw]:
        config = config_of(
            "expr8",
            {},
            windows=windows,
            train={"windows_per_epoch": 700, "batch_windows": 700, "accumulation": accumulation},
        )
        monkeypatch.setattr(training, "process_state", lambda: SimpleNamespace(process_index=index, num_processes=of))
        (draws,) = Drawing(train, training_plan(train, config), config).steps(epoch=3)
        return draws

    (whole,) = parts(0, 1, 1)
    shares = [parts(index, processes, accumulation) for index in range(processes)]
    in_order = [draw for share in shares for draw in share]
    assert [view for draw in in_order for view in draw.view] == whole.view
    for name in ("rows", "video", "keep"):
        torch.testing.assert_close(torch.cat([getattr(draw, name) for draw in in_order]), getattr(whole, name))
    for found, wanted in zip(zip(*(draw.words for draw in in_order), strict=True), whole.words, strict=True):
        torch.testing.assert_close(torch.cat(found), wanted)
    assert len(torch.unique(whole.words.channels)) > 2000, "no block repeats another one's draws"
    assert len(set(whole.view)) == 2


def test_windows_of_a_step_have_channels_of_their_own_erased_and_others_in_every_epoch() -> None:
    bank = FeatureBank(["x"], torch.zeros(161, 60).half(), torch.ones(161).bool(), torch.tensor([0, 160]))
    train = LabelledBank(bank, {"expr8": torch.arange(161) % 8})
    train_section = {"windows_per_epoch": 100, "batch_windows": 50}
    drawing = Drawing(train, training_plan(train, config := config_of("expr8", train=train_section)), config)
    epochs = [[draw.keep for draws in drawing.steps(epoch) for draw in draws] for epoch in (0, 1, 0)]
    first, second, again = (torch.cat(of_epoch) for of_epoch in epochs)
    assert torch.equal(first, again)
    # 100 draws of an epoch's 256 masks give some 83 different ones; two epochs have none in common.
    assert len(first.unique(dim=0)) > 70
    assert len(torch.cat([first, second]).unique(dim=0)) == len(first.unique(dim=0)) + len(second.unique(dim=0))
    assert len(first[:50].unique(dim=0)) < len(first.unique(dim=0)), "steps do not repeat each other"


@pytest.mark.parametrize(
    ("task", "changes", "processes", "passes"),
    [
        ("expr8", {}, 1, 11),
        ("expr8", {}, 4, 3),
        ("expr8", {}, 64, 1),
        ("au", {}, 1, 11),
        ("va", {}, 1, 1),
        ("expr8", {"further_tasks": {"va": 0.5}}, 1, 1),
        ("expr8", {"loss": {"objective": "elr", "weighting": "none"}}, 1, 1),
        ("expr8", {"temporal": {"width": 64, "layers": 2, "feed_forward": 128}}, 1, 1),
        ("expr8", {"windows": {"window_frames": 500}}, 1, 64),
        ("expr8", {"windows": {"window_frames": 500}}, 3, 21),
        ("expr8", {"loss": {"consistency": 0.4}}, 1, 16),
        ("expr8", {"train": {"accumulation": 4}}, 1, 4),
    ],
)
def test_a_step_is_split_into_passes_that_fit_a_laptop(
    task: TaskName, changes: dict[str, Any], processes: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 windows of the default model; never where a split would change what is learnt, nor on a GPU."""
    config = PipelineConfig.model_validate({"task": task, "train": {"sampling": "uniform"}, **changes})
    for device, wanted in (("cpu", passes), ("cuda", config.train.accumulation or 1)):
        state = SimpleNamespace(num_processes=processes, device=torch.device(device))
        monkeypatch.setattr(training, "process_state", lambda state=state: state)
        assert passes_of_step(config, 64) == wanted


@given(windows=st.integers(1, 300), processes=st.integers(1, 9), frames=st.sampled_from([100, 120, 200, 500]))
def test_every_process_has_a_window_for_each_pass(windows: int, processes: int, frames: int) -> None:
    config = PipelineConfig.model_validate({"windows": {"window_frames": frames}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "process_state", lambda: SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
        )
        passes = passes_of_step(config, windows)
    assert passes * processes <= max(windows, processes)
    if windows >= processes:
        parts = [
            part for index in range(processes) for part in split_step(torch.arange(windows), index, processes, passes)
        ]
        most = max(57_000_000 // kept_bytes(config.temporal, frames), -(-400 // frames))
        assert max(map(len, parts)) <= most + (most == 1)


# The loss

B, P = 6, 5


def joint_batch(seed: int) -> tuple[torch.Tensor, dict[TaskName, torch.Tensor], torch.Tensor]:
    """Float64 logits; window 0 has labels for units only, window 1 for expressions only."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, P, 22, generator=generator, dtype=torch.float64)
    classes = torch.randint(-1, 8, (B, P), generator=generator)
    affect = 2 * torch.rand(B, P, 2, generator=generator, dtype=torch.float64) - 1
    affect[torch.rand(B, P, generator=generator) < 0.3] = torch.nan
    units = torch.randint(-1, 2, (B, P, 12), generator=generator).to(torch.int8)
    classes[0], affect[:2], units[1] = -1, torch.nan, -1
    valid = torch.rand(B, P, generator=generator) < 0.8
    labels: dict[TaskName, torch.Tensor] = {"expr8": classes, "va": affect, "au": units}
    hidden = {"expr8": classes.masked_fill(~valid, -1)}
    hidden["va"] = affect.masked_fill(~valid[..., None], torch.nan)
    hidden["au"] = units.masked_fill(~valid[..., None], -1)
    assert all((labels[name] != hidden[name]).any() for name in hidden), "labels on frames without a face"
    return logits, labels, valid


def step_units_of(labels, valid, config: PipelineConfig) -> dict[TaskName, int]:
    """As training counts them: without the labels of frames that are not valid."""
    counts: dict[TaskName, int] = {}
    for task in ALL:
        hidden = ~valid.view(*valid.shape, *[1] * len(task.label_shape))
        counts[task.name] = count_units(task, labels[task.name].masked_fill(hidden, task.unlabelled), config)
    return counts


def reference(logits, labels, valid, weights: dict[str, float], focal: bool, unit_weights) -> float:
    """Frame by frame in plain numpy, from the formulas."""
    ce, predicted, truth, binary = [], [], [], []
    for b, p in np.ndindex(B, P):
        if not valid[b, p]:
            continue
        x, affect = logits[b, p].numpy(), labels["va"][b, p].numpy()
        label = int(labels["expr8"][b, p])
        if label >= 0:
            ce.append(np.log(np.exp(x[:8]).sum()) - x[label])
        if not np.isnan(affect).any():
            predicted.append(np.tanh(x[8:10]))
            truth.append(affect)
        for unit in range(12):
            label = int(labels["au"][b, p, unit])
            if label >= 0:
                present = 1 / (1 + np.exp(-x[10 + unit]))
                q = present if label else 1 - present
                binary.append(-np.log(q) * (1 - q) ** (2 if focal else 0) * float(unit_weights[unit, label]))
    v, w = np.array(predicted), np.array(truth)
    ccc = [2 * np.cov(v[:, c], w[:, c], bias=True)[0, 1]
           / (v[:, c].var() + w[:, c].var() + (v[:, c].mean() - w[:, c].mean()) ** 2) for c in range(2)]  # fmt: skip
    of_affect = (1 - ccc[0]) / 2 + (1 - ccc[1]) / 2 + np.abs(v - w).mean()
    return float(np.mean(ce) + weights["va"] * of_affect + weights["au"] * np.mean(binary))


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_joint_loss_equals_its_formula(focal: bool, seed: int) -> None:
    weights: dict[TaskName, float] = {"va": 0.7, "au": 2.5}
    config = config_of(
        "expr8", weights, loss={"weighting": "none"}, units_loss={"objective": "focal" if focal else "bce"}
    )
    logits, labels, valid = joint_batch(seed)
    unit_weights = torch.rand(12, 2, dtype=torch.float64) + 0.5
    units = step_units_of(labels, valid, config)
    total, count = joint_loss(logits, labels, valid, config, 0.5, units, unit_weights=unit_weights)
    assert count == units["expr8"]
    wanted = reference(logits, labels, valid, weights, focal, unit_weights)
    assert float(total / count) == pytest.approx(wanted, rel=1e-12)  # both in float64


def test_what_is_not_labelled_or_not_seen_has_no_gradient() -> None:
    config = config_of("expr8", {"va": 1.0, "au": 1.0})
    logits, labels, valid = joint_batch(4)
    logits.requires_grad_()
    total, _ = joint_loss(logits, labels, valid, config, 0.5, step_units_of(labels, valid, config))
    total.backward()
    assert logits.grad is not None
    used = torch.cat(
        [
            (labels["expr8"] >= 0)[..., None].expand(-1, -1, 8),
            ~labels["va"].isnan(),
            labels["au"] >= 0,
        ],
        dim=-1,
    )
    used = used & valid[..., None]
    assert (logits.grad[~used] == 0).all()
    assert (logits.grad[used] != 0).all()
    labels["au"][~valid] = 1
    assert joint_loss(logits, labels, valid, config, 0.5, step_units_of(labels, valid, config))[0] == total


@pytest.mark.parametrize("level", ["frame", "window"])
def test_how_a_step_is_split_changes_nothing_but_the_concordance(level: str) -> None:
    """A part without any expression has no unit of the main task; its action units still count in full."""
    config = config_of("expr8", {"va": 1.0, "au": 1.0}, loss={"level": level})
    logits, labels, valid = joint_batch(7)
    labels["va"][...] = torch.nan
    labels["va"][3:] = 0.25  # in one of the parts only, so that its concordance is that of the step
    units = step_units_of(labels, valid, config)

    def of(part: slice) -> tuple[float, int]:
        of_part = {name: values[part] for name, values in labels.items()}
        total, count = joint_loss(logits[part], of_part, valid[part], config, 0.5, units)
        return float(total), int(count)

    parts = [of(slice(0, 1)), of(slice(1, 3)), of(slice(3, 6))]
    assert parts[0][1] == 0
    assert parts[0][0] > 0
    whole = of(slice(0, 6))
    assert sum(count for _, count in parts) == whole[1] == units["expr8"]
    assert sum(total for total, _ in parts) == pytest.approx(whole[0], rel=1e-12)


def test_balanced_units_weigh_alike_present_and_absent() -> None:
    truth = torch.tensor([[1, 0], [0, 0], [0, 0], [0, -1]], dtype=torch.int8)
    weights = balanced_class_weights(truth)
    torch.testing.assert_close(weights, torch.tensor([[4 / 6, 4 / 2], [0.5, 1.5]]))


# Runs


@pytest.mark.parametrize("task", [VA, AU], ids=["va", "au"])
def test_a_run_of_one_task_from_manifest_to_submission(task, world: World, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump_config(config_of(task.name, **LEARN)))
    manifest, run, template = tmp_path / "m.csv", tmp_path / "run", world.template(task)
    tree = ("--annotations", world.annotations, "--crops", world.crops, "--template", template, "--task", task.name)
    vnaw("manifest", *tree, "--out", manifest)
    assert "check: 0 errors" in vnaw("check", "--manifest", manifest, *tree)
    given = ("--manifest", manifest, "--annotations", world.annotations, "--run-dir", run)
    said = vnaw("train", *given, "--store", world.store, "--config", tmp_path / "c.yaml")
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(row[task.metric] for row in history)
    assert f"best {task.metric_title} {100 * best:.2f} on validation" in said
    # The labels follow from the embeddings. A unit is present in .31 of the frames, so that saying "always" scores .47.
    assert best > 0.52
    for split in ("validation", "test"):
        vnaw("predict", "--manifest", manifest, "--store", world.store, "--run-dir", run, "--split", split)
    said = vnaw("evaluate", *given, "--json", tmp_path / "scores.json")
    assert task.metric_title in said
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores[task.metric] == pytest.approx(best, abs=1e-9)
    assert list(scores["ccc" if task is VA else "f1"]) == list(task.outputs)
    vnaw("submit", "--run-dir", run, "--template", template, "--out", tmp_path / "s.txt")
    lines = (tmp_path / "s.txt").read_text().splitlines()
    assert lines[0] == task.template_header
    assert len(lines) == 1 + LENGTHS["t"] + LENGTHS["t_no_face"]
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    assert table.columns.tolist() == ["video_id", "frame_index", "valid", *task.prediction_columns]
    unseen = table[table.video_id == "t_no_face"][task.prediction_columns].to_numpy()
    opened = open_run(run)
    np.testing.assert_allclose(unseen, [opened.header["without_any"]] * 12, rtol=1e-6)
    with pytest.raises(DataError, match=f"template of task expr8; expected that of {task.name}"):
        vnaw("submit", "--run-dir", run, "--template", world.template(EXPR), "--out", tmp_path / "no.txt")
    with (
        pytest.raises(ConfigError, match=f"is '{task.name}'; give a run that names expressions"),
        open_models(PipelineConfig(), None, opened),
    ):
        pass


@pytest.fixture(scope="module")
def joint_manifest(world: World) -> Path:
    path = world.root / "joint.csv"
    write_manifest(world.manifest(*ALL), path)
    return path


def test_a_joint_run_from_manifest_to_submissions(world: World, joint_manifest: Path, tmp_path: Path) -> None:
    config = config_of("expr8", {"va": 1.0, "au": 1.0}, **LEARN)
    config = config.model_copy(update={"train": config.train.model_copy(update={"sampling": "balanced"})})
    (tmp_path / "c.yaml").write_text(dump_config(config))
    run = tmp_path / "run"
    given = ("--manifest", joint_manifest, "--annotations", world.annotations, "--run-dir", run)
    vnaw("train", *given, "--store", world.store, "--config", tmp_path / "c.yaml")
    for split in ("validation", "test"):
        vnaw("predict", "--manifest", joint_manifest, "--store", world.store, "--run-dir", run, "--split", split)
    said = vnaw("evaluate", *given, "--json", tmp_path / "scores.json")
    assert all(task.metric_title in said for task in ALL)
    scores = json.loads((tmp_path / "scores.json").read_text())
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(history, key=lambda row: row["macro_f1"])
    assert scores["macro_f1"] == pytest.approx(best["macro_f1"], abs=1e-9)
    assert scores["va"]["mean_ccc"] == pytest.approx(best["mean_ccc"], abs=1e-9)
    assert scores["au"]["mean_au_f1"] == pytest.approx(best["mean_au_f1"], abs=1e-9)
    # Video b_right is scored for valence and arousal, and b_left for nothing: its recording's labels are not mixed.
    assert scores["va"]["num_frames"] == sum(LENGTHS[v] - -(-LENGTHS[v] // 6) for v in ("b_right", "d"))
    assert scores["num_frames"] == LENGTHS["d"] - -(-LENGTHS["d"] // 6)
    assert min(scores["va"]["mean_ccc"], scores["au"]["mean_au_f1"]) > 0.5, "both are learnt beside the expressions"
    record = json.loads((run / "record.json").read_text())
    assert record["videos"] == {"train": 3, "validation": 3}
    table = pd.read_parquet(run / "predictions" / "test.parquet")
    assert table.columns.tolist()[3:] == [column for task in ALL for column in task.prediction_columns]
    for task in ALL:
        vnaw("submit", "--run-dir", run, "--template", world.template(task), "--out", tmp_path / f"{task.name}.txt")
    rows = {task.name: (tmp_path / f"{task.name}.txt").read_text().splitlines()[1] for task in ALL}
    assert {name: row.count(",") for name, row in rows.items()} == {"expr8": 1, "va": 2, "au": 12}
    vnaw("tune", *given)
    vnaw("predict", "--manifest", joint_manifest, "--store", world.store, "--run-dir", run, "--tuned")
    vnaw("evaluate", *given, "--json", tmp_path / "tuned.json")
    tuned, found = json.loads((run / "tuned.json").read_text()), json.loads((tmp_path / "tuned.json").read_text())
    assert (len(tuned["predict"]["bias"]), len(tuned["predict"]["thresholds"])) == (8, 12)
    for task, of_task in ((EXPR, found), (VA, found["va"]), (AU, found["au"])):
        assert of_task[task.metric] == pytest.approx(tuned["score"][task.name]["after"], abs=1e-9)
    for task, untuned in ((EXPR, scores), (VA, scores["va"]), (AU, scores["au"])):
        of_task = tuned["score"][task.name]
        assert of_task["before"] == pytest.approx(untuned[task.metric], abs=1e-9), "as `evaluate` says"
        assert of_task["after"] >= of_task["before"], "no task pays for another one's smoothing"


def test_a_fold_of_a_joint_run_is_scored_as_it_was_trained(world: World, tmp_path: Path) -> None:
    """Folds mix the official splits, by which the labels of further tasks are found."""
    folded = world.manifest(*ALL, folds=2)
    assert set(folded.fold[folded.split != "test"]) == {"", "0", "1"}
    folded["fold"] = folded.fold.where(folded.split == "test", "0").where(folded.video_id == "a", "")
    write_manifest(folded, tmp_path / "m.csv")
    config = config_of("expr8", {"va": 1.0})
    train_windows(folded, world.annotations, world.store, tmp_path / "run", config, fold=0)
    run = ("--manifest", tmp_path / "m.csv", "--run-dir", tmp_path / "run")
    vnaw("predict", *run, "--store", world.store)
    vnaw("evaluate", *run, "--annotations", world.annotations, "--json", tmp_path / "s.json")
    scores, header = json.loads((tmp_path / "s.json").read_text()), open_run(tmp_path / "run").header
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert scores["va"]["mean_ccc"] == pytest.approx(history[header["epoch"]]["mean_ccc"], abs=1e-9)
    assert header["outputs"] == [*EXPR.outputs, *VA.outputs]


def test_every_value_of_joint_training_changes_it(world: World, joint_manifest: Path, tmp_path: Path) -> None:
    manifest = pd.read_csv(joint_manifest, keep_default_na=False)
    configs = {
        "as it is": config_of("expr8", {"au": 1.0}),
        "another weight": config_of("expr8", {"au": 0.5}),
        "another task": config_of("expr8", {"va": 1.0}),
        "another main task": config_of("au", {"expr8": 1.0}),
        "alone": config_of("au"),
        "focal": config_of("expr8", {"au": 1.0}, units_loss={"objective": "focal"}),
        "balanced": config_of("expr8", {"au": 1.0}, units_loss={"weighting": "balanced"}),
    }
    seen: dict[float, str] = {}
    for name, config in configs.items():
        run = tmp_path / name
        train_windows(manifest, world.annotations, world.store, run, config)
        loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]
        assert loss not in seen, f"{name} trains like {seen.get(loss)}"
        seen[loss] = name


def test_the_encoder_is_fine_tuned_on_expressions_only(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set task=expr8"):
        finetune_encoder(tmp_path / "m.csv", world.annotations, world.crops, tmp_path / "run", config_of("va"))
