"""Videos made of real faces with real label noise: what does each part of the method bring when the truth is known?

    python benchmarks/ferplus_streams.py WORK_DIR --faces FERPLUS --validation FERPLUS --imagenet FILE

A stream is a Markov chain of runs of one expression each, with Aff-Wild2's shares of the classes (the next run's class
does not depend on the last one's), 20 to 400 frames long. A run shows one to four faces whose majority of ten voters
is that expression, one after the other; each drifts smoothly (turn, shift, size, light, blur), so that neighbouring
frames are nearly the same. **The dynamics are invented and the person changes within a stream**: what is real is the
faces and how people disagree about them. An annotator gives a face one label for as long as it is shown: one of its
ten votes, drawn at random (`voter`), or its original label in FER2013 (`original`). The truth is the majority; it
scores and does nothing else. Some runs have no label, some frames no face. Training streams show training faces
only, validation streams validation faces.

Streams are crops, annotations and a manifest as Aff-Wild2 has them, and go through the stages of the pipeline. Written
to WORK_DIR: `crops/`, `annotations_*/`, `manifest.csv`, one store per encoder, `runs/`, `results.jsonl`, `tables.md`.
A rerun does what is missing.
"""

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import simplejpeg
import torch
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vnaw_pipeline.annotations import write_annotation
from vnaw_pipeline.checkpoints import read_header
from vnaw_pipeline.config import EncoderConfig, PipelineConfig, PredictConfig, SmoothConfig, load_config
from vnaw_pipeline.crops.detect import Face
from vnaw_pipeline.crops.sink import Crop, find_pack, write_pack
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.facesets.faces import FaceSet
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.features.bank import FeatureBank, open_bank
from vnaw_pipeline.features.encoder import encoder_of_weights, find_weights
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.losses.naw import constants_of, naw_weights
from vnaw_pipeline.manifests import build_manifest, read_labels, write_manifest
from vnaw_pipeline.metrics import score_predictions
from vnaw_pipeline.prediction.finish import finish_video
from vnaw_pipeline.prediction.predict import predict_videos, read_predictions, write_predictions
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.provenance import write_text
from vnaw_pipeline.runs import RunFolder, open_run
from vnaw_pipeline.stages import usable_cores
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL, SPLIT_DIRS, TASKS, Split
from vnaw_pipeline.training.windows import train_windows

CONFIG = Path(__file__).parent.parent / "configs" / "ferplus_streams.yaml"
TASK = TASKS["expr8"]
Overrides = dict[str, Any]
CLASS_FRAMES = (179_434, 17_153, 10_978, 9_110, 94_344, 80_671, 30_639, 169_887)
"""Labelled training frames of Aff-Wild2, by class."""
STREAM_FRAMES, RUN_FRAMES = (300, 3_000), (20, 400)
UNLABELLED_RUNS, ABSENT_FRAMES, LONGEST_ABSENCE = 0.1, 0.02, 20
CROP_PX, FACE_REGION = 112, (0.05, 0.1, 0.95, 1.0)
"""FERPlus pictures show this part of an aligned crop (`configs/fer_lite0.yaml`)."""
KINDS = ("voter", "original", "truth")
FPS = 30.0

AUGMENTED: Overrides = {"windows.skip.mode": "drop", "windows.erase_share": 0.2}
NAW: Overrides = {"loss.weighting": "naw"}
RECIPES: dict[str, Overrides] = {
    "plain": {},
    "+ Aug": AUGMENTED,
    "+ NAW": NAW,
    "+ Aug + NAW": AUGMENTED | NAW,
    "class-weighted": {"loss.weighting": "class", "train.sampling": "uniform"},  # in place of balanced draws
    "label smoothing .1": {"loss.label_smoothing": 0.1},
    "generalised cross-entropy": {"loss.objective": "gce"},
    "ELR": {"loss.objective": "elr"},
    "soft bootstrapping .8": {"loss.objective": "bootstrap", "loss.bootstrap_beta": 0.8},
    "+ Aug + NAW, w alone": AUGMENTED | NAW | {"loss.mix": "lam", "loss.lam_a": 0.0},
    "+ Aug + NAW, gradient through w": AUGMENTED | NAW | {"loss.weights_carry_gradient": True},
}
IN_FLOAT32 = "plain, scored in float32"
"""The plain model, trained on embeddings by `extract.backend: auto`, on validation embeddings that PyTorch computed in
float32: what the fast arithmetic does to a score."""
FEW_SEEDS = 3
PAPER = ("plain", "+ Aug", "+ NAW", "+ Aug + NAW")
EXACT = "shipped_float32.zarr"
HALF_WIDTHS = (0, 5, 10, 20, 40, 80)


