"""`vnaw demo`: a rendered data set with known truth, and every stage of the pipeline on it.

The stages are the functions that the commands call. What comes out is a table that no real data set can give: scores
against the labels that annotators gave, and against the truth.
"""

import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vnaw_pipeline.annotations import image_name, read_annotation
from vnaw_pipeline.checks import check_manifest
from vnaw_pipeline.config import PipelineConfig, PredictConfig
from vnaw_pipeline.errors import DataError, listing
from vnaw_pipeline.features.bank import FeatureBank, open_bank
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.inference.inputs import read_image
from vnaw_pipeline.inference.run import infer_videos
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import build_manifest, read_labels, write_manifest
from vnaw_pipeline.metrics import ExpressionScores
from vnaw_pipeline.prediction.evaluate import evaluate_predictions, scores_as_json
from vnaw_pipeline.prediction.predict import (
    finish_probabilities,
    predict_videos,
    read_predictions,
    write_predictions,
)
from vnaw_pipeline.prediction.submission import write_submission
from vnaw_pipeline.provenance import write_bytes, write_json
from vnaw_pipeline.rendering.clip import scene, write_clip
from vnaw_pipeline.rendering.dataset import render_dataset
from vnaw_pipeline.report.figures import draw_confusion, draw_timeline
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import StageReport
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL, TASKS
from vnaw_pipeline.training.frames import finetune_encoder
from vnaw_pipeline.training.windows import train_windows

DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
FOLDS = 3
_TASK = TASKS["expr8"]
_HAPPINESS = EXPRESSIONS.index("Happiness")
_TEST_LIST = Path("names_of_videos_in_each_test_set", "Expression_Recognition_Challenge_test_set_release.txt")
_TEMPLATE = Path("test_set_examples", "CVPR_6th_ABAW_Expr_test_set_example.txt")


def run_demo(work_dir: Path, config: PipelineConfig, say: Callable[[str], None]) -> None:
    """Render the data and run every stage; what is there already from an earlier run is kept.

    Writes below `work_dir`: `data/`, `manifest.csv`, `encoder/`, `features.zarr/`, `runs/`, `baselines/`,
    `submission.txt`, `infer/`, `figures/`, `results.json`. `say` is given each stage's last line and the table.

    Raises:
        PipelineError: as the stages; CheckpointError if `work_dir` holds a demo with another config.
    """
    started = time.monotonic()
    data = work_dir / "data"
    annotations, truth, crops = data / "annotations", data / "truth", data / "crops"

    def report(stage: StageReport) -> None:
        for line in (*stage.notes, stage.summary()):
            say(line)

    report(render_dataset(data, seed=config.seed))
    manifest = demo_manifest(data)
    write_manifest(manifest, work_dir / "manifest.csv")
    problems = check_manifest(work_dir / "manifest.csv", annotations, crops, _TASK, template=data / _TEMPLATE)
    if errors := [str(problem) for problem in problems if problem.severity == "error"]:
        raise DataError(listing(errors))
    say(f"check: 0 errors, {len(problems)} warnings; `vnaw check` lists them")

    encoder = RunFolder(work_dir / "encoder")
    report(finetune_encoder(manifest, annotations, crops, encoder.path, config))
    tuned = config.model_copy(update={"encoder": config.encoder.model_copy(update={"weights": encoder.best.resolve()})})
    store_path = work_dir / "features.zarr"
    report(extract_features(manifest, crops, store_path, tuned))

    train, validation = (_bank_of_split(manifest, store_path, split) for split in ("train", "validation"))
    labels = _given_labels(manifest, annotations, train)
    tables: dict[str, Location] = {
        "majority class": _majority_table(labels, validation, work_dir),
        "per-frame linear probe": _probe_table(train, labels, validation, work_dir),
    }
    for name, weighting in (("temporal, cross-entropy", "none"), ("temporal, V-NAW", "naw")):
        chosen = tuned.model_copy(update={"loss": tuned.loss.model_copy(update={"weighting": weighting})})
        run = RunFolder(work_dir / "runs" / ("vnaw" if weighting == "naw" else "cross_entropy"))
        report(train_windows(manifest, annotations, store_path, run.path, chosen))
        report(predict_videos(manifest, store_path, run.path, "validation"))
        tables[name] = run.predictions("validation")

    report(predict_videos(manifest, store_path, run.path, "test"))
    answers = read_predictions(run.predictions("test"), _TASK)
    lines = write_submission(answers, data / _TEMPLATE, work_dir / "submission.txt", _TASK)
    say(f"submit: {lines} lines written and read back -> {work_dir / 'submission.txt'}")

    trees = {"given": annotations, "truth": truth}
    scores = {
        name: {kind: evaluate_predictions(manifest, root, table) for kind, root in trees.items()}
        for name, table in tables.items()
    }
    write_json(
        work_dir / "results.json",
        {name: {kind: scores_as_json(s, _TASK) for kind, s in of.items()} for name, of in scores.items()},
    )
    report(_infer(work_dir, manifest, crops, truth))
    _draw(work_dir / "figures", manifest, annotations, truth, tables["temporal, V-NAW"], scores["temporal, V-NAW"])
    say(format_table(scores))
    say(f"figures in {work_dir / 'figures'}, scores in {work_dir / 'results.json'}")
    minutes, seconds = divmod(time.monotonic() - started, 60)
    say(f"demo: done in {minutes:.0f} min {seconds:02.0f} s")


