"""Tuning after the model: on validation labels alone, scored honestly, used when asked, composed runs included."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vnaw_pipeline.annotations import write_annotation
from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig, PredictConfig, SmoothConfig, dump_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.metrics import affect_scores
from vnaw_pipeline.prediction.cascade import hard_cascade, soft_cascade
from vnaw_pipeline.prediction.combine import aligned, combine_runs
from vnaw_pipeline.prediction.evaluate import evaluate_predictions
from vnaw_pipeline.prediction.finish import finish_video
from vnaw_pipeline.prediction.predict import MADE_BY, made_by_of, read_predictions
from vnaw_pipeline.prediction.submission import write_submission
from vnaw_pipeline.prediction.tables import finish_table, open_predicted
from vnaw_pipeline.prediction.tune import Tuning, TuningVideo, smoothings, tune, tune_run, tuning_parts
from vnaw_pipeline.runs import RunFolder, open_run
from vnaw_pipeline.tasks import TASKS, Task, TaskName

EXPR = TASKS["expr8"]
SPLITS = {"train": 2, "validation": 4, "test": 1}
NUM_FRAMES = 120
several = settings(max_examples=40, deadline=None)


class Tables:
    """A made-up data set and runs on it: annotations, a manifest, and tables that lean towards the first class."""

    def __init__(self, root: Path) -> None:
        self.root, self.annotations = root, root / "annotations"
        rows = []
        for split, count in SPLITS.items():
            for number in range(count):
                name = f"{split}{number}"
                path = "" if split == "test" else f"{name}.txt"
                rows.append((name, split, NUM_FRAMES, "", path, "0" if number == 0 and path else "", name))
        columns = ["video_id", "split", "num_frames", "crops", "annotation", "fold", "source_video"]
        self.manifest = pd.DataFrame(rows, columns=columns)
        self.labels = {}
        for seed, (name, path) in enumerate(zip(self.manifest.video_id, self.manifest.annotation, strict=True)):
            generator = np.random.default_rng(seed)
            labels = np.repeat(generator.integers(0, 8, NUM_FRAMES // 15), 15)
            labels[generator.random(NUM_FRAMES) < 0.1] = -1
            self.labels[name] = labels
            if path:
                write_annotation(self.annotations / path, labels, EXPR)

    def run(self, name: str, task_name: TaskName = "expr8", seed: int = 0, fold: int | None = None) -> Path:
        """A run folder with a checkpoint and raw and final tables of every split."""
        task = TASKS[task_name]
        num_classes = len(task.outputs)
        folder = RunFolder(self.root / name)
        config = PipelineConfig(task=task_name)  # type: ignore[arg-type]
        folder.begin(config, {"task"}, overwrite=False)
        header = {
            "kind": "temporal",
            "config": json.loads(config.model_dump_json()),
            "fold": fold,
            "without_any": [1 / num_classes] * num_classes,
        }
        save_tensors(folder.best, {"w": torch.full((1,), float(seed))}, header)
        folder.write_record(stage="train", tuned={"epoch": "epoch 3"})
        for split in SPLITS:
            tables = []
            for name_of_video in self.manifest.video_id[self.manifest.split == split]:
                generator = np.random.default_rng([seed, len(tables)])
                of_task = np.array(task.from_expr8 or range(8))[np.maximum(self.labels[name_of_video], 0)]
                logits = 1.2 * generator.normal(size=(NUM_FRAMES, num_classes)) + np.linspace(1, 0, num_classes)
                logits[np.arange(NUM_FRAMES), np.maximum(of_task, 0)] += 1.5 * (of_task >= 0)
                p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                table = pd.DataFrame({"video_id": name_of_video, "frame_index": range(NUM_FRAMES)})
                table["valid"] = generator.random(NUM_FRAMES) < 0.9
                tables.append(table.assign(**dict(zip(task.prediction_columns, p.astype(np.float32).T, strict=True))))
            raw = pd.concat(tables, ignore_index=True)
            folder.raw_predictions(split).parent.mkdir(exist_ok=True)
            raw.to_parquet(folder.raw_predictions(split))
            finish_table(raw, open_predicted(folder.path), PredictConfig()).to_parquet(folder.predictions(split))
        return folder.path


@pytest.fixture
def made(tmp_path: Path) -> Tables:
    return Tables(tmp_path)


def tuned(run: Path) -> dict[str, object]:
    return {key: value for key, value in json.loads((run / "tuned.json").read_text()).items() if key != "written"}


def test_tuning_writes_values_scores_and_what_they_rest_on(made: Tables) -> None:
    run = made.run("a")
    report = tune_run(made.manifest, made.annotations, run)
    found = json.loads((run / "tuned.json").read_text())
    score = found["score"]["expr8"]
    assert score["after"] > score["before"] + 0.05, "smoothing and bias help on these tables"
    assert score["cross_tuned"] < score["after"], "values chosen on the frames they are scored on flatter"
    assert found["tuned_on"]["expr8"]["videos"] == SPLITS["validation"]
    names = made.manifest.video_id[made.manifest.split == "validation"]
    assert found["tuned_on"]["expr8"]["frames"] == sum((made.labels[name] >= 0).sum() for name in names)
    assert f"{100 * score['after']:.2f}" in report.notes[0]
    record = json.loads((run / "record.json").read_text())
    assert record["tuned"]["epoch"] == "epoch 3"
    assert "labels of the validation videos" in record["tuned"]["answers"]
    before = evaluate_predictions(made.manifest, made.annotations, RunFolder(run).predictions("validation"))
    assert score["before"] == pytest.approx(before.macro_f1, abs=1e-12)
    opened = open_predicted(run)
    raw = read_predictions(RunFolder(run).raw_predictions("validation"), EXPR)
    after = finish_table(raw, opened, opened.tuned())
    scored = evaluate_predictions(made.manifest, made.annotations, after)
    assert score["after"] == pytest.approx(scored.macro_f1, abs=1e-12)


def test_tuning_reads_nothing_but_validation(made: Tables) -> None:
    """Other splits' labels and tables may be nonsense or gone; another validation label changes what is recorded."""
    run = made.run("a")
    tune_run(made.manifest, made.annotations, run)
    first = tuned(run)
    for path in [*made.annotations.glob("train*.txt"), *made.annotations.glob("test*.txt")]:
        path.write_text("not an annotation\n")
    for split in ("train", "test"):
        RunFolder(run).raw_predictions(split).unlink()
        RunFolder(run).predictions(split).write_bytes(b"not a table")
    RunFolder(run).predictions("validation").unlink()
    tune_run(made.manifest, made.annotations, run)
    assert tuned(run) == first
    labels = np.where(made.labels["validation0"] == -1, -1, (made.labels["validation0"] + 1) % 8)
    write_annotation(made.annotations / "validation0.txt", labels, EXPR)
    tune_run(made.manifest, made.annotations, run)
    other = tuned(run)
    assert other["tuned_on"] != first["tuned_on"]
    assert other["score"] != first["score"]


