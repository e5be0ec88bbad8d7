"""Stage `finetune`: the image encoder on labelled frames. Reads crops, writes a run folder whose `best.safetensors` is
what `encoder.weights` of the extraction may name.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnaw_pipeline.annotations import Labels
from vnaw_pipeline.config import FinetuneConfig, PipelineConfig, UnitsLossConfig
from vnaw_pipeline.crops.source import VideoCrops, decode_crop, open_listed_crops
from vnaw_pipeline.errors import ConfigError, DataError
from vnaw_pipeline.features.encoder import (
    Preprocessing,
    build_encoder,
    parameter_groups,
    recorded_of,
    resolve_pool,
    take_over_outputs,
)
from vnaw_pipeline.folds import fold_split, recordings_in
from vnaw_pipeline.losses.affect import affect_loss
from vnaw_pipeline.losses.joint import annotated
from vnaw_pipeline.losses.units import units_loss
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import expression_scores, score_predictions
from vnaw_pipeline.processes import gather_all, process_state, put
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.stages import Failure, StageReport
from vnaw_pipeline.tasks import ACTION_UNITS, IGNORE_LABEL, TASKS, Task, TaskName, output_columns
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

_SECTIONS = {"task", "seed", "encoder", "finetune"}
"""What this stage reads of the config; the rest may change between a run and its continuation."""


class FrameBatch(NamedTuple):
    """Images with their expression targets; valence and arousal float32 (B, 2), NaN where there are none; action
    units int8 (B, 12), -1 where there are none."""

    of_expression: ImageBatch
    affect: Tensor
    units: Tensor


class LabelledFrames:
    """Frames with an expression and a crop, of the videos of one split; reads crops, and remembers which cannot be
    read. Valence, arousal and action units are the same split's; a frame without them stays in.
    """

    def __init__(
        self,
        videos: pd.DataFrame,
        annotations_dir: Path,
        crops_root: Path,
        task: Task,
        preprocessing: Preprocessing,
        extra_tasks: Sequence[TaskName],
    ) -> None:
        labels = read_labels(videos, annotations_dir, task)
        videos = videos[videos.video_id.isin(labels)]
        extras = {name: read_labels(videos, annotations_dir, TASKS[name]) for name in extra_tasks}
        self._crops: list[VideoCrops] = []
        self._video_ids: list[str] = []
        self.failures: list[Failure] = []
        parts = [np.zeros((0, 3), dtype=np.int64)]
        affect, units = [np.zeros((0, 2), np.float32)], [np.zeros((0, len(ACTION_UNITS)), np.int8)]
        for video_id, crops in zip(videos.video_id, videos.crops, strict=True):
            try:
                source = open_listed_crops(crops_root, crops)
            except (DataError, OSError) as error:
                self.failures.append(Failure(video_id, None, str(error)))
                continue
            frames = np.flatnonzero(source.present(len(labels[video_id])))
            frames = frames[labels[video_id][frames] != IGNORE_LABEL]
            classes = labels[video_id][frames]
            parts.append(np.stack([np.full(len(frames), len(self._crops)), frames, classes], axis=1))
            affect.append(_rows_at(extras.get("va", {}).get(video_id), frames, np.full(2, np.nan, np.float32)))
            units.append(_rows_at(extras.get("au", {}).get(video_id), frames, np.full(len(ACTION_UNITS), -1, np.int8)))
            self._crops.append(source)
            self._video_ids.append(video_id)
        table = np.concatenate(parts).astype(np.int64)
        self._video, self._frame = table[:, 0], table[:, 1]
        self.labels = torch.from_numpy(table[:, 2].copy())
        self.targets = F.one_hot(self.labels, len(task.outputs)).float()
        self.affect, self.units = torch.from_numpy(np.concatenate(affect)), torch.from_numpy(np.concatenate(units))
        self.digest = digest_bytes(
            ",".join(self._video_ids).encode(), table.tobytes(), *(np.concatenate(x).tobytes() for x in (affect, units))
        )
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self.unreadable: dict[tuple[str, int], str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def extras(self) -> dict[TaskName, Tensor]:
        """The labels of the tasks beside the expression, a row a frame."""
        return {"va": self.affect, "au": self.units}

    def read(self, chosen: Tensor) -> FrameBatch:
        """Decode some of the frames, by index (B,)."""
        side = self._preprocessing.input_px
        images = np.zeros((len(chosen), side, side, 3), dtype=np.uint8)
        read = self._pool.map(partial(self._read_one, images), range(len(chosen)), chosen.tolist())
        readable = torch.tensor(list(read))
        return FrameBatch(
            ImageBatch(torch.from_numpy(images), self.targets[chosen] * readable[:, None], chosen),
            self.affect[chosen].masked_fill(~readable[:, None], torch.nan),
            self.units[chosen].masked_fill(~readable[:, None], IGNORE_LABEL),
        )

    def _read_one(self, images: npt.NDArray[np.uint8], position: int, index: int) -> bool:
        video, frame_index = int(self._video[index]), int(self._frame[index])
        try:
            (jpeg,) = self._crops[video].read(frame_index, frame_index + 1)
            images[position] = self._preprocessing.of_crop(decode_crop(jpeg or b""))
        except (DataError, OSError) as error:
            self.unreadable[self._video_ids[video], frame_index] = str(error)
            return False
        return True


def finetune_encoder(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    crops_root: Path,
    run_dir: Path,
    config: PipelineConfig,
    *,
    fold: int | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> StageReport:
    """Fine-tune the encoder with a linear head on class-balanced draws of labelled training frames.

    With `fold`, the manifest's fold of that number is validation and the rest training, as in `train_windows`. The
    score of the expressions chooses the epoch; those of other heads stand beside it in `metrics.jsonl`, if validation
    frames have their labels.

    Raises:
        ConfigError: a main task without classes, of which frames are drawn; as `load_encoder`.
        CheckpointError: as `load_encoder`; the folder holds another run.
        DataError: no labelled frames, or none for a head beside the expression; crops that are not there.
    """
    started = time.monotonic()
    state = process_state()
    task = TASKS[config.task]
    if task.kind != "classes":
        raise ConfigError(
            f"The encoder is fine-tuned on expressions, and task '{task.name}' has none; set task=expr8, and "
            "finetune.valence_arousal_weight or finetune.action_units_weight to learn the others beside them."
        )
    videos = read_manifest(manifest)
    splits = fold_split(videos, fold)
    extra_tasks = [name for name, weight in _extra_weights(config.finetune).items() if weight]
    tasks = (task, *(TASKS[name] for name in extra_tasks))
    num_outputs = sum(len(each.outputs) for each in tasks)
    model, preprocessing, left_out = build_encoder(config.encoder, num_outputs, config.seed, allow_pickle)
    if left_out and tuple(recorded_of(config.encoder).get("outputs", ())) == task.outputs:
        take_over_outputs(model, left_out, len(task.outputs))
    train, validation = (
        # With their official splits still, by which the labels of a task are found.
        _labelled_frames(
            videos[splits.split == split], split, annotations_dir, crops_root, task, preprocessing, extra_tasks
        )
        for split in ("train", "validation")
    )
    for extra in tasks[1:]:
        if not annotated(train.extras[extra.name], extra).any():
            raise DataError(
                f"No frame of the split 'train' has a label for task '{extra.name}' beside its expression. Give "
                "annotations of it, or set the weight of its loss in the section finetune to 0."
            )
    labels = {"train": train.digest, "validation": validation.digest}
    folder = begin_run(run_dir, config, _SECTIONS, overwrite, {"labels": labels, "fold": fold})
    settings = config.finetune
    against_labels = label_objective(settings.loss, train.targets)
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay, settings.frozen_stages)
    recipe = Recipe(
        model=model,
        steps=partial(_epoch_steps, train, config, len(task.outputs)),
        objective=partial(_objective, preprocessing, settings, against_labels),
        evaluate=partial(_evaluate, validation, preprocessing, settings, tasks),
        header={
            "kind": "encoder",
            "task": task.name,
            "outputs": list(task.outputs),
            "extra_heads": extra_tasks,
            "encoder": config.encoder.name,
            "model_args": config.encoder.model_args,
            "pool": resolve_pool(config.encoder),
            **preprocessing.recorded(),
            "config": config.model_dump(mode="json", include=_SECTIONS),
            "labels": labels,
            "fold": fold,
            "learnt_from": sorted(
                {*recorded_of(config.encoder).get("learnt_from", ()), *recordings_in(splits, "train")}
            ),
        },
        label="finetune",
        memory=against_labels.memory,
        parameter_groups=groups,
    )
    optimisation = encoder_optimisation(settings, -(-settings.frames_per_epoch // settings.batch_frames), config.seed)
    before = folder.epochs_done()
    history = fit(recipe, optimisation, folder)
    best = max(history, key=lambda row: row[SCORE])
    unreadable = sorted(gather_all([*train.unreadable.items(), *validation.unreadable.items()]))
    failures = [Failure(video_id, frame, reason) for (video_id, frame), reason in dict(unreadable).items()]
    report = StageReport(
        "finetune",
        units="epochs",
        done=len(history) - before,
        skipped=before,
        frames=(len(history) - before) * settings.frames_per_epoch,
        seconds=time.monotonic() - started,
        failures=[*train.failures, *validation.failures, *failures],
        notes=[f"best macro-F1 {100 * best[SCORE]:.2f} on validation frames, in epoch {best['epoch']}"],
    )
    if state.is_main_process and folder.wants_record(report.done):
        report.write_status(run_dir / "status.csv")
        folder.write_record(
            stage="finetune",
            device=str(state.device),
            processes=state.num_processes,
            seed=config.seed,
            labelled_frames={"train": len(train), "validation": len(validation)},
            seconds=round(report.seconds, 1),
            tuned={"epoch": f"best macro-F1 on the given labels of validation frames, epoch {best['epoch']}"},
        )
    return report


def _labelled_frames(
    videos: pd.DataFrame,
    split: str,
    annotations_dir: Path,
    crops_root: Path,
    task: Task,
    preprocessing: Preprocessing,
    extra_tasks: Sequence[TaskName],
) -> LabelledFrames:
    frames = None
    if len(videos):
        frames = LabelledFrames(videos, annotations_dir, crops_root, task, preprocessing, extra_tasks)
    if frames is None or len(frames) == 0:
        raise DataError(f"No frame of the split '{split}' has both a crop and a label for task '{task.name}'.")
    return frames


def _epoch_steps(
    train: LabelledFrames, config: PipelineConfig, num_classes: int, epoch: int
) -> Iterator[list[FrameBatch]]:
    """This process's batches of an epoch: class-balanced draws."""
    state = process_state()
    settings = config.finetune
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    weights = balanced_weights(train.labels, num_classes)
    drawn = draw_by_weight(weights, settings.frames_per_epoch, generator)
    for batch in read_ahead(train.read, own_batches(drawn, settings.batch_frames)):
        of_expression = ImageBatch(*(put(part, state.device) for part in batch.of_expression))
        yield [FrameBatch(of_expression, put(batch.affect, state.device), put(batch.units, state.device))]


