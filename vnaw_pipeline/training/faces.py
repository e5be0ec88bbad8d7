"""Stage `pretrain`: the image encoder on static faces (NLA). Reads sets of faces, writes a run folder whose
`best.safetensors` is what `encoder.weights` may name.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vnaw_pipeline.config import PipelineConfig, PretrainConfig
from vnaw_pipeline.errors import ConfigError, DataError, listing
from vnaw_pipeline.facesets.faces import FaceSet, join_faces
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.features.encoder import (
    Encoder,
    Preprocessing,
    build_encoder,
    encoder_of_weights,
    load_encoder,
    parameter_groups,
    recorded_of,
    resolve_pool,
)
from vnaw_pipeline.losses.images import distillation_loss
from vnaw_pipeline.metrics import face_scores
from vnaw_pipeline.processes import gather_all, process_state, put
from vnaw_pipeline.stages import Failure, StageReport
from vnaw_pipeline.tasks import EXPRESSIONS, TASKS, Split
from vnaw_pipeline.training.images import (
    ImageBatch,
    LabelObjective,
    encoder_optimisation,
    erase_rectangles,
    label_objective,
    model_outputs,
    own_batches,
    read_ahead,
    vary_images,
)
from vnaw_pipeline.training.loop import SCORE, Recipe, begin_run, fit, seed_of
from vnaw_pipeline.windows.plan import balanced_weights, draw_by_weight

_SECTIONS = {"seed", "encoder", "pretrain"}
"""What this stage reads of the config; the rest may change between a run and its continuation."""


class LabelledFaces:
    """The faces of a set that have a target; reads them, brought to the encoder's size, and remembers which cannot be
    read."""

    def __init__(self, faces: FaceSet, targets: npt.NDArray[np.float32], preprocessing: Preprocessing) -> None:
        self._faces = faces
        self._index = np.flatnonzero(targets.sum(axis=1) > 0)
        self.targets = torch.from_numpy(targets[self._index])
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self.unreadable: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def names(self) -> list[str]:
        """Of the faces that have a target."""
        return [self._faces.names[index] for index in self._index.tolist()]

    def read(self, chosen: Tensor) -> ImageBatch:
        """Read some of the faces, by their place (B,) among those that have a target."""
        side = self._preprocessing.input_px
        images = np.zeros((len(chosen), side, side, 3), dtype=np.uint8)
        read = self._pool.map(partial(self._read_one, images), range(len(chosen)), chosen.tolist())
        readable = torch.tensor(list(read))
        return ImageBatch(torch.from_numpy(images), self.targets[chosen] * readable[:, None], chosen)

    def _read_one(self, images: npt.NDArray[np.uint8], position: int, place: int) -> bool:
        index = int(self._index[place])
        try:
            images[position] = self._preprocessing.of_face(self._faces.image(index))
        except (DataError, OSError) as error:
            self.unreadable[self._faces.names[index]] = str(error)
            return False
        return True


def pretrain_encoder(
    train: FaceSet | Sequence[Path],
    validation: FaceSet | Sequence[Path],
    run_dir: Path,
    config: PipelineConfig,
    *,
    allow_pickle: bool = False,
    overwrite: bool = False,
    observe: Callable[[nn.Module], dict[str, float]] | None = None,
) -> StageReport:
    """Train the encoder and a linear head on static faces; every epoch scores all validation faces by their majority
    (macro-F1 over the classes that occur among them).

    A training image that cannot be read is left out and is a failure of the report.
    `observe` is called with the model after each epoch; its figures join the epoch's in `metrics.jsonl`.

    Raises:
        DataError: a set, or validation images (the first 20 are named), that cannot be read; no face with a label.
        ConfigError, CheckpointError: as `build_encoder`; a teacher without a head; the folder holds another run.
    """
    started = time.monotonic()
    state = process_state()
    settings = config.pretrain
    train, validation = _opened({"train": train, "validation": validation})
    model, preprocessing, _ = build_encoder(config.encoder, len(EXPRESSIONS), config.seed, allow_pickle)
    learnt = LabelledFaces(train, train.targets(settings.label_source), preprocessing)
    scored = LabelledFaces(validation, validation.targets("majority"), preprocessing)
    for faces, what in ((learnt, f"label of source '{settings.label_source}'"), (scored, "majority label")):
        if len(faces) == 0:
            raise DataError(f"No face of the {'training' if faces is learnt else 'validation'} sets has a {what}.")
    for places in torch.split(torch.arange(len(scored)), settings.batch_faces):
        scored.read(places)
    _refuse_unreadable(scored)  # before an epoch is spent
    labels = {"train": train.digest(), "validation": validation.digest()}
    teacher = _load_teacher(settings.teacher, config.seed) if settings.teacher is not None else None
    taught_by = teacher.weights_digest if teacher is not None else None
    taught_from = teacher.learnt_from if teacher is not None else ()
    learnt_from = sorted({*recorded_of(config.encoder).get("learnt_from", ()), *taught_from})
    folder = begin_run(run_dir, config, _SECTIONS, overwrite, {"labels": labels, "teacher": taught_by})
    against_labels = label_objective(settings.loss, learnt.targets)
    recipe = Recipe(
        model=model,
        steps=partial(_epoch_steps, learnt, config),
        objective=partial(_objective, preprocessing, settings, teacher, against_labels),
        evaluate=partial(_evaluate, scored, preprocessing, settings, observe),
        header={
            "kind": "encoder",
            "task": TASKS["expr8"].name,
            "outputs": list(EXPRESSIONS),
            "encoder": config.encoder.name,
            "model_args": config.encoder.model_args,
            "pool": resolve_pool(config.encoder),
            **preprocessing.recorded(),
            "config": config.model_dump(mode="json", include=_SECTIONS),
            "labels": labels,
            "teacher": taught_by,
            **({"learnt_from": learnt_from} if learnt_from else {}),
        },
        label="pretrain",
        memory=against_labels.memory,
        parameter_groups=parameter_groups(model, settings.weight_decay, layer_decay=1.0, frozen_stages=0),
    )
    optimisation = encoder_optimisation(settings, -(-len(learnt) // settings.batch_faces), config.seed)
    learnt_too = set(learnt.names) & set(scored.names)
    before = folder.epochs_done()
    history = fit(recipe, optimisation, folder)
    best = max(history, key=lambda row: row[SCORE])
    unreadable = dict(sorted(gather_all(list(learnt.unreadable.items()))))
    report = StageReport(
        "pretrain",
        units="epochs",
        done=len(history) - before,
        skipped=before,
        frames=(len(history) - before) * len(learnt),
        seconds=time.monotonic() - started,
        failures=[Failure(name, None, reason) for name, reason in unreadable.items()],
        notes=[
            f"best macro-F1 {100 * best[SCORE]:.2f}, accuracy {100 * best['accuracy']:.2f} on {len(scored)} validation "
            f"faces, in epoch {best['epoch']}",
        ],
    )
    if learnt_too:
        report.notes.append(
            f"{len(learnt_too)} validation faces have names of training faces; if they are the same, the score says "
            "little"
        )
    if state.is_main_process and folder.wants_record(report.done):
        report.write_status(run_dir / "status.csv")
        folder.write_record(
            stage="pretrain",
            device=str(state.device),
            processes=state.num_processes,
            seed=config.seed,
            faces={"train": len(learnt), "validation": len(scored)},
            seconds=round(report.seconds, 1),
            tuned={"epoch": f"best macro-F1 on the majority labels of the validation faces, epoch {best['epoch']}"},
        )
    return report


def _opened(given: Mapping[Split, FaceSet | Sequence[Path]]) -> Iterator[FaceSet]:
    """The faces of each split, after the problems of all sets were named together."""
    problems: list[str] = []

    def read(path: Path, split: Split) -> list[FaceSet]:
        try:
            return [read_faces(path, split)]
        except DataError as error:
            problems.append(str(error))
            return []

    sets = [
        [faces] if isinstance(faces, FaceSet) else [found for path in faces for found in read(path, split)]
        for split, faces in given.items()
    ]
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    return map(join_faces, sets)


def _load_teacher(weights: Path, seed: int) -> Encoder:
    teacher = load_encoder(encoder_of_weights(weights), seed)
    if teacher.head is None or teacher.outputs != EXPRESSIONS:
        raise ConfigError(f"pretrain.teacher {weights} has no head for the eight expressions.")
    device = process_state().device
    teacher.model.to(device)
    teacher.head.to(device)
    return teacher


def _epoch_steps(learnt: LabelledFaces, config: PipelineConfig, epoch: int) -> Iterator[list[ImageBatch]]:
    """This process's batches of an epoch of as many draws as there are faces."""
    state = process_state()
    settings = config.pretrain
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    drawn = _draw(learnt.targets.argmax(dim=1), settings.sampling, generator)
    for batch in read_ahead(learnt.read, own_batches(drawn, settings.batch_faces)):
        yield [ImageBatch(*(put(part, state.device) for part in batch))]