def test_tuning_refuses_what_does_not_fit(made: Tables) -> None:
    run = made.run("a")
    with pytest.raises(DataError, match="no videos in split 'validation' to tune on"):
        tune_run(made.manifest[made.manifest.split == "test"], made.annotations, run)
    table = RunFolder(run).raw_predictions("validation")
    pd.read_parquet(table).query("frame_index != 7 or video_id != 'validation1'").to_parquet(table)
    with pytest.raises(DataError, match="hold 119 rows for 'validation1', which has 120"):
        tune_run(made.manifest, made.annotations, run)
    table.unlink()
    with pytest.raises(DataError, match="There are no predictions at"):
        tune_run(made.manifest, made.annotations, run)
    with pytest.raises(CheckpointError, match="not a run folder"):
        tune_run(made.manifest, made.annotations, made.root / "nowhere")


def test_tuned_values_belong_to_their_model(made: Tables) -> None:
    run = made.run("a")
    with pytest.raises(CheckpointError, match=r"has no tuned.json. Make it with `vnaw tune`"):
        open_predicted(run).tuned()
    tune_run(made.manifest, made.annotations, run)
    config = open_predicted(run).tuned(PredictConfig(batch_windows=7))
    assert config.batch_windows == 7
    assert config.bias is not None
    assert max(config.bias) > 0
    made.run("other", seed=1)
    (made.root / "other" / "tuned.json").write_text((run / "tuned.json").read_text())
    with pytest.raises(CheckpointError, match="tuned on another model"):
        open_predicted(made.root / "other").tuned()