def _extra_weights(settings: FinetuneConfig) -> dict[TaskName, float]:
    """Weights of the losses beside the expression's, in the order of their heads."""
    return {"va": settings.valence_arousal_weight, "au": settings.action_units_weight}


def _rows_at(labels: Labels | None, frames: npt.NDArray[np.int64], nothing: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The labels (T, C) of some frames; those of no labels at all have `nothing` (C,)."""
    return np.tile(nothing, (len(frames), 1)) if labels is None else labels[frames]


def _objective(
    preprocessing: Preprocessing,
    settings: FinetuneConfig,
    against_labels: LabelObjective,
    model: nn.Module,
    batch: FrameBatch,
    progress: float,
) -> tuple[Tensor, Tensor]:
    images = preprocessing.normalise(batch.of_expression.images)
    if settings.vary_images:
        images = vary_images(images)
    if settings.erase_probability:
        images = erase_rectangles(images, settings.erase_probability)
    total, count, outputs = against_labels(model, images, batch.of_expression, progress)
    extra = outputs[:, batch.of_expression.targets.shape[1] :]
    # The other heads' losses are means over the frames that have their labels, and count like that many expressions.
    if settings.valence_arousal_weight:
        predicted, extra = extra[:, :2].float().tanh(), extra[:, 2:]
        total = total + settings.valence_arousal_weight * count * affect_loss(predicted, batch.affect)
    if settings.action_units_weight:
        of_units, num_units = units_loss(extra, batch.units, UnitsLossConfig())
        total = total + settings.action_units_weight * count * of_units / num_units.clamp(min=1)
    return total, count


@torch.inference_mode()
def _evaluate(
    validation: LabelledFrames,
    preprocessing: Preprocessing,
    settings: FinetuneConfig,
    tasks: Sequence[Task],
    model: nn.Module,
) -> dict[str, float]:
    """Score evenly spaced labelled validation frames against the given labels of each task, the expressions first."""
    device = process_state().device
    chosen = torch.linspace(0, len(validation) - 1, min(settings.validation_frames, len(validation))).round().long()

    def answer(places: Tensor) -> Tensor:
        batch = validation.read(chosen[places]).of_expression
        outputs: Tensor = model(preprocessing.normalise(batch.images.to(device)))
        return outputs.masked_fill(put(batch.targets.sum(dim=1) == 0, device)[:, None], -torch.inf)  # not readable

    columns, num_outputs = output_columns(tasks), sum(len(task.outputs) for task in tasks)
    outputs = model_outputs(len(chosen), num_outputs, settings.batch_frames, answer)
    readable = ~outputs.isneginf().all(dim=1)
    if not readable.any():
        raise DataError("None of the validation frames that score an epoch can be read.")
    chosen, outputs = chosen[readable], outputs[readable]
    of_expression, *extras = tasks
    predicted = outputs[:, columns[of_expression.name]].argmax(dim=1)
    scores = expression_scores(validation.labels[chosen].numpy(), predicted.numpy(), len(of_expression.outputs))
    figures = {SCORE: scores.macro_f1, "accuracy": scores.accuracy}
    for task in extras:
        labels = validation.extras[task.name][chosen]
        if annotated(labels, task).any():
            of_task = outputs[:, columns[task.name]]
            answers = of_task.tanh() if task.kind == "affect" else of_task.sigmoid()
            figures[task.metric] = score_predictions(task, labels.numpy(), answers.numpy()).figures[task.metric]
    return figures