def _draw(labels: Tensor, sampling: str, generator: torch.Generator) -> Tensor:
    """As many draws as there are labels (N,). `uniform` takes each once; the others draw with replacement."""
    if sampling == "uniform":
        return torch.randperm(len(labels), generator=generator)
    weights = balanced_weights(labels, len(EXPRESSIONS), 1.0 if sampling == "balanced" else 0.5)
    return draw_by_weight(weights, len(labels), generator)


def _objective(
    preprocessing: Preprocessing,
    settings: PretrainConfig,
    teacher: Encoder | None,
    against_labels: LabelObjective,
    model: nn.Module,
    batch: ImageBatch,
    progress: float,
) -> tuple[Tensor, Tensor]:
    whole = preprocessing.normalise(batch.images)
    if settings.vary_images:
        whole = vary_images(whole)
    images = erase_rectangles(whole, settings.erase_probability) if settings.erase_probability else whole
    total, count, logits = against_labels(model, images, batch, progress)
    if teacher is not None:
        taught = distillation_loss(logits, _ask(teacher, whole, preprocessing), settings.temperature)
        taught = torch.where(batch.targets.sum(dim=1) > 0, taught, 0).sum()
        total = (1 - settings.teacher_share) * total + settings.teacher_share * taught
    return total, count