def test_tables_belong_to_their_model(made: Tables) -> None:
    """A training that goes on may leave another best model beside the tables of the one before."""
    run = made.run("a")
    for path in (RunFolder(run).raw_predictions("validation"), RunFolder(run).predictions("validation")):
        table = pd.read_parquet(path)
        table.attrs[MADE_BY] = made_by_of(open_predicted(run).digest, PredictConfig())
        table.to_parquet(path)
    tune_run(made.manifest, made.annotations, run)
    tensors, header = load_tensors(RunFolder(run).best)
    save_tensors(RunFolder(run).best, {"w": tensors["w"] + 1}, header)
    for work in (
        lambda: tune_run(made.manifest, made.annotations, run),
        lambda: combine_runs([run, run], "mean", made.root / "both", "validation"),
    ):
        with pytest.raises(DataError, match=r"made by another model than .* holds now. Run `vnaw predict` again"):
            work()


def test_members_are_finished_alike_in_all_splits(made: Tables) -> None:
    run = made.run("a")
    digest = open_predicted(run).digest
    for split, config in (("validation", PredictConfig()), ("test", PredictConfig(bias=(1.0,) * 8))):
        table = pd.read_parquet(RunFolder(run).predictions(split))
        table.attrs[MADE_BY] = made_by_of(digest, config)
        table.to_parquet(RunFolder(run).predictions(split))
    combine_runs([run, run], "mean", made.root / "both", "validation")
    with pytest.raises(CheckpointError, match="finished their answers in another way"):
        combine_runs([run, run], "mean", made.root / "both", "test")


def test_action_units_are_tuned_on_the_frames_that_are_scored() -> None:
    """Unit by unit: one that is never annotated takes no frame from the others, and keeps its threshold."""
    videos = [video("units", seed, f"v{seed}") for seed in range(6)]
    for one in videos:
        one.labels[:, 1] = -1
    found = tuning_of(videos, TASKS["au"])
    assert found.predict.thresholds is not None
    assert found.predict.thresholds[1] == 0.5
    assert found.after > found.before


def test_a_folds_run_is_tuned_on_the_folds_videos(made: Tables) -> None:
    run = made.run("a", fold=0)
    tables = [pd.read_parquet(RunFolder(run).raw_predictions(split)) for split in ("train", "validation")]
    of_fold = pd.concat(tables).query("video_id in ('train0', 'validation0')")
    of_fold.to_parquet(RunFolder(run).raw_predictions("validation"))
    tune_run(made.manifest, made.annotations, run)
    found = tuned(run)["tuned_on"]
    assert (found["fold"], found["expr8"]["videos"]) == (0, 2)  # type: ignore[index]


def video(kind: str, seed: int, source_video: str) -> TuningVideo:
    generator = np.random.default_rng(seed)
    slow = np.repeat(generator.normal(size=(8, 3)), 10, axis=0)
    if kind == "affect":
        labels = np.tanh(slow[:, :2]).astype(np.float32)
        labels[::9] = np.nan
        raw = (np.nan_to_num(labels) + generator.normal(size=(80, 2))).clip(-1, 1).astype(np.float32)
    else:
        labels = (slow > 0.3).astype(np.int8)
        labels[::9] = -1
        raw = (1 / (1 + np.exp(3 - 2 * slow - generator.normal(size=(80, 3))))).astype(np.float32)
    return TuningVideo(source_video, raw, generator.random(80) < 0.9, labels)


def tuning_of(videos: list[TuningVideo], task: Task) -> Tuning:
    nothing = np.zeros(videos[0].raw.shape[1], np.float32)
    return tune(videos, nothing, PredictConfig(), task, smoothings(SmoothConfig(), task.kind))


@pytest.mark.parametrize("task", [TASKS["va"], TASKS["au"]])
def test_affect_and_units_are_tuned_too(task: Task) -> None:
    videos = [video(task.kind, seed, f"v{seed}") for seed in range(6)]
    found = tuning_of(videos, task)
    assert found.after > found.before + 0.05
    assert found.cross_tuned is not None
    assert found.before < found.cross_tuned <= found.after
    assert found.predict.smooth.kind != "none"
    assert found.predict.bias is None
    assert (found.predict.thresholds is not None) == (task.kind == "units")
    assert tuning_of(videos[:1], task).cross_tuned is None