def _infer(work_dir: Path, manifest: pd.DataFrame, crops: Path, truth: Path) -> StageReport:
    """Show `vnaw infer`, with the encoder for photographs, on the validation person who smiles most as a video file,
    and on one of their smiles as an image."""
    out_dir = work_dir / "infer"
    people = manifest[manifest.split == "validation"]
    smiling = [int((read_annotation(truth / path, _TASK) == _HAPPINESS).sum()) for path in people.annotation]
    person = people.iloc[int(np.argmax(smiling))]
    labels = read_annotation(truth / person.annotation, _TASK)[: person.num_frames]
    pictures = [crops / person.crops / image_name(frame_index) for frame_index in range(person.num_frames)]
    smiles = [path for path, label in zip(pictures, labels, strict=False) if label == _HAPPINESS and path.is_file()]
    clip, image = out_dir / "drawn_person.mp4", out_dir / "drawn_face.png"
    write_clip(pictures, clip)
    shown = scene(smiles[len(smiles) // 2] if smiles else pictures[0])
    write_bytes(image, cv2.imencode(".png", shown[..., ::-1])[1].tobytes())
    report = infer_videos([clip, image], out_dir, PipelineConfig())
    annotated = read_image(out_dir / image.stem / "annotated.png")
    timeline = read_image(min((out_dir / clip.stem).glob("timeline*.png")))
    margin = timeline.shape[1] - annotated.shape[1]
    wide = np.pad(annotated, ((0, 0), (margin // 2, margin - margin // 2), (0, 0)), constant_values=255)
    picture = np.concatenate([wide, timeline])[..., ::-1]
    write_bytes(work_dir / "figures" / "infer.png", cv2.imencode(".png", picture)[1].tobytes())
    return report


def demo_manifest(data: Path) -> pd.DataFrame:
    """The manifest of a rendered data set, with three folds; `data_manifests/demo_expr.csv` is the default one's."""
    return build_manifest(
        data / "annotations", data / "crops", _TASK, data / _TEST_LIST, data / _TEMPLATE, folds=FOLDS, seed=0
    )


def format_table(scores: dict[str, dict[str, ExpressionScores]]) -> str:
    """Macro-F1 in percent on validation, against the given labels and against the truth."""
    lines = ["", f"{'macro-F1 on validation, %':<28}{'given labels':>14}{'truth':>10}"]
    for name, of in scores.items():
        lines.append(f"{name:<28}{100 * of['given'].macro_f1:>14.1f}{100 * of['truth'].macro_f1:>10.1f}")
    return "\n".join([*lines, ""])


def _bank_of_split(manifest: pd.DataFrame, store_path: Path, split: str) -> FeatureBank:
    return open_bank(open_store(store_path), list(manifest.video_id[manifest.split == split]), shown=False)


def _given_labels(manifest: pd.DataFrame, annotations: Path, bank: FeatureBank) -> npt.NDArray[np.int64]:
    labels = read_labels(manifest, annotations, _TASK)
    return np.concatenate([labels[video_id] for video_id in bank.video_ids]).astype(np.int64)


def _majority_table(labels: npt.NDArray[np.int64], validation: FeatureBank, work_dir: Path) -> Path:
    """Predict the most frequent given training label everywhere."""
    counts = np.bincount(labels[labels != IGNORE_LABEL], minlength=len(_TASK.outputs))
    shares = (counts / counts.sum()).astype(np.float32)
    path = work_dir / "baselines" / "majority.parquet"
    write_predictions(path, np.broadcast_to(shares, (validation.zero_row, len(shares))), validation, [_TASK])
    return path


def _probe_table(train: FeatureBank, labels: npt.NDArray[np.int64], validation: FeatureBank, work_dir: Path) -> Path:
    """Logistic regression on single frames, classes balanced, trained on the given labels; gaps filled as elsewhere.

    Of C = .01, .1 and 1, the first does best, so that the baseline is not a weak one.
    """
    used = (labels != IGNORE_LABEL) & train.valid[:-1].numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced"))
    probe.fit(train.embeddings[:-1].numpy()[used].astype(np.float32), labels[used])
    answered = probe.predict_proba(validation.embeddings[:-1].numpy().astype(np.float32))
    probabilities = np.zeros((validation.zero_row, len(_TASK.outputs)), dtype=np.float32)
    probabilities[:, probe.classes_] = answered
    shares = np.bincount(labels[used], minlength=len(_TASK.outputs)) / used.sum()
    path = work_dir / "baselines" / "probe.parquet"
    finished = finish_probabilities(probabilities, validation, shares, PredictConfig(), [_TASK])
    write_predictions(path, finished, validation, [_TASK])
    return path


def _draw(
    figures: Path,
    manifest: pd.DataFrame,
    annotations: Path,
    truth: Path,
    predictions: Location,
    scores: dict[str, ExpressionScores],
) -> None:
    """Confusion against given labels and truth, and the time line of the validation video with most expressions."""
    for kind, of in scores.items():
        title = f"V-NAW against the {'given labels' if kind == 'given' else 'truth'}, macro-F1 {100 * of.macro_f1:.1f}"
        draw_confusion(figures / f"confusion_{kind}.png", of.confusion, _TASK.outputs, title)
    rows = manifest[manifest.split == "validation"]
    true_labels = {
        video_id: read_annotation(truth / annotation, _TASK)
        for video_id, annotation in zip(rows.video_id, rows.annotation, strict=True)
    }
    video_id = max(true_labels, key=lambda name: len(np.unique(true_labels[name])))
    table = read_predictions(predictions, _TASK)
    of_video = table[table.video_id == video_id].sort_values("frame_index")
    probabilities = of_video[_TASK.prediction_columns].to_numpy(dtype=np.float32)
    given = read_annotation(annotations / rows.set_index("video_id").annotation[video_id], _TASK)
    draw_timeline(
        figures / "timeline.png",
        {
            "truth": true_labels[video_id],
            "given labels": given,
            "V-NAW": probabilities.argmax(axis=1),
        },
        probabilities,
        _TASK.outputs,
        f"{video_id} (validation)",
    )
