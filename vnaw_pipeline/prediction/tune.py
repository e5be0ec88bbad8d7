"""Stage `tune`. Reads a run's raw validation table and those videos' labels, writes `tuned.json`: smoothing, a bias
per class, a threshold per action unit.

Only validation is tuned on: the training videos know their labels by heart, and the test videos have none. A score on
the frames that values were chosen on flatters, so a second one comes from values chosen on other source videos.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.annotations import Labels, labelled
from vnaw_pipeline.config import PredictConfig, SmoothConfig
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import score_predictions
from vnaw_pipeline.prediction.bias import best_bias
from vnaw_pipeline.prediction.evaluate import rows_by_video
from vnaw_pipeline.prediction.finish import decide, finish_video
from vnaw_pipeline.prediction.smooth import Probabilities
from vnaw_pipeline.prediction.tables import TUNED, PredictedRun, open_predicted
from vnaw_pipeline.prediction.thresholds import best_thresholds
from vnaw_pipeline.provenance import digest_bytes, utc_now, write_json
from vnaw_pipeline.stages import StageReport, progress_bar
from vnaw_pipeline.tasks import Task, TaskKind, output_columns

HALF_WIDTHS = (3, 10, 20, 50, 100)
"""Half-widths to choose from, in frames. At 30 frames a second: a tenth of a second to more than three seconds."""
SHARES = (0.5, 0.8)
"""Shares of the mean to choose from, for smooth predicting; 1 is the mean itself."""
_PARTS = 5
_SPLIT = "validation"
_DECISIONS = {"classes": "bias", "units": "thresholds"}


@dataclass(frozen=True)
class TuningVideo:
    """A video to tune on: raw answers (T, K), which frames have a face (T,), labels, and its recording."""

    source_video: str
    raw: Probabilities
    valid: npt.NDArray[np.bool_]
    labels: Labels


@dataclass(frozen=True)
class Tuning:
    """The values found, and scores on the same labelled frames.

    `before`: as the run finishes its answers by itself. `after`: with the values, on the frames they were chosen on.
    `cross_tuned`: every part of the source videos with values chosen on the other parts; None if there is one source
    video only.
    """

    predict: PredictConfig
    before: float
    after: float
    cross_tuned: float | None
    parts: int


def tune_run(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    run_dir: Path,
    predictions: str | Location | None = None,
) -> StageReport:
    """Tune what happens after the model on the validation videos (of a fold's run, the fold's), for a trained or
    composed run; `predict` and `combine` use it when asked.

    `predictions` None: the run's own folder of tables; else another one, or `s3://...`.

    Raises:
        DataError: tables or labels that are missing or do not fit each other.
    """
    started = time.monotonic()
    run = open_predicted(run_dir, predictions)
    videos = read_manifest(manifest)
    videos = videos[fold_split(videos, run.fold)["split"] == _SPLIT]
    if videos.empty:
        raise DataError(f"The manifest has no videos in split '{_SPLIT}' to tune on.")
    source_videos = dict(zip(videos["video_id"], videos["source_video"], strict=True))
    tunings, tuned_on = {}, {}
    for task, columns in zip(run.tasks, output_columns(run.tasks).values(), strict=True):
        labels = read_labels(videos, annotations_dir, task)
        annotated = sum(int(labelled(of_video).sum()) for of_video in labels.values())
        if not annotated:
            raise DataError(f"No frame of the split '{_SPLIT}' has a label for task '{task.name}' to tune on.")
        raw = run.table(_SPLIT, task, raw=True)
        tuning_videos = _tuning_videos(raw, labels, source_videos, task)
        untuned = run.predict.of_task(task.name)
        tunings[task] = tune(
            tuning_videos, run.without_any[columns], untuned, task, smoothings(untuned.smooth, task.kind)
        )
        digest = digest_bytes(*(video_id.encode() + of_video.tobytes() for video_id, of_video in labels.items()))
        tuned_on[task.name] = {"labels": digest, "videos": len(labels), "frames": annotated}
    write_json(
        run.folder.path / TUNED,
        {
            "predict": _joined(tunings).model_dump(mode="json", exclude={"batch_windows", "precision"}),
            "digest": run.digest,
            "tuned_on": {"split": _SPLIT, "fold": run.fold, **tuned_on},
            "score": {
                task.name: {
                    "metric": task.metric,
                    "before": tuning.before,
                    "after": tuning.after,
                    "cross_tuned": tuning.cross_tuned,
                    "parts_of_source_videos": tuning.parts,
                }
                for task, tuning in tunings.items()
            },
            "written": utc_now(),
        },
    )
    _note_in_record(run)
    return StageReport(
        "tune",
        done=len(videos),
        seconds=time.monotonic() - started,
        notes=[_in_words(task, tuning) for task, tuning in tunings.items()],
    )


def _joined(tunings: Mapping[Task, Tuning]) -> PredictConfig:
    """One config of what was found for each of a run's tasks, the main one first."""
    main, *_ = (tuning.predict.smooth for tuning in tunings.values())
    smoothed = {task.name: tuning.predict.smooth for task, tuning in tunings.items()}
    return PredictConfig(
        smooth=main,
        further_smooth={name: smooth for name, smooth in smoothed.items() if smooth != main},
        bias=next((tuning.predict.bias for task, tuning in tunings.items() if task.kind == "classes"), None),
        thresholds=next((tuning.predict.thresholds for task, tuning in tunings.items() if task.kind == "units"), None),
    )