def main(
    work_dir: Path,
    faces: Annotated[Path, typer.Option(help="FERPlus, for its training faces.")],
    validation: Annotated[Path, typer.Option(help="FERPlus, for its validation faces.")],
    imagenet: Annotated[Path, typer.Option(help="ImageNet weights, as face_encoders.py leaves them.")],
    seeds: Annotated[int, typer.Option(help="Seeds of every recipe.", min=1)] = 5,
    streams: Annotated[int, typer.Option(help="Training streams; the validation streams are 3 for 10 of them.")] = 200,
) -> None:
    make_streams(work_dir, faces, "train", streams)
    make_streams(work_dir, validation, "validation", -(-3 * streams // 10))
    manifest = build_manifest(work_dir / "annotations_truth", work_dir / "crops", TASK)
    write_manifest(manifest, work_dir / "manifest.csv")
    stores = {}
    for name, encoder in encoders(imagenet).items():
        stores[name] = work_dir / f"{name}.zarr"
        config = PipelineConfig(encoder=encoder)
        sys.stdout.write(extract_features(manifest, work_dir / "crops", stores[name], config).summary() + "\n")
    exact = PipelineConfig(encoder=encoders(imagenet)["shipped"], extract={"backend": "torch", "precision": "fp32"})
    extract_features(manifest[manifest.split == "validation"], work_dir / "crops", work_dir / EXACT, exact)
    results = Results(work_dir / "results.jsonl")
    started = time.monotonic()
    jobs = [job for job in jobs_of(seeds) if not results.has(job)]
    context = get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(one_run, job, work_dir, manifest, stores[job.encoder]): job for job in jobs}
        for done in as_completed(running):
            results.add(running[done], done.result())
            write_text(work_dir / "tables.md", tables(results))
    sys.stdout.write(f"{tables(results)}\n{len(jobs)} runs in {(time.monotonic() - started) / 60:.0f} minutes\n")


class Job(NamedTuple):
    """One run. `level` is '' for the linear probe on single frames."""

    encoder: str
    labels: str
    recipe: str
    level: str
    seed: int


def encoders(imagenet: Path) -> dict[str, EncoderConfig]:
    """The encoder that ships, which has learnt from the faces of the training streams, and the same network as it was
    before, which has seen no face of FERPlus."""
    shipped = encoder_of_weights("fer_lite0")
    header = read_header(find_weights(shipped.weights))
    seen = {key: header[key] for key in ("input_px", "grey", "detail_px", "face_region")}
    before = EncoderConfig.model_validate({"name": shipped.name, "weights": imagenet, **seen})
    return {"shipped": shipped, "imagenet": before}


def jobs_of(seeds: int) -> list[Job]:
    """With the shipped encoder and one voter's labels: every recipe at both levels. At the paper's level, the paper's
    four also with the original labels, and with the encoder that has not seen the faces. What is not the paper's, or
    not on its ground, gets `FEW_SEEDS`."""
    grounds = [("shipped", "voter"), ("shipped", "original"), ("imagenet", "voter")]
    jobs = [Job(*ground, "linear probe on frames", "", 0) for ground in grounds]
    for seed in range(seeds):
        recipes = RECIPES if seed < FEW_SEEDS else PAPER
        jobs += [Job(*grounds[0], recipe, level, seed) for level in ("window", "frame") for recipe in recipes]
        jobs += [Job(*grounds[0], IN_FLOAT32, "frame", seed)] if seed < FEW_SEEDS else []
        if seed < FEW_SEEDS:
            jobs += [Job(*ground, recipe, "window", seed) for ground in grounds[1:] for recipe in PAPER]
    return jobs


def one_run(job: Job, work_dir: Path, manifest: pd.DataFrame, store: Path) -> dict[str, float]:
    """Macro-F1 of a run against the truth, and against the given labels; as the model says, and smoothed with the
    half-width that suits the *given* validation labels best."""
    given, truth = work_dir / f"annotations_{job.labels}", work_dir / "annotations_truth"
    run = RunFolder(work_dir / "runs" / re.sub(r"[^a-z0-9]+", "_", "_".join(map(str, job)).lower()))
    weights = {}
    if job.level:
        overrides = {"seed": job.seed, "loss.level": job.level, **RECIPES.get(job.recipe, {})}
        config = load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])
        train_windows(manifest, given, store, run.path, config)
        if job.recipe == IN_FLOAT32:
            raw = predictions_on(work_dir / EXACT, run)
        else:
            predict_videos(manifest, store, run.path, "validation")
            raw = read_predictions(run.raw_predictions("validation"), TASK)
        if config.loss.weighting == "naw" and job.seed == 0:
            weights = mean_weights(manifest, given, truth, store, run, config)
    else:
        raw = probe_predictions(manifest, given, store)
    scored = manifest[manifest.split == "validation"]
    of_truth, of_given = (
        np.concatenate(list(read_labels(scored, annotations, TASK).values())) for annotations in (truth, given)
    )
    tables = {half_width: finished(raw, half_width) for half_width in HALF_WIDTHS}
    by_given = {half_width: macro_f1(of_given, table) for half_width, table in tables.items()}
    half_width = max(by_given, key=lambda candidate: by_given[candidate])
    figures = {"truth": macro_f1(of_truth, tables[0]), "given": by_given[0]}
    figures |= {"smoothed": macro_f1(of_truth, tables[half_width]), "half_width": half_width}
    shutil.rmtree(run.path, ignore_errors=True)
    return figures | weights


