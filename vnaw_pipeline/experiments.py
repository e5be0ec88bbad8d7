"""Experiments: several runs that differ in a fold, a seed or a few values, trained, predicted, scored and tabled.

`vnaw crossval` and `vnaw ablate` differ only in their list of variants; `vnaw cascade` makes one run of its two. Reads
what `train` reads; writes a run folder per variant, `scores.json` in each (a variant that has it is not run again),
`table.json` and `table.md`.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vnaw_pipeline.config import MaskingConfig, PipelineConfig, changed_config
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.locations import Location
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.prediction.combine import How, combine_runs
from vnaw_pipeline.prediction.evaluate import evaluate_predictions, scores_as_json
from vnaw_pipeline.prediction.predict import predict_videos
from vnaw_pipeline.provenance import digest_bytes, write_json, write_text
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import StageReport
from vnaw_pipeline.tasks import TASKS, TaskName
from vnaw_pipeline.training.windows import seen_by_encoder, train_windows


@dataclass(frozen=True)
class Variant:
    """One run of an experiment: `name` is its folder, `group` what its scores are averaged over, `fold` None the
    official split."""

    name: str
    group: str
    config: PipelineConfig
    fold: int | None = None


def cross_validate(
    manifest: Path | pd.DataFrame, annotations_dir: Path, store_path: str | Location, out: Path, config: PipelineConfig
) -> StageReport:
    """Train, predict and score the official split and every fold of the manifest, as in Table 1 of V-NAW.

    Raises:
        DataError: a manifest without folds; else as the stages.
    """
    videos = read_manifest(manifest)
    return run_experiment("crossval", fold_variants(videos, config), videos, annotations_dir, store_path, out)


def ablate(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    store_path: str | Location,
    out: Path,
    config: PipelineConfig,
    seeds: Sequence[int],
) -> StageReport:
    """Train, predict and score plain, with augmentation, with NAW and with both, by every seed, as in Table 2 of V-NAW.

    Raises:
        ConfigError: a config without NAW or without augmentation, a seed given twice; else as the stages.
    """
    videos = read_manifest(manifest)
    return run_experiment("ablate", ablation_variants(config, seeds), videos, annotations_dir, store_path, out)


def cascade(
    manifest: Path | pd.DataFrame, annotations_dir: Path, store_path: str | Location, out: Path, config: PipelineConfig
) -> StageReport:
    """Train and score CFC-SP's two models, one for each label space, and their hard and soft cascade into expr8.

    `<out>/hard` and `<out>/soft` are composed runs, as of `vnaw combine`.

    Raises:
        ConfigError: a config of another task than expr8, or with further tasks; else as the stages.
    """
    if [task.name for task in config.tasks] != ["expr8"]:
        found = ", ".join(task.name for task in config.tasks)
        raise ConfigError(f"A cascade answers task expr8 alone; the config has {found}. Set task=expr8.")
    videos = read_manifest(manifest)
    members: tuple[TaskName, ...] = ("coarse5", "negative4")
    variants = [Variant(name, name, changed_config(config, {"task": name})) for name in members]
    report, scores = run_variants("cascade", variants, videos, annotations_dir, store_path, out)
    ways: tuple[How, ...] = ("hard", "soft")
    for how in ways:
        combine_runs([out / name for name in members], how, out / how, "validation")
        table = RunFolder(out / how).predictions("validation")
        scores[how] = scores_as_json(evaluate_predictions(videos, annotations_dir, table), TASKS["expr8"])
    runs = [
        {"name": name, "group": name, "accuracy": of["accuracy"], "macro_f1": of["macro_f1"]}
        for name, of in scores.items()
    ]
    notes = [
        "Each member is scored in its own label space, over the frames that are in it; the cascades in expr8.",
        *_notes(variants, scores),
        *_seen_by_encoder(variants, videos, store_path),
    ]
    return _write_table(report, {"runs": runs, "groups": [], "notes": notes}, out)


def fold_variants(videos: pd.DataFrame, config: PipelineConfig) -> list[Variant]:
    """The official split, if the manifest has validation videos, and each of its folds."""
    folds = sorted({int(fold) for of_video in videos["fold"] for fold in of_video.split()})
    if not folds:
        raise DataError("The manifest was built without folds. Build it again with `vnaw manifest --folds 3`.")
    official = [Variant("official", "official split", config)] if (videos["split"] == "validation").any() else []
    return official + [Variant(f"fold{fold}", "folds", config, fold) for fold in folds]


def ablation_variants(config: PipelineConfig, seeds: Sequence[int]) -> list[Variant]:
    """Four recipes by every seed; `config` is the one with both, the others leave out of it."""
    if TASKS[config.task].kind != "classes":
        raise ConfigError(
            f"Noise-aware weights, which `vnaw ablate` leaves out, are for expressions, not {config.task}."
        )
    unaugmented = config.windows.model_copy(
        update={
            "skip": config.windows.skip.model_copy(update={"mode": "none"}),
            "erase_share": 0.0,
            "views": (PLAIN,),
            "random_masking": MaskingConfig(),
        }
    )
    unweighted = config.loss.model_copy(update={"weighting": "none"})
    if config.loss.weighting != "naw" or config.windows == unaugmented:
        raise ConfigError(
            "An ablation starts from the whole recipe and leaves out of it: loss.weighting must be 'naw' and frames "
            f"must be skipped or erased; found loss.weighting={config.loss.weighting}, "
            f"windows.skip.mode={config.windows.skip.mode}, windows.erase_share={config.windows.erase_share}."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"Give each seed once, such as --seed 0 --seed 1; found {', '.join(map(str, seeds))}.")
    recipes: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("plain", {"windows": unaugmented, "loss": unweighted}),
        "aug": ("+ Aug", {"loss": unweighted}),
        "naw": ("+ NAW", {"windows": unaugmented}),
        "both": ("+ Aug + NAW", {}),
    }
    return [
        Variant(f"{name}_seed{seed}", group, config.model_copy(update={**changes, "seed": seed}))
        for name, (group, changes) in recipes.items()
        for seed in seeds
    ]


def run_experiment(
    label: str,
    variants: Sequence[Variant],
    videos: pd.DataFrame,
    annotations_dir: Path,
    store_path: str | Location,
    out: Path,
) -> StageReport:
    """Run the variants that have no scores yet, then write the table of all; the report's notes are the table."""
    report, scores = run_variants(label, variants, videos, annotations_dir, store_path, out)
    table = score_table(variants, scores)
    table["notes"] += _seen_by_encoder(variants, videos, store_path)
    return _write_table(report, table, out)


