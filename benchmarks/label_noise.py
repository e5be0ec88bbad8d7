"""Which objective learns best from labels that are wrong as people are wrong? FERPlus faces, four kinds of labels.

    python benchmarks/label_noise.py WORK_DIR --faces FERPLUS --validation FERPLUS --imagenet imagenet_lite0.safetensors

Every run trains the same encoder (tf_efficientnet_lite0 from its ImageNet weights, 48 px) with the same budget on the
same training faces, and is scored on the validation faces by the majority of their ten voters. The faces are few and
the epochs many, so that the encoder comes to learn wrong labels by heart, as it does in long trainings on all of them.
No run is shaped by the score: each is taken as its last epoch leaves it. All objectives are screened with one seed in
each setting; cross-entropy, NLA and the best two by that seed then get five, of which it is one. How far an objective
is above cross-entropy is worked out seed by seed (same faces, labels and order) without that first one. Intervals are
over seeds: the faces stay the same. One line per run in WORK_DIR/results.jsonl; a rerun does what is missing; the
tables are written to WORK_DIR/tables.md. One run per core at a time, each in one thread.
"""

import json
import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy.stats import t as student_t
from torch import nn

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.facesets.faces import FaceSet, join_faces
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.features.encoder import build_encoder, load_encoder
from vnaw_pipeline.losses.naw import NAW_PRESETS, naw_weights
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.faces import classify
from vnaw_pipeline.provenance import digest_bytes, write_json, write_text
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import usable_cores
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL
from vnaw_pipeline.training.faces import LabelledFaces, pretrain_encoder