def mean_weights(
    manifest: pd.DataFrame, given: Path, truth: Path, store: Path, run: RunFolder, config: PipelineConfig
) -> dict[str, float]:
    """What NAW gives the training frames that the best epoch's model sees: rightly and wrongly labelled ones apart, and
    how many of them are wrong."""
    predict_videos(manifest, store, run.path, "train")
    raw = read_predictions(run.raw_predictions("train"), TASK)
    train = manifest[manifest.split == "train"]
    labels, true = (np.concatenate(list(read_labels(train, of, TASK).values())) for of in (given, truth))
    used = (labels != IGNORE_LABEL) & raw["valid"].to_numpy()
    probabilities = torch.from_numpy(raw[TASK.prediction_columns].to_numpy(np.float32)[used])
    weights = naw_weights(probabilities, torch.from_numpy(labels[used]), 1.0, constants_of(config.loss)).numpy()
    is_right = (labels == true)[used]
    return {
        "weight_right": float(weights[is_right].mean()),
        "weight_wrong": float(weights[~is_right].mean()),
        "wrong_share": float((~is_right).mean()),
    }


def finished(raw: pd.DataFrame, half_width: int) -> npt.NDArray[np.float32]:
    """Raw predictions (N, K) with gaps filled, and smoothed by a mean."""
    smoothing = SmoothConfig(kind="mean", half_width=half_width) if half_width else SmoothConfig()
    answers, valid = raw[TASK.prediction_columns].to_numpy(np.float32), raw["valid"].to_numpy()
    flat = np.full(answers.shape[1], 1 / answers.shape[1], np.float32)
    final = np.empty_like(answers)
    for rows in raw.groupby("video_id", sort=False).indices.values():
        final[rows] = finish_video(answers[rows], valid[rows], flat, PredictConfig(smooth=smoothing), TASK.kind)
    return final