def test_cross_tuning_never_sees_the_part_it_is_scored_on() -> None:
    """Two recordings: each is scored with the values that the other one alone asks for."""
    videos = [video("affect", seed, f"v{seed}") for seed in range(2)]
    shares = np.zeros(2, np.float32)
    finished, truth = [], []
    for chosen_on, scored in ((videos[1], videos[0]), (videos[0], videos[1])):
        config = tuning_of([chosen_on], TASKS["va"]).predict
        used = ~np.isnan(scored.labels).any(axis=1)
        finished.append(finish_video(scored.raw, scored.valid, shares, config, "affect")[used])
        truth.append(scored.labels[used])
    wanted = affect_scores(np.concatenate(truth), np.concatenate(finished)).mean_ccc
    assert tuning_of(videos, TASKS["va"]).cross_tuned == pytest.approx(wanted, abs=1e-12)


def test_settings_to_try_start_with_the_runs_own() -> None:
    own = SmoothConfig(kind="mean", half_width=7)
    assert smoothings(own, EXPR.kind)[0] == own
    assert {of.kind for of in smoothings(own, EXPR.kind)} == {"none", "mean", "median", "mode", "sp"}
    assert {of.kind for of in smoothings(own, TASKS["va"].kind)} == {"none", "mean", "median", "sp"}


@several
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 500)), min_size=1, max_size=30))
def test_a_source_video_is_in_one_part(videos: list[tuple[str, int]]) -> None:
    names, frames = zip(*videos, strict=True)
    if not any(frames):
        return
    parts = tuning_parts(names, frames)
    assert len({(name, part) for name, part in zip(names, parts.tolist(), strict=True)}) == len(set(names))
    loads = [
        sum(count for count, of in zip(frames, parts, strict=True) if of == part) for part in range(parts.max() + 1)
    ]
    assert min(loads) > 0
    assert len(loads) <= 5


@several
@given(st.integers(0, 10_000), st.booleans())
def test_cascades_equal_the_rules(seed: int, draws: bool) -> None:
    """The arg max of the hard cascade is the hard rule's class, draws included; both add up to 1 (float32 sums)."""
    generator = np.random.default_rng(seed)

    def random(num_classes: int) -> np.ndarray:
        counts = generator.multinomial(4 if draws else 10_000, np.ones(num_classes) / num_classes, size=30)
        return (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)

    coarse, negative = random(5), random(4)
    soft, hard = soft_cascade(coarse, negative), hard_cascade(coarse, negative)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(hard.sum(axis=1), 1, rtol=1e-6)
    of_coarse = {"Neutral": 0, "Happiness": 1, "Surprise": 2, "Other": 3}
    of_negative = {"Anger": 0, "Disgust": 1, "Fear": 2, "Sadness": 3}
    for row, (name, column) in product(range(30), [*of_coarse.items(), *of_negative.items()]):
        wanted = coarse[row, column] if name in of_coarse else coarse[row, 4] * negative[row, column]
        assert soft[row, EXPR.outputs.index(name)] == pytest.approx(wanted, rel=1e-6)
    for row in range(30):
        names = [*of_coarse, None]
        rule = names[coarse[row].argmax()] or list(of_negative)[negative[row].argmax()]
        assert EXPR.outputs[hard[row].argmax()] == rule


def test_a_mean_of_runs_is_a_run_for_every_reader(made: Tables, tmp_path: Path) -> None:
    members = [made.run(name, seed=seed) for seed, name in enumerate("abc")]
    out = tmp_path / "mean"
    for split in ("validation", "test"):
        combine_runs(members, "mean", out, split)
    found = read_predictions(RunFolder(out).predictions("test"), EXPR)
    tables = [read_predictions(RunFolder(member).predictions("test"), EXPR) for member in members]
    mean = np.mean([table[EXPR.prediction_columns].to_numpy(np.float64) for table in tables], axis=0)
    seen = found.valid.to_numpy()
    np.testing.assert_array_equal(seen, np.any([table.valid for table in tables], axis=0))
    np.testing.assert_allclose(found[EXPR.prediction_columns].to_numpy()[seen], mean[seen], rtol=1e-6)
    scores = [
        evaluate_predictions(made.manifest, made.annotations, RunFolder(run).predictions("validation")).macro_f1
        for run in (*members, out)
    ]
    assert scores[-1] > max(scores[:-1]), "three noisy runs are better than one"
    tune_run(made.manifest, made.annotations, out)
    before = RunFolder(out).predictions("test").read_bytes()
    combine_runs(members, "mean", out, "test", tuned=True)
    assert RunFolder(out).predictions("test").read_bytes() != before
    record = json.loads((out / "record.json").read_text())
    assert record["splits"]["test"]["tuned"] is True
    assert record["splits"]["validation"]["tuned"] is False
    assert "answers" in record["tuned"]
    template = tmp_path / "template.txt"
    template.write_text(f"{EXPR.template_header}\ntest0/00002.jpg,0\n")
    assert write_submission(found, template, tmp_path / "submission.txt", EXPR) == 1
    with pytest.raises(CheckpointError, match=r"is a composed run, which has no model.*each of its members"):
        open_run(out)
    with pytest.raises(CheckpointError, match="composed otherwise: members"):
        combine_runs(members[:2], "mean", out, "test")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty and is no composed run"):
        combine_runs(members, "mean", tmp_path / "thesis", "test")