Labels = npt.NDArray[np.int64]
NUM_FACES, NUM_TRUSTED, EPOCHS = 600, 500, 30
AGREEMENT = {"4 to 5 of 10": (0, 5), "6 to 7": (6, 7), "8 to 9": (8, 9), "10": (10, 10)}
CEILING, GOLD, BIAS = "majority labels", ", gold correction", ", logit bias"
JOINED = "cross-entropy, the trusted faces learnt too"
BASELINES = ("cross-entropy", "NLA (NAW + consistency)")
NLA = {"weighting": "naw", "lam_a": 0.0, "consistency": 0.4}
"""As its public code has it: w times cross-entropy, and consistency."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "class-weighted": {"weighting": "class"},
    "label smoothing .1": {"label_smoothing": 0.1},
    "NAW": {"weighting": "naw"},
    "NLA (NAW + consistency)": NLA,
    "consistency alone": {"consistency": 0.4},
    "generalised cross-entropy": {"objective": "gce"},
    "ELR": {"objective": "elr"},
    "soft bootstrapping .8": {"objective": "bootstrap", "bootstrap_beta": 0.8},
}
DETAILS: dict[str, dict[str, Any]] = {
    "NLA, half plain cross-entropy": NLA | {"lam_a": 0.5},
    "NLA, half plain, gradient through w": NLA | {"lam_a": 0.5, "weights_carry_gradient": True},
    "NLA, gradient through w": NLA | {"weights_carry_gradient": True},
    "NLA, w not normalised": NLA | {"normalised": False},
    "NLA after a third": NLA | {"naw_from": 0.34},
}
"""What the papers leave open about w; tried where labels are flipped at random."""
COMBINED: dict[str, dict[str, Any]] = {
    "GCE + consistency": {"objective": "gce", "consistency": 0.4},
    "ELR + consistency": {"objective": "elr", "consistency": 0.4},
}
"""Tried where the noise is random."""
WITH_GOLD = ("cross-entropy", "NLA (NAW + consistency)", "consistency alone", "generalised cross-entropy")
"""Objectives that are also tried with a transition matrix from the trusted faces."""


def symmetric_flips(faces: FaceSet, share: float, seed: int) -> Labels:
    """The majority labels, a share of them moved to another class at random."""
    generator = np.random.default_rng([seed, 1])
    labels = faces.majority()
    flipped = generator.random(len(labels)) < share
    return np.where(flipped, (labels + generator.integers(1, len(EXPRESSIONS), len(labels))) % len(EXPRESSIONS), labels)


def one_voter(faces: FaceSet, seed: int) -> Labels:
    """One vote of each face, drawn from its votes for an expression."""
    votes = faces.votes[:, : len(EXPRESSIONS)].astype(float)
    sums = votes.cumsum(axis=1)
    drawn = np.random.default_rng([seed, 2]).random(len(votes)) * sums[:, -1]
    return np.asarray((sums <= drawn[:, None]).sum(axis=1), dtype=np.int64)


SETTINGS: dict[str, Callable[[FaceSet, int], Labels]] = {
    "a": lambda faces, seed: symmetric_flips(faces, 0.3, seed),
    "b": one_voter,
    "c": lambda faces, seed: faces.single,
}
TITLES = {
    "a": "(a) the majority labels, 30% of them flipped at random",
    "b": "(b) one vote of each face, drawn at random",
    "c": "(c) the original labels of FER2013",
    "d": f"(d) the original labels, and {NUM_TRUSTED} faces whose majority is known",
}
Job = tuple[str, str, int]
"""Setting, objective, seed."""


def main(
    work_dir: Path,
    faces: Annotated[Path, typer.Option(help="FERPlus, for its training faces.")],
    validation: Annotated[Path, typer.Option(help="FERPlus, for its validation faces.")],
    imagenet: Annotated[Path, typer.Option(help="ImageNet weights, as face_encoders.py leaves them.")],
    seeds: Annotated[int, typer.Option(help="Seeds of the finalists.", min=1)] = 5,
    num_faces: Annotated[int, typer.Option(help="Training faces.")] = NUM_FACES,
    epochs: Annotated[int, typer.Option(help="Epochs of a run.")] = EPOCHS,
) -> None:
    work_dir.mkdir(parents=True, exist_ok=True)
    begin(work_dir, {"num_faces": num_faces, "epochs": epochs})
    results = Results(work_dir / "results.jsonl")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(jobs: Iterable[Job]) -> None:
            missing = [job for job in dict.fromkeys(jobs) if not results.has(*job)]
            arguments = (faces, validation, imagenet, work_dir, num_faces, epochs)
            running = {pool.submit(one_run, job, *arguments): job for job in missing}
            try:
                for done in as_completed(running):
                    setting, name, seed = running[done]
                    figures = done.result()
                    results.add({"setting": setting, "objective": name, "seed": seed, **figures})
                    sys.stdout.write(f"{setting} {name} seed {seed}: accuracy {100 * figures['accuracy']:.2f}\n")
                    sys.stdout.flush()
                    write_text(work_dir / "tables.md", tables(results))
            except BaseException:  # no run is started whose result nobody would write down
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        run((setting, name, 0) for setting in SETTINGS for name in names_of(setting))
        for seed in range(1, seeds):
            run((setting, name, seed) for setting in SETTINGS for name in finalists(results, setting))
    sys.stdout.write(tables(results))


def begin(work_dir: Path, budget: dict[str, int]) -> None:
    """Write down what all runs of a folder have in common, or refuse a folder whose runs have something else."""
    names = dict.fromkeys(name.removesuffix(GOLD) for setting in SETTINGS for name in names_of(setting))
    recipes = [config_of(name, None, Path(), budget["epochs"], 0).model_dump(mode="json") for name in names]
    common = {**budget, "recipes": digest_bytes(json.dumps(recipes, sort_keys=True).encode())}
    path = work_dir / "common.json"
    if path.exists() and (found := json.loads(path.read_text())) != common:
        raise SystemExit(
            f"{work_dir} holds runs of another budget or recipe: {found}, not {common}. Name a new folder."
        )
    write_json(path, common)


def names_of(setting: str) -> list[str]:
    """What is trained in a setting. The ceiling is the same in all."""
    further = {
        "a": [*DETAILS, *COMBINED],
        "b": COMBINED,
        "c": [*(f"{name}{GOLD}" for name in WITH_GOLD), JOINED, CEILING],
    }
    return [*OBJECTIVES, *further[setting]]


def finalists(results: "Results", setting: str) -> list[str]:
    """Cross-entropy, NLA and the best two by the first seed; of (c) and (d), the two bounds and the best two of those
    with a transition matrix too."""

    def best_two(names: list[str]) -> list[str]:
        return sorted(names, key=lambda name: -results.of(setting, name)[0]["accuracy"])[:2]

    bounds = [name for name in names_of(setting) if name in (CEILING, JOINED)]
    others = [name for name in names_of(setting) if name not in (*bounds, *BASELINES)]
    gold = [name for name in others if name.endswith(GOLD)]
    return [*BASELINES, *bounds, *best_two([name for name in others if name not in gold]), *best_two(gold)]


def config_of(name: str, trusted: FaceSet | None, imagenet: Path, epochs: int, seed: int) -> PipelineConfig:
    loss = dict((OBJECTIVES | DETAILS | COMBINED).get(name.removesuffix(GOLD), {}))
    if name.endswith(GOLD) and trusted is not None:
        loss["transition"] = transition_of(trusted).tolist()
    return PipelineConfig.model_validate(
        {
            "seed": seed,
            "encoder": {
                "name": "tf_efficientnet_lite0",
                "weights": imagenet,
                "model_args": {"drop_rate": 0.2},
                "input_px": 48,
                "grey": True,
            },
            "pretrain": {
                "label_source": "majority" if name == CEILING else "single",
                "loss": loss,
                "sampling": "uniform",
                "epochs": epochs,
                "batch_faces": 32,
                "learning_rate": 2e-3,
                "ema_decay": 0.98,
            },
        }
    )


def transition_of(trusted: FaceSet) -> npt.NDArray[np.float64]:
    """How faces of each true class are labelled, by the trusted faces, (K, K); half a face more in each row."""
    counts = np.full((len(EXPRESSIONS), len(EXPRESSIONS)), 0.5 / len(EXPRESSIONS))
    np.add.at(counts, (trusted.majority(), trusted.single), 1)
    return counts / counts.sum(axis=1, keepdims=True)


def one_run(
    job: Job, faces: Path, validation: Path, imagenet: Path, work_dir: Path, num_faces: int, epochs: int
) -> dict[str, Any]:
    """Train and score; the wrong labels that were learnt by heart; for NLA the weights that NAW would give, right and
    wrong labels apart, after every epoch."""
    setting, name, seed = job
    train, trusted, scored = face_sets(faces, validation, num_faces)
    config = config_of(name, trusted, imagenet, epochs, seed)
    given = replace(train, single=SETTINGS[setting](train, seed))
    if name == JOINED:
        given = join_faces([given, replace(trusted, single=trusted.majority())])
    run = RunFolder(work_dir / re.sub(r"[^a-z0-9]+", "_", f"run {setting} {name} {seed}".lower()))
    observe = partial(mean_weights, given, config)
    few = part_of(given, np.arange(min(64, len(given))))
    pretrain_encoder(given, few, run.path, config, observe=observe if name == BASELINES[1] else None)
    encoder = load_encoder(config.encoder.model_copy(update={"weights": last_average(run)}))
    labels = scored.majority()
    chosen = np.flatnonzero(labels != IGNORE_LABEL)
    labels, agreed = labels[chosen], scored.votes[chosen].max(axis=1)
    probabilities = classify(encoder, scored, chosen)
    figures = figures_of(probabilities, labels, agreed)
    if setting == "c":
        held = classify(encoder, trusted, np.arange(len(trusted)))
        figures["biased"] = figures_of(probabilities * np.exp(best_bias(held, trusted.majority())), labels, agreed)
    learnt = classify(encoder, given, np.arange(len(given))).argmax(axis=1) == given.single
    wrong = given.single != given.majority()
    history = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    shutil.rmtree(run.path)
    return figures | {
        "wrong_labels": float(wrong.mean()),
        "by_heart": float(learnt[wrong].mean()),
        "weights": [{key: row[key] for key in ("right", "wrong", *AGREEMENT)} for row in history if "right" in row],
    }


def face_sets(faces: Path, validation: Path, num_faces: int) -> tuple[FaceSet, FaceSet, FaceSet]:
    """Faces to learn from, faces whose majority is known, faces that score."""
    train, scored = read_faces(faces, "train"), read_faces(validation, "validation")
    usable = np.flatnonzero((train.majority() != IGNORE_LABEL) & (train.single != IGNORE_LABEL))
    chosen = np.random.default_rng(0).permutation(usable)[: num_faces + NUM_TRUSTED]
    return part_of(train, chosen[:num_faces]), part_of(train, chosen[num_faces:]), scored


def figures_of(probabilities: npt.NDArray[np.float32], labels: Labels, agreed: npt.NDArray[np.int64]) -> dict[str, Any]:
    predicted = probabilities.argmax(axis=1)
    scores = expression_scores(labels, predicted, len(EXPRESSIONS))
    shares = {
        words: float((predicted == labels)[(agreed >= low) & (agreed <= high)].mean())
        for words, (low, high) in AGREEMENT.items()
    }
    return {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1, "by_agreement": shares}


def last_average(run: RunFolder) -> Path:
    """The moving average of the last epoch as a weights file: the best epoch would be chosen by majority labels."""
    tensors, header = load_tensors(run.last)
    prefix = "average."
    path = run.path / "average.safetensors"
    kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    save_tensors(path, kept, header)
    return path


def mean_weights(given: FaceSet, config: PipelineConfig, model: nn.Module) -> dict[str, float]:
    """Mean NAW weight (NLA's constants, the tilt as at the end of training) of the first 400 training faces: of right
    and of wrong labels, and by how many of ten voters agreed on the majority."""
    _, preprocessing, _ = build_encoder(config.encoder, 0)
    few = part_of(given, np.arange(min(400, len(given))))
    faces = LabelledFaces(few, few.targets("single"), preprocessing)
    logits = [model(preprocessing.normalise(faces.read(part).images)) for part in torch.arange(len(faces)).split(64)]
    p = torch.cat(logits).softmax(dim=1)
    weights = naw_weights(p, torch.from_numpy(few.single), 1.0, NAW_PRESETS["nla"]).numpy()
    right, agreed = few.single == few.majority(), few.votes.max(axis=1)
    groups = {"right": right, "wrong": ~right}
    groups |= {words: (agreed >= low) & (agreed <= high) for words, (low, high) in AGREEMENT.items()}
    return {words: float(weights[chosen].mean()) if chosen.any() else float("nan") for words, chosen in groups.items()}


_BIAS_STEPS = np.array(sorted(np.linspace(-1.5, 1.5, 31), key=abs))


def best_bias(probabilities: npt.NDArray[np.float32], labels: Labels) -> npt.NDArray[np.float64]:
    """A logit bias per class that gives the trusted faces the best mean of accuracy and macro-F1; class by class,
    twice over."""
    bias = np.zeros(len(EXPRESSIONS))
    log_p = np.log(probabilities.clip(1e-9))

    def score(candidate: npt.NDArray[np.float64]) -> float:
        scores = expression_scores(labels, (log_p + candidate).argmax(axis=1), len(EXPRESSIONS))
        return scores.accuracy + scores.macro_f1

    for _ in range(2):
        for index in range(len(bias)):
            steps = bias[index] + _BIAS_STEPS  # of equal scores the first is taken
            tried = [score(np.where(np.arange(len(bias)) == index, step, bias)) for step in steps]
            bias[index] = steps[int(np.argmax(tried))]
    return bias


def part_of(faces: FaceSet, chosen: npt.NDArray[np.int64]) -> FaceSet:
    """Some of the faces, in the order given."""
    return FaceSet(
        names=[faces.names[index] for index in chosen.tolist()],
        votes=faces.votes[chosen],
        single=faces.single[chosen],
        image=lambda index: faces.image(int(chosen[index])),
    )


class Results:
    """Finished runs, a JSON line each; written as they end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        if path.exists():
            self._rows = [json.loads(line) for line in path.read_text().splitlines()]

    def has(self, setting: str, name: str, seed: int) -> bool:
        return any(row["seed"] == seed for row in self.of(setting, name))

    def of(self, setting: str, name: str) -> list[dict[str, Any]]:
        return [row for row in self._rows if (row["setting"], row["objective"]) == (setting, name)]

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))