@torch.no_grad()
def _ask(teacher: Encoder, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The teacher's logits (B, K) for images that were normalised for the student, (B, 3, S, S)."""
    assert teacher.head is not None
    logits: Tensor = teacher.head(teacher.model(teacher.preprocessing.from_normalised(images, preprocessing)))
    return logits


def _refuse_unreadable(scored: LabelledFaces) -> None:
    if unreadable := sorted(set(gather_all(list(scored.unreadable.values())))):
        raise DataError("Validation faces that cannot be read:\n" + listing(unreadable))


@torch.inference_mode()
def _evaluate(
    scored: LabelledFaces,
    preprocessing: Preprocessing,
    settings: PretrainConfig,
    observe: Callable[[nn.Module], dict[str, float]] | None,
    model: nn.Module,
) -> dict[str, float]:
    device = process_state().device

    def answer(places: Tensor) -> Tensor:
        logits: Tensor = model(preprocessing.normalise(scored.read(places).images.to(device)))
        return logits

    predicted = model_outputs(len(scored), len(EXPRESSIONS), settings.batch_faces, answer).argmax(dim=1)
    _refuse_unreadable(scored)
    scores = face_scores(scored.targets.argmax(dim=1).numpy(), predicted.numpy(), len(EXPRESSIONS))
    observed = observe(model) if observe is not None else {}
    return {SCORE: scores.macro_f1, "accuracy": scores.accuracy, **observed}