def macro_f1(labels: npt.NDArray[np.int64], answers: npt.NDArray[np.float32]) -> float:
    """Over the labelled frames; both stand in the order of the manifest."""
    return score_predictions(TASK, labels, answers).figures["macro_f1"]


def probe_predictions(manifest: pd.DataFrame, given: Path, store: Path) -> pd.DataFrame:
    """Logistic regression on single frames, classes balanced, every tenth labelled frame."""
    opened = open_store(store)
    banks = {
        split: open_bank(opened, list(manifest.video_id[manifest.split == split]), shown=False)
        for split in ("train", "validation")
    }
    labels = read_labels(manifest, given, TASK)
    of_rows = np.concatenate([labels[video_id] for video_id in banks["train"].video_ids])
    used = np.flatnonzero((of_rows != IGNORE_LABEL) & banks["train"].valid[:-1].numpy())[::10]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300, class_weight="balanced"))
    probe.fit(banks["train"].embeddings.numpy()[used].astype(np.float32), of_rows[used])
    bank = banks["validation"]
    answered = np.zeros((bank.zero_row, len(EXPRESSIONS)), np.float32)
    answered[:, probe.classes_] = probe.predict_proba(bank.embeddings[:-1].numpy().astype(np.float32))
    return as_table(answered, bank)


def predictions_on(store: Path, run: RunFolder) -> pd.DataFrame:
    """What a run's model says on a store that was made in another way than the one it learnt from."""
    opened = open_run(run.path)
    bank = open_bank(open_store(store), shown=False)
    config = opened.config
    return as_table(stitch_predictions(opened.model, bank, [TASK], config.windows, config.predict).numpy(), bank)


def as_table(answered: npt.NDArray[np.float32], bank: FeatureBank) -> pd.DataFrame:
    """Answers (N, K) for a bank's frames as a table of predictions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.parquet"
        write_predictions(path, answered, bank, [TASK])
        return read_predictions(path, TASK)


class Results:
    """Finished runs, a JSON line each; written as they end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.figures: dict[Job, dict[str, float]] = {Job(*row["job"]): row["figures"] for row in rows}

    def has(self, job: Job) -> bool:
        return job in self.figures

    def add(self, job: Job, figures: dict[str, float]) -> None:
        self.figures[job] = figures
        sys.stdout.write(f"{' '.join(map(str, job))}: macro-F1 {100 * figures['truth']:.2f}\n")
        sys.stdout.flush()
        lines = [json.dumps({"job": job, "figures": figures}) for job, figures in self.figures.items()]
        write_text(self._path, "\n".join(lines) + "\n")


def tables(results: Results) -> str:
    """Macro-F1 against the truth in percent, mean and deviation over seeds: for each encoder and kind of labels a table
    with a row for each recipe, each level as the model says, how much that is above plain with the same seeds, and
    smoothed. The probe on single frames is of no level and stands with the frames where there is such a column."""
    parts = []
    for ground in dict.fromkeys((job.encoder, job.labels) for job in results.figures):
        of_ground = {job: row for job, row in results.figures.items() if (job.encoder, job.labels) == ground}
        levels = sorted({job.level for job in of_ground if job.level}, reverse=True) or [""]
        columns = [f"{level} {column}".strip() for level in levels for column in ("truth", "above plain", "smoothed")]
        lines = ["### {} encoder, labels: {}".format(*ground), "", f"| recipe | seeds | {' | '.join(columns)} |"]
        lines += ["|---" * (2 + len(columns)) + "|"]
        for recipe in dict.fromkeys(job.recipe for job in of_ground):
            of_recipe = {job: row for job, row in of_ground.items() if job.recipe == recipe}
            seeds = len({job.seed for job in of_recipe})
            cells = [cell for level in levels for cell in cells_of(level, of_recipe, of_ground, levels[-1])]
            lines.append(f"| {recipe} | {seeds} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    lines = ["### Mean weight w of training frames, at the end of the first seed's run", ""]
    lines += ["| run | wrong labels | w, right | w, wrong |", "|---|---|---|---|"]
    for job, row in results.figures.items():
        if "wrong_share" in row:
            name = ", ".join((job.encoder, job.labels, job.recipe, job.level))
            weights = [f"{row[key]:.3f}" for key in ("weight_right", "weight_wrong")]
            cells = [name, f"{100 * row['wrong_share']:.0f}%", *weights]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*parts, *lines]) + "\n"