def run_variants(
    label: str,
    variants: Sequence[Variant],
    videos: pd.DataFrame,
    annotations_dir: Path,
    store_path: str | Location,
    out: Path,
) -> tuple[StageReport, dict[str, dict[str, Any]]]:
    """Run the variants that have no scores yet; the scores of all, by name."""
    started = time.monotonic()
    tasks = {task.name: task for variant in variants for task in variant.config.tasks}
    labels = [read_labels(videos, annotations_dir, task) for task in tasks.values()]
    made_of = {
        "labels": digest_bytes(*(of_video.tobytes() for of_task in labels for of_video in of_task.values())),
        "features": open_store(store_path).fingerprint,
        "manifest": digest_bytes(videos.to_csv(index=False).encode()),
    }
    report = StageReport(label, units="runs")
    scores = {}
    for variant in variants:
        path = out / variant.name / "scores.json"
        wanted = {**made_of, "fold": variant.fold, "config": variant.config.model_dump(mode="json")}
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("made_of") == wanted:
            report.skipped += 1
        else:
            # A folder of another config, fold, store or labels is refused by the training itself.
            found = {
                "made_of": wanted,
                "scores": _run(variant, videos, annotations_dir, store_path, RunFolder(path.parent)),
            }
            write_json(path, found)
            report.done += 1
        scores[variant.name] = found["scores"]
    report.seconds = time.monotonic() - started
    return report, scores