def test_cascades_of_runs_score_as_expressions(made: Tables, tmp_path: Path) -> None:
    negative, coarse, expr = made.run("n", "negative4"), made.run("c", "coarse5"), made.run("e")
    for how, rule in (("hard", hard_cascade), ("soft", soft_cascade)):
        combine_runs([negative, coarse], how, tmp_path / how, "validation")  # type: ignore[arg-type]
        given_tables = [
            read_predictions(RunFolder(run).predictions("validation"), TASKS[name])[TASKS[name].prediction_columns]
            for run, name in ((coarse, "coarse5"), (negative, "negative4"))  # type: ignore[index]
        ]
        wanted = rule(*(table.to_numpy(np.float32) for table in given_tables))
        found = read_predictions(RunFolder(tmp_path / how).raw_predictions("validation"), EXPR)
        np.testing.assert_array_equal(found[EXPR.prediction_columns], wanted)
        table = RunFolder(tmp_path / how).predictions("validation")
        assert evaluate_predictions(made.manifest, made.annotations, table).macro_f1 > 0.3
    soft = tmp_path / "soft"
    combine_runs([soft, expr], "mean", tmp_path / "both", "validation")
    assert open_predicted(tmp_path / "both").task.name == "expr8"
    with pytest.raises(ConfigError, match=r"A mean takes two or more runs of the same tasks; .*\(coarse5\)"):
        combine_runs([coarse, expr], "mean", tmp_path / "x", "validation")
    with pytest.raises(ConfigError, match="two or more runs"):
        combine_runs([expr], "mean", tmp_path / "x", "validation")
    with pytest.raises(ConfigError, match="hard cascade takes one run of coarse5 and one of negative4"):
        combine_runs([coarse, coarse], "hard", tmp_path / "x", "validation")
    assert not (tmp_path / "x").exists()


def test_members_must_have_predicted_the_same_frames(made: Tables, tmp_path: Path) -> None:
    one, other = made.run("a"), made.run("b", seed=1)
    path = RunFolder(other).predictions("validation")
    table = pd.read_parquet(path)
    table.sample(frac=1, random_state=0).to_parquet(path)
    combine_runs([one, other], "mean", tmp_path / "shuffled", "validation")
    table.query("video_id != 'validation2'").to_parquet(path)
    with pytest.raises(DataError, match=r"did not predict the same frames(.|\n)*validation2: 120 frames and 0"):
        combine_runs([one, other], "mean", tmp_path / "x", "validation")
    with pytest.raises(DataError, match="not the same ones, or some twice"):
        aligned([table, table.assign(frame_index=table.frame_index + 1)], ["one", "other"])
    path.unlink()
    with pytest.raises(DataError, match="There are no predictions at"):
        combine_runs([one, other], "mean", tmp_path / "x", "validation")


def test_damaged_folders_are_named(made: Tables, tmp_path: Path) -> None:
    run = made.run("a")
    RunFolder(run).best.unlink()
    with pytest.raises(CheckpointError, match="is not there, or not the checkpoint of a temporal model"):
        open_predicted(run)
    (tmp_path / "composed").mkdir()
    (tmp_path / "composed" / "composite.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        open_predicted(tmp_path / "composed")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(dump_config(PipelineConfig()))
    header = {"kind": "temporal", "config": {"predict": {"smooth_half_width": 3}}}
    save_tensors(RunFolder(tmp_path / "old").best, {}, header)
    with pytest.raises(CheckpointError, match="not written by this version"):
        open_predicted(tmp_path / "old")