def cells_of(
    level: str, of_recipe: dict[Job, dict[str, float]], of_ground: dict[Job, dict[str, float]], of_frames: str
) -> list[str]:
    """A recipe's three cells of one level; empty where it has none."""
    rows = {job: row for job, row in of_recipe.items() if (job.level or of_frames) == level}
    plain = {job: of_ground.get(job._replace(recipe="plain")) for job in rows if job.recipe != "plain"}
    gains = [rows[job]["truth"] - of_plain["truth"] for job, of_plain in plain.items() if of_plain is not None]
    truth, smoothed = ([row[key] for row in rows.values()] for key in ("truth", "smoothed"))
    return [mean_and_deviation(truth), mean_and_deviation(gains, "+"), mean_and_deviation(smoothed)]


def mean_and_deviation(shares: list[float], sign: str = "") -> str:
    """In percent; empty for none."""
    if not shares:
        return ""
    values = 100 * np.array(shares)
    return f"{values.mean():{sign}.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Showing:
    """One face of a run, shown from frame `start` up to `stop`."""

    face: int
    start: int
    stop: int
    labels: dict[str, int]


def make_streams(work_dir: Path, faces: Path, split: Split, count: int) -> None:
    """Write the crops and annotations of a split's streams; those that are there already are kept."""
    (work_dir / "crops").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(usable_cores(), get_context("spawn")) as pool:
        list(pool.map(partial(make_stream, work_dir, faces, split), range(count)))


_read_once = cache(read_faces)


def make_stream(work_dir: Path, faces_path: Path, split: Split, number: int) -> None:
    faces = _read_once(faces_path, split)
    video_id = f"{split}_{number:03}"
    generator = np.random.default_rng([list(SPLIT_DIRS).index(split), number])
    num_frames = log_uniform(STREAM_FRAMES, generator)
    showings = plan_stream(faces, num_frames, generator)
    for kind in KINDS:
        labels = np.full(num_frames, IGNORE_LABEL)
        for showing in showings:
            labels[showing.start : showing.stop] = showing.labels[kind]
        path = work_dir / f"annotations_{kind}" / TASK.annotation_dirs[0] / SPLIT_DIRS[split]
        write_annotation(path / f"{video_id}.txt", labels, TASK)
    if find_pack(work_dir / "crops", video_id) is None:
        crops = draw_stream(faces, showings, absent_frames(num_frames, generator), generator)
        write_pack(work_dir / "crops", video_id, crops, Source(Path(video_id)), {"benchmark": "ferplus_streams"})


@dataclass(frozen=True)
class Source:
    """What a pack records of the video it was made from."""

    path: Path
    fps: float = FPS

    def loss(self) -> str | None:
        return None


def plan_stream(faces: FaceSet, num_frames: int, generator: np.random.Generator) -> list[Showing]:
    """Which face is shown when, and what each kind of annotator calls it."""
    majority = np.where(faces.single != IGNORE_LABEL, faces.majority(), IGNORE_LABEL)
    by_class = [np.flatnonzero(majority == index) for index in range(len(EXPRESSIONS))]
    shares = np.array(CLASS_FRAMES) / sum(CLASS_FRAMES)
    showings, start = [], 0
    while start < num_frames:
        expression = int(generator.choice(len(EXPRESSIONS), p=shares))
        stop = min(num_frames, start + log_uniform(RUN_FRAMES, generator))
        chosen = generator.choice(by_class[expression], min(int(generator.integers(1, 5)), stop - start))
        inner = np.sort(generator.choice(np.arange(start + 1, stop), len(chosen) - 1, replace=False))
        bounds = [start, *inner.tolist(), stop]
        is_labelled = generator.random() >= UNLABELLED_RUNS
        for face, first, last in zip(chosen.tolist(), bounds[:-1], bounds[1:], strict=True):
            votes = faces.votes[face, : len(EXPRESSIONS)]
            given = {
                "voter": int(generator.choice(len(votes), p=votes / votes.sum())),
                "original": int(faces.single[face]),
                "truth": expression,
            }
            labels = given if is_labelled else dict.fromkeys(given, IGNORE_LABEL)
            showings.append(Showing(face, first, last, labels))
        start = stop
    return showings