def _write_table(report: StageReport, table: dict[str, Any], out: Path) -> StageReport:
    write_json(out / "table.json", table)
    write_text(out / "table.md", format_table(table))
    report.notes = [*format_table(table).splitlines(), f"written to {out / 'table.md'} and table.json"]
    return report


def _run(
    variant: Variant, videos: pd.DataFrame, annotations_dir: Path, store_path: str | Location, run: RunFolder
) -> dict[str, Any]:
    try:
        train_windows(videos, annotations_dir, store_path, run.path, variant.config, fold=variant.fold)
    except CheckpointError as error:
        # A training advises --overwrite, which the commands for experiments have not: it would start all variants anew.
        reason, of_another_run, _ = str(error).partition(" Give a new run folder")
        if not of_another_run:
            raise
        raise CheckpointError(f"{reason} Give another --out, or remove {run.path} to train it afresh.") from error
    predict_videos(videos, store_path, run.path, "validation")
    task = TASKS[variant.config.task]
    table = run.predictions("validation")
    return scores_as_json(evaluate_predictions(videos, annotations_dir, table, task.name, fold=variant.fold), task)


def score_table(variants: Sequence[Variant], scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every run's shares, and mean and sample deviation of each group of more than one run, as a JSON object."""
    runs = [{"name": of.name, "group": of.group, **_shares(scores[of.name])} for of in variants]
    groups = []
    for group in dict.fromkeys(of.group for of in variants):
        rows = [_shares(scores[of.name]) for of in variants if of.group == group]
        if len(rows) > 1:
            mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
            deviation = {key: statistics.stdev(row[key] for row in rows) for key in rows[0]}
            groups.append({"group": group, "runs": len(rows), "mean": mean, "deviation": deviation})
    return {"runs": runs, "groups": groups, "notes": _notes(variants, scores)}


def _shares(scores: dict[str, Any]) -> dict[str, float]:
    """What a table shows of a run's scores: the shares at their top level, then those of each class or dimension."""
    overall = {key: value for key, value in scores.items() if isinstance(value, float)}
    return overall | {
        name: value for of_each in scores.values() if isinstance(of_each, dict) for name, value in of_each.items()
    }


def _notes(variants: Sequence[Variant], scores: dict[str, dict[str, Any]]) -> list[str]:
    notes = [
        "Every labelled validation frame counts once. The epoch of each run was chosen on the videos it is scored on.",
    ]
    if any(of.fold is not None for of in variants):
        notes.append("± is the deviation between folds; folds of one manifest share training videos.")
    for of in variants:
        confusion = scores[of.name].get("confusion", [])
        missing = [name for name, row in zip(scores[of.name].get("f1", {}), confusion, strict=False) if not sum(row)]
        if missing:
            notes.append(
                f"{of.name}: no frame is labelled {', '.join(missing)}; that F1 is 0 and part of the mean, as in "
                "scikit-learn (zero_division=0)."
            )
    return notes


def _seen_by_encoder(variants: Sequence[Variant], videos: pd.DataFrame, store_path: str | Location) -> list[str]:
    """A note for each split whose validation recordings the store's encoder has learnt from."""
    store = open_store(store_path)
    names = {of.fold: "official split" if of.fold is None else f"fold {of.fold}" for of in variants}
    splits = {fold: fold_split(videos, fold) for fold in names}
    return [f"{names[fold]}: {note}" for fold in names for note in seen_by_encoder(splits[fold], store)]


def format_table(table: dict[str, Any]) -> str:
    """The table as Markdown, in percent."""
    columns = [key for key in table["runs"][0] if key not in ("name", "group")]
    lines = ["| run, % | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for run in table["runs"]:
        lines.append(f"| {run['name']} | " + " | ".join(f"{100 * run[key]:.2f}" for key in columns) + " |")
    for of in table["groups"]:
        cells = [f"{100 * of['mean'][key]:.2f} ± {100 * of['deviation'][key]:.2f}" for key in columns]
        lines.append(f"| {of['group']}, mean of {of['runs']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in table["notes"]), ""])