def _in_words(task: Task, tuning: Tuning) -> str:
    honest = "one source video only" if tuning.cross_tuned is None else f"{100 * tuning.cross_tuned:.2f}"
    return (
        f"{task.name}: {task.metric_title} on validation {100 * tuning.before:.2f} before, {100 * tuning.after:.2f} "
        f"after on the frames tuned on, {honest} with values from other source videos"
    )


def tune(
    videos: Sequence[TuningVideo],
    without_any: npt.NDArray[np.float32],
    untuned: PredictConfig,
    task: Task,
    candidates: Sequence[SmoothConfig],
) -> Tuning:
    """Choose one of the smoothings together with bias or thresholds; the earliest of equally good ones."""
    annotated = [labelled(video.labels) for video in videos]
    labels = np.concatenate([video.labels[chosen] for video, chosen in zip(videos, annotated, strict=True)])
    part_of_video = tuning_parts([video.source_video for video in videos], [int(of.sum()) for of in annotated])
    part = np.repeat(part_of_video, [int(chosen.sum()) for chosen in annotated])
    num_parts = int(part_of_video.max()) + 1

    def finished(config: PredictConfig) -> Probabilities:
        final = [finish_video(video.raw, video.valid, without_any, config, task.kind) for video in videos]
        return np.concatenate([of_video[chosen] for of_video, chosen in zip(final, annotated, strict=True)])

    def score_of(answers: Probabilities, labels: Labels) -> float:
        return score_predictions(task, labels, answers).figures[task.metric]

    best: dict[int, tuple[float, PredictConfig]] = {}
    held_out: dict[int, Probabilities] = {}
    whole = -1  # no frame is of this part, so all are fitted on
    with progress_bar("tune", len(candidates), "settings") as bar:
        for smoothing in candidates:
            undecided = {_DECISIONS[task.kind]: None} if task.kind in _DECISIONS else {}
            plain = untuned.model_copy(update={"smooth": smoothing, **undecided})
            answers = finished(plain)
            for left_out in (whole, *(range(num_parts) if num_parts > 1 else ())):
                used = part != left_out
                config = fit_decision(answers[used], labels[used], plain, task.kind)
                score = score_of(decide(answers[used], config, task.kind), labels[used])
                if left_out not in best or score > best[left_out][0]:
                    best[left_out] = (score, config)
                    held_out[left_out] = decide(answers[~used], config, task.kind)
            bar.advance(1)
    cross_tuned = None
    if num_parts > 1:
        mixed = np.empty_like(answers)
        for left_out in range(num_parts):
            mixed[part == left_out] = held_out[left_out]
        cross_tuned = score_of(mixed, labels)
    after, predict = best[whole]
    return Tuning(predict, score_of(finished(untuned), labels), after, cross_tuned, num_parts)


def smoothings(first: SmoothConfig, kind: TaskKind) -> list[SmoothConfig]:
    """The settings to try for a task, `first` first; a mode filter only where there are classes."""
    found = [first, SmoothConfig()]
    for half_width in HALF_WIDTHS:
        found += [SmoothConfig(kind="mean", half_width=half_width), SmoothConfig(kind="median", half_width=half_width)]
        found += [SmoothConfig(kind="sp", half_width=half_width, share=share) for share in SHARES]
        if kind == "classes":
            found.append(SmoothConfig(kind="mode", half_width=half_width))
    return list(dict.fromkeys(found))


def fit_decision(answers: Probabilities, labels: Labels, config: PredictConfig, kind: TaskKind) -> PredictConfig:
    """The config with the bias (classes) or the thresholds (units) that suit these frames best."""
    if kind == "classes":
        return config.model_copy(update={"bias": tuple(best_bias(answers, labels).tolist())})
    if kind == "units":
        return config.model_copy(update={"thresholds": tuple(best_thresholds(answers, labels).tolist())})
    return config


def tuning_parts(source_videos: Sequence[str], frames: Sequence[int]) -> npt.NDArray[np.int64]:
    """Part of each video, (V,), at most five: a source video is in one part, the parts have like numbers of frames."""
    totals: dict[str, int] = {}
    for source_video, count in zip(source_videos, frames, strict=True):
        totals[source_video] = totals.get(source_video, 0) + count
    loads = [0] * min(_PARTS, sum(count > 0 for count in totals.values()))
    part = dict.fromkeys(totals, 0)
    for source_video in sorted(totals, key=lambda name: (-totals[name], name)):
        part[source_video] = loads.index(min(loads))
        loads[part[source_video]] += totals[source_video]
    return np.array([part[source_video] for source_video in source_videos])


def _tuning_videos(
    raw: pd.DataFrame, labels: dict[str, Labels], source_videos: dict[str, str], task: Task
) -> list[TuningVideo]:
    videos = []
    for video_id, rows in rows_by_video(raw, {name: len(of_video) for name, of_video in labels.items()}).items():
        answers = rows[task.prediction_columns].to_numpy(dtype=np.float32)
        valid = rows["valid"].to_numpy(dtype=np.bool_)
        videos.append(TuningVideo(source_videos[video_id], answers, valid, labels[video_id]))
    return videos


def _note_in_record(run: PredictedRun) -> None:
    path = run.folder.record
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fold = "" if run.fold is None else f" of fold {run.fold}"
    note = f"smoothing, bias and thresholds on the labels of the {_SPLIT} videos{fold}, see {TUNED}"
    write_json(path, {**record, "tuned": {**record.get("tuned", {}), "answers": note}})