def draw_stream(
    faces: FaceSet, showings: list[Showing], absent: npt.NDArray[np.bool_], generator: np.random.Generator
) -> Iterator[Crop]:
    box = np.array([0, 0, CROP_PX, CROP_PX], dtype=np.float32)
    face = Face(box=box, score=1.0, landmarks=np.full((5, 2), np.nan, np.float32))
    for showing in showings:
        pictures = draw_showing(faces.image(showing.face), showing.stop - showing.start, generator)
        for frame_index, picture in enumerate(pictures, start=showing.start):
            if absent[frame_index]:
                yield Crop(frame_index, frame_index / FPS, None, None)
            else:
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)
                yield Crop(frame_index, frame_index / FPS, face, jpeg)


def draw_showing(picture: Rgb, num_frames: int, generator: np.random.Generator) -> Iterator[Rgb]:
    """A face as aligned crops (112, 112, 3) of its frames, drifting smoothly; even frames are never quite the same."""
    turn, right, down, size, contrast, light, blur = (smooth_noise(num_frames, generator) for _ in range(7))
    x0, y0, x1, y1 = (CROP_PX * share for share in FACE_REGION)
    middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    for frame in range(num_frames):
        angle, scale = 0.15 * turn[frame], (1 + 0.08 * size[frame]) * (x1 - x0) / picture.shape[1]
        linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array(picture.shape[1::-1]) / 2
        shift = middle + 0.04 * CROP_PX * np.array([right[frame], down[frame]]) - linear @ centre
        moved = cv2.warpAffine(
            picture,
            np.column_stack([linear, shift]),
            (CROP_PX, CROP_PX),
            flags=cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if blur[frame] > 0:
            moved = cv2.GaussianBlur(moved, (0, 0), 0.1 + 1.5 * blur[frame])
        lit = (1 + 0.2 * contrast[frame]) * (moved - 128.0) + 128 + 20 * light[frame]
        grain = generator.normal(0, 2, (CROP_PX, CROP_PX, 1))
        yield np.clip(lit + grain, 0, 255).astype(np.uint8)


def smooth_noise(num_frames: int, generator: np.random.Generator, frames_per_knot: int = 25) -> npt.NDArray[np.float64]:
    """A curve within [-1, 1] through random knots, (num_frames,)."""
    knots = generator.uniform(-1, 1, num_frames // frames_per_knot + 2)
    position = np.arange(num_frames) / frames_per_knot
    share = (1 - np.cos(np.pi * (position % 1))) / 2
    before = position.astype(int)
    return (1 - share) * knots[before] + share * knots[before + 1]


def absent_frames(num_frames: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Frames without a face, in spans of up to `LONGEST_ABSENCE`."""
    absent = np.zeros(num_frames, dtype=np.bool_)
    mean_span = (1 + LONGEST_ABSENCE) / 2
    for start in np.flatnonzero(generator.random(num_frames) < ABSENT_FRAMES / mean_span):
        absent[start : start + generator.integers(1, LONGEST_ABSENCE + 1)] = True
    return absent


def log_uniform(bounds: tuple[int, int], generator: np.random.Generator) -> int:
    return round(float(np.exp(generator.uniform(*np.log(bounds)))))


if __name__ == "__main__":
    typer.run(main)