def tables(results: Results) -> str:
    """A table per setting, in percent: mean and 95% interval over seeds where there are several; `by heart` is the
    share of wrong training labels that the encoder gives back at the end. Then NAW's weights."""
    rows_of = {setting: rows_by_name(results, setting) for setting in SETTINGS}
    trained = {name: rows for name, rows in rows_of["c"].items() if name.removesuffix(GOLD) in (*WITH_GOLD, JOINED)}
    biased = {f"{name}{BIAS}": [row | row["biased"] for row in rows] for name, rows in trained.items()}
    rows_of["c"] = {name: rows for name, rows in rows_of["c"].items() if not name.endswith(GOLD) and name != JOINED}
    rows_of["d"] = trained | biased
    return "\n".join(
        [*(table(TITLES[setting], rows) for setting, rows in rows_of.items() if rows), weight_table(results)]
    )


def rows_by_name(results: Results, setting: str) -> dict[str, list[dict[str, Any]]]:
    of_setting = {name: rows for name in names_of(setting) if (rows := results.of(setting, name))}
    return of_setting | {CEILING: ceiling} if (ceiling := results.of("c", CEILING)) else of_setting


def table(title: str, rows_of: dict[str, list[dict[str, Any]]]) -> str:
    wrong = [100 * row["wrong_labels"] for name, rows in rows_of.items() if name != CEILING for row in rows]
    columns = ["objective", "seeds", "accuracy", "macro-F1", "above cross-entropy", "by heart"]
    columns += [f"agreed {words}" for words in AGREEMENT]
    lines = [f"### {title}" + (f" ({np.mean(wrong):.0f}% wrong)" if wrong else ""), ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    plain = {row["seed"]: row["accuracy"] for row in rows_of.get("cross-entropy", [])}
    for name, rows in sorted(rows_of.items(), key=lambda item: (-len(item[1]), -mean_accuracy(item[1]))):
        cells = [name, str(len(rows)), *(interval([row[key] for row in rows]) for key in ("accuracy", "macro_f1"))]
        above = [row["accuracy"] - plain[row["seed"]] for row in rows if row["seed"] and row["seed"] in plain]
        cells.append(interval(above) if above and name != "cross-entropy" else "")
        cells.append(f"{100 * np.mean([row['by_heart'] for row in rows]):.0f}" if name != CEILING else "")
        cells += [f"{100 * np.mean([row['by_agreement'][words] for row in rows]):.1f}" for words in AGREEMENT]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_accuracy(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["accuracy"] for row in rows]))


def weight_table(results: Results) -> str:
    """The mean NAW weight after the first, second, fourth, eighth ... and last epoch of NLA's runs: of right and wrong
    labels, and by the voters' agreement."""
    columns = ["setting", "epoch", "right labels", "wrong labels", *(f"agreed {words}" for words in AGREEMENT)]
    lines = ["### Mean weight w under NLA, over training", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for setting in SETTINGS:
        runs = [row["weights"] for row in results.of(setting, BASELINES[1])]
        of_epochs = list(enumerate(zip(*runs, strict=True), start=1))
        for epoch, rows in of_epochs:
            if epoch & (epoch - 1) and epoch < len(of_epochs):
                continue
            means = [np.mean([row[key] for row in rows]) for key in ("right", "wrong", *AGREEMENT)]
            lines.append("| " + " | ".join([f"({setting})", str(epoch), *(f"{mean:.3f}" for mean in means)]) + " |")
    return "\n".join(lines) + "\n"


def interval(shares: list[float]) -> str:
    """Mean of shares in percent, with the half width of its 95% interval by Student's t."""
    values = 100 * np.array(shares)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.1f} ± {half:.1f}"


if __name__ == "__main__":
    typer.run(main)
