"""Stage `train`: the temporal model on windows. Reads a feature store, writes a run folder; a rerun goes on."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.errors import ConfigError, DataError
from vnaw_pipeline.features.store import FeatureStore, open_store
from vnaw_pipeline.features.views import MIRROR, PLAIN
from vnaw_pipeline.folds import fold_split, recordings_in
from vnaw_pipeline.locations import Location
from vnaw_pipeline.losses.joint import count_units, joint_loss
from vnaw_pipeline.losses.objectives import class_weights, prediction_memory, update_memory
from vnaw_pipeline.losses.units import balanced_class_weights
from vnaw_pipeline.manifests import read_manifest
from vnaw_pipeline.metrics import score_predictions
from vnaw_pipeline.prediction.predict import finish_probabilities
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.processes import agree, process_state, put, sum_over_processes
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.stages import StageReport
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS, TaskName, output_columns
from vnaw_pipeline.temporal import TemporalModel, for_prediction, kept_bytes
from vnaw_pipeline.training.labels import LabelledBank, open_labelled_bank
from vnaw_pipeline.training.loop import Optimisation, Recipe, begin_run, fit, seed_of, split_step
from vnaw_pipeline.windows.augment import (
    MaskWords,
    channel_masks,
    draw_mask_words,
    erase_channels,
    mask_input,
    skip_frames,
)
from vnaw_pipeline.windows.batches import WindowBatch, gather_view, gather_windows
from vnaw_pipeline.windows.plan import (
    WindowPlan,
    balanced_weights,
    draw_by_weight,
    labelled_share,
    of_rows,
    plan_windows,
    window_labels,
    window_rows,
)

_SECTIONS = {"task", "further_tasks", "seed", "windows", "temporal", "loss", "units_loss", "train", "predict"}
"""What this stage reads of the config; the rest may change between a run and its continuation."""


def train_windows(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    store_path: str | Location,
    run_dir: Path,
    config: PipelineConfig,
    *,
    fold: int | None = None,
    overwrite: bool = False,
) -> StageReport:
    """Train the temporal model on the training videos; every epoch scores every labelled validation frame once, for
    each task. The labels of a task are found as `read_labels` finds them.

    With `fold`, the manifest's fold of that number is validation and the rest of its labelled videos training.

    Raises:
        ConfigError: training windows with gaps between them.
        StoreError: videos missing from the store. CheckpointError: the folder holds another run.
        DataError: no labelled windows to train on, nothing to validate on.
    """
    started = time.monotonic()
    state = process_state()
    task = TASKS[config.task]
    if (stride := config.windows.train_stride) > config.windows.window_frames:
        raise ConfigError(
            f"windows.train_stride {stride} leaves gaps between windows of {config.windows.window_frames} frames. Set "
            "it to that or less."
        )
    videos = read_manifest(manifest)
    splits = fold_split(videos, fold)
    store = open_store(store_path)
    # Before the banks, which processes of another config would open in other ways and wait for each other.
    settings = config.model_dump(mode="json", include={*_SECTIONS, "bank"})
    agree({**settings, "manifest": digest_bytes(splits.to_csv().encode()), "features": store.fingerprint, "fold": fold})
    views = [*config.windows.views, *([MIRROR] if config.loss.consistency else [])]
    train, validation = (
        # With their official splits still, by which the labels of a task are found.
        open_labelled_bank(
            videos[splits.split == split], annotations_dir, store, config.tasks, split, of_split, config.bank
        )
        for split, of_split in (("train", views), ("validation", [PLAIN]))
    )
    train = train.learnable()
    labels = {"train": train.digest(), "validation": validation.digest()}
    folder = begin_run(
        run_dir, config, _SECTIONS, overwrite, {"labels": labels, "features": store.fingerprint, "fold": fold}
    )

    plan = training_plan(train, config)
    drawing = Drawing(train, plan, config)
    outputs = [name for each in config.tasks for name in each.outputs]
    without_any = train.means()
    learning = _Learning.of(train, config)
    header = {
        "kind": "temporal",
        "task": task.name,
        "outputs": outputs,
        "embedding_dim": store.embedding_dim,
        "features": store.fingerprint,
        "config": config.model_dump(mode="json", include=_SECTIONS),
        "labels": labels,
        "fold": fold,
        "learnt_from": train.bank.video_ids,
        "without_any": without_any,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TemporalModel(store.embedding_dim, len(outputs), config.temporal)
    if config.train.compile:
        _compile(model)
    recipe = Recipe(
        model=model,
        steps=drawing.steps,
        objective=partial(_objective, train, config, learning),
        evaluate=partial(_evaluate, validation, config, np.array(without_any, np.float32)),
        header=header,
        label="train",
        score=task.metric,
        memory=learning.memory,
    )
    optimisation = Optimisation(
        epochs=config.train.epochs,
        steps_per_epoch=drawing.steps_per_epoch,
        learning_rate=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        warmup_share=config.train.warmup_share,
        max_grad_norm=config.train.max_grad_norm,
        precision=config.train.precision,
        tracker=config.train.tracker,
        seed=config.seed,
    )
    before = folder.epochs_done()
    history = fit(recipe, optimisation, folder)
    best = max(history, key=lambda row: row[task.metric])
    seconds = time.monotonic() - started
    if state.is_main_process and folder.wants_record(len(history) - before):
        folder.write_record(
            stage="train",
            device=str(state.device),
            processes=state.num_processes,
            seed=config.seed,
            features=store.fingerprint,
            videos={"train": len(train.bank.video_ids), "validation": len(validation.bank.video_ids)},
            windows=len(plan),
            seconds=round(seconds, 1),
            tuned={
                "epoch": f"best {task.metric_title} on the given labels of the validation videos, epoch {best['epoch']}"
            },
        )
    return StageReport(
        "train",
        units="epochs",
        done=len(history) - before,
        skipped=before,
        seconds=seconds,
        notes=[
            f"best {task.metric_title} {100 * best[task.metric]:.2f} on validation, in epoch {best['epoch']}",
            *seen_by_encoder(splits, store),
        ],
    )


def seen_by_encoder(splits: pd.DataFrame, store: FeatureStore) -> list[str]:
    """A note if the store's encoder was fine-tuned on recordings of the validation split."""
    validation = recordings_in(splits, "validation")
    seen = validation & set(store.fingerprint.get("learnt_from", ()))
    if not seen:
        return []
    return [
        f"the encoder has learnt from {len(seen)} of {len(validation)} validation recordings, so scores on them are "
        "too good; fine-tune it with `vnaw finetune --fold` for the fold, and extract again"
    ]


def training_plan(train: LabelledBank, config: PipelineConfig) -> WindowPlan:
    """Windows of the training videos with enough frames that are labelled for any task.

    Raises:
        DataError: there is none.
    """
    windows = config.windows
    plan = plan_windows(train.bank.num_frames.cpu(), windows.window_frames, windows.train_stride)
    first, labelled = train.bank.first.cpu(), train.labelled().cpu()
    shares = []
    for block in plan.blocks():
        rows = window_rows(block, first, windows.window_frames, train.bank.zero_row)
        shares.append(labelled_share(of_rows(labelled, rows), rows != train.bank.zero_row))
    plan = plan.select(torch.cat(shares) >= config.loss.min_labelled)
    if len(plan) == 0:
        raise DataError(
            f"No training window of {windows.window_frames} frames has {config.loss.min_labelled:.0%} of its frames "
            f"labelled for task {' or '.join(map(repr, train.labels))} and with a face. Lower loss.min_labelled, or "
            "check annotations and crops with `vnaw check`."
        )
    return plan


@dataclass(frozen=True)
class _Learning:
    """What the objective knows of all training rows. `class_weights` (K,) and `unit_weights` (U, 2) are None where
    the config weights by neither; `memory` holds each row's moving average of class predictions (N + 1, K), if that
    is asked for."""

    class_weights: Tensor | None
    unit_weights: Tensor | None
    memory: dict[str, Tensor]

    @classmethod
    def of(cls, train: LabelledBank, config: PipelineConfig) -> "_Learning":
        of_classes = next((task for task in config.tasks if task.kind == "classes"), None)
        weights, memory = None, {}
        if of_classes is not None:
            labels, num_classes = train.labels[of_classes.name], len(of_classes.outputs)
            counts = torch.bincount(labels[labels != IGNORE_LABEL], minlength=num_classes)
            weights = class_weights(counts, config.loss.weighting)
            memory = prediction_memory(config.loss, len(labels), num_classes)
        balanced_units = "au" in train.labels and config.units_loss.weighting == "balanced"
        unit_weights = balanced_class_weights(train.labels["au"]) if balanced_units else None
        return cls(weights, unit_weights, memory)


class WindowDraw(NamedTuple):
    """B windows of an optimiser step as they were drawn, on the host: bank rows (B, P), videos (B,), channels that stay
    (B, D), the number of each one's view (B,), words for its masks (of no frames where nothing is masked), and the
    units that each task has in the step."""

    rows: Tensor
    video: Tensor
    keep: Tensor
    view: list[int]
    words: MaskWords
    step_units: dict[TaskName, int]


_Augmentation = tuple[Tensor, list[int], MaskWords]
"""Channels that stay, view and mask words of some windows, as in `WindowDraw`."""
_PASS_BYTES = 57_000_000
"""That a forward pass on a CPU may keep for its way back: six windows of the default model."""
_PASS_FRAMES = 400
"""That it has at least; with half as many a model of 34 M weights took a seventh longer."""
_BLOCK_WINDOWS = 256
"""So many windows of a step are augmented by draws of one seed."""
_EPOCH_MASKS = 256
"""So many sets of erased channels an epoch has, of which each window takes one; a set drawn for each window would take
a third of the time of gathering it."""


class Drawing:
    """Draws the windows of an epoch's steps. What it needs of the bank's rows, it copies to the host once."""

    def __init__(self, train: LabelledBank, plan: WindowPlan, config: PipelineConfig) -> None:
        self.plan, self.config = plan, config
        self.first, self.labelled = train.bank.first.cpu(), train.labelled().cpu()
        self.row_labels = {name: of_task.cpu() for name, of_task in train.labels.items()}
        self.embedding_dim, self.zero_row = train.bank.embedding_dim, train.bank.zero_row
        self.per_epoch = config.train.windows_per_epoch or len(plan)
        self.weights = None if config.train.sampling == "uniform" else self._weights()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-self.per_epoch // self.config.train.batch_windows)

    def _weights(self) -> Tensor:
        window_frames, num_classes = self.config.windows.window_frames, len(TASKS[self.config.task].outputs)
        of_task, labels = self.row_labels[self.config.task], []
        for block in self.plan.blocks():
            rows = window_rows(block, self.first, window_frames, self.zero_row)
            labels.append(window_labels(of_task[rows], num_classes))
        of_windows = torch.cat(labels)
        if (of_windows == IGNORE_LABEL).all():
            raise DataError(
                f"No training window has a label of task '{self.config.task}', by which windows are drawn. "
                "Set train.sampling=uniform, or lower loss.min_labelled."
            )
        power = 1.0 if self.config.train.sampling == "balanced" else 0.5
        weights = balanced_weights(of_windows, num_classes, power)
        return torch.where(of_windows == IGNORE_LABEL, weights[of_windows != IGNORE_LABEL].mean(), weights)

    def steps(self, epoch: int) -> Iterator[list[WindowDraw]]:
        """This process's parts of an epoch's steps. Every process draws all windows and their frames alike, since the
        step's units are counted in them, and the epoch's masks; of what follows the blocks that its share touches."""
        state = process_state()
        config, windows = self.config, self.config.windows
        generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
        if self.weights is not None:
            drawn = draw_by_weight(self.weights, self.per_epoch, generator)
        else:
            repeats = -(-self.per_epoch // len(self.plan))
            orders = [torch.randperm(len(self.plan), generator=generator) for _ in range(repeats)]
            drawn = torch.cat(orders)[: self.per_epoch]
        masks = channel_masks(_EPOCH_MASKS, self.embedding_dim, windows.erase_share, generator)
        for step, of_step in enumerate(drawn.tensor_split(self.steps_per_epoch)):
            seeds = (config.seed, epoch, step)
            augmentation = torch.Generator().manual_seed(seed_of(*seeds))
            plan, count = self.plan.select(of_step), len(of_step)
            rows = skip_frames(plan, self.first, self.labelled, windows.window_frames, windows.skip, augmentation)
            block = cache(partial(self._block, masks, count, augmentation, seeds))
            units = {
                each.name: count_units(each, of_rows(self.row_labels[each.name], rows), config) for each in config.tasks
            }
            yield [
                WindowDraw(rows[part], plan.video[part], *self._augmentation(part, block), units)
                for part in split_step(
                    torch.arange(count), state.process_index, state.num_processes, passes_of_step(config, count)
                )
            ]

    def _augmentation(self, part: Tensor, block: Callable[[int], _Augmentation]) -> _Augmentation:
        """That of windows in a row, by their places (B,) in the step."""
        low, high = int(part[0]) // _BLOCK_WINDOWS, int(part[-1]) // _BLOCK_WINDOWS
        keep, view, words = zip(*map(block, range(low, high + 1)), strict=True)
        inside = slice(int(part[0]) - low * _BLOCK_WINDOWS, int(part[-1]) - low * _BLOCK_WINDOWS + 1)
        of_words = MaskWords(*(torch.cat(of)[inside] for of in zip(*words, strict=True)))
        return torch.cat(keep)[inside], list(chain(*view))[inside], of_words

    def _block(
        self, masks: Tensor, count: int, of_first: torch.Generator, seeds: tuple[int, int, int], number: int
    ) -> _Augmentation:
        """That of a block of a step's `count` windows; the first goes on in the generator of the frames."""
        windows, size = self.config.windows, min(_BLOCK_WINDOWS, count - number * _BLOCK_WINDOWS)
        generator = torch.Generator().manual_seed(seed_of(*seeds, number)) if number else of_first
        view = torch.randint(len(windows.views), (size,), generator=generator).tolist()
        is_masked = windows.random_masking.mode != "none"
        frames, width = (windows.window_frames, self.embedding_dim) if is_masked else (0, 0)
        words = draw_mask_words(size, frames, width, generator)
        keep = masks[torch.randint(len(masks), (size,), generator=generator)]
        return keep, view, words


def passes_of_step(config: PipelineConfig, num_windows: int) -> int:
    """How many forward passes a process makes for its share of a step."""
    state = process_state()
    if config.train.accumulation is not None:
        return config.train.accumulation
    if config.learns_by_passes or state.device.type != "cpu":
        return 1
    frames, images = config.windows.window_frames, 2 if config.loss.consistency else 1
    of_pass = max(-(-_PASS_FRAMES // frames), _PASS_BYTES // (images * kept_bytes(config.temporal, frames)))
    fewest = num_windows // state.num_processes  # that a process has, which needs one for each pass
    most = -(-num_windows // state.num_processes)
    passes: int = max(1, min(-(-most // of_pass), fewest))
    return passes


def gather_draw(train: LabelledBank, draw: WindowDraw, config: PipelineConfig) -> WindowBatch:
    """The windows of a draw on the bank's device, augmented. One part of a step at a time is in memory."""
    keep = put(draw.keep, train.bank.device)
    words = MaskWords(*(put(of, train.bank.device) for of in draw.words))

    def augmented(embeddings: Tensor) -> Tensor:
        return mask_input(erase_channels(embeddings, keep), words, config.windows.random_masking)

    batch = gather_windows(train.bank, train.labels, draw.rows, draw.video, config.windows.views, draw.view)
    mirrored = augmented(gather_view(train.bank, MIRROR, draw.rows)) if config.loss.consistency else None
    return batch._replace(embeddings=augmented(batch.embeddings), mirrored=mirrored)


def _compile(model: nn.Module) -> None:
    variable, known = ("CC", ["gcc", "clang"]) if torch.cuda.is_available() else ("CXX", ["g++"])
    compilers = [os.environ[variable]] if variable in os.environ else known
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"train.compile needs a compiler, and there is no {' or '.join(compilers)}. Install one, or name it in "
            f"{variable}."
        )
    model.compile()


def _objective(
    train: LabelledBank,
    config: PipelineConfig,
    learning: _Learning,
    model: nn.Module,
    draw: WindowDraw,
    progress: float,
) -> tuple[Tensor, Tensor]:
    batch = gather_draw(train, draw, config)
    logits = model(batch.embeddings, batch.valid)
    remembered = None
    if learning.memory:
        of_classes = output_columns(config.tasks)[next(task.name for task in config.tasks if task.kind == "classes")]
        predictions, zero_row = learning.memory["predictions"], train.bank.zero_row
        rows = (train.bank.first[batch.video][:, None] + batch.frame_index).masked_fill(~batch.valid, zero_row)
        update_memory(predictions, rows.flatten(), logits[..., of_classes].flatten(0, 1))
        predictions[zero_row] = 0  # stood for the frames that are not valid
        remembered = predictions[rows]
    return joint_loss(
        logits,
        batch.labels,
        batch.valid,
        config,
        progress,
        draw.step_units,
        class_weights=learning.class_weights,
        memory=remembered,
        unit_weights=learning.unit_weights,
        mirrored_logits=model(batch.mirrored, batch.valid) if batch.mirrored is not None else None,
    )


def _evaluate(
    validation: LabelledBank, config: PipelineConfig, without_any: npt.NDArray[np.float32], model: TemporalModel
) -> dict[str, float]:
    """Score every labelled validation frame once for each task, finished as predictions are (gaps filled, smoothed)."""
    state = process_state()
    raw = stitch_predictions(
        for_prediction(model),
        validation.bank,
        config.tasks,
        config.windows,
        config.predict,
        process_index=state.process_index,
        num_processes=state.num_processes,
        reduce_sum=sum_over_processes,
    )
    final = finish_probabilities(raw.cpu().numpy(), validation.bank, without_any, config.predict, config.tasks)
    figures: dict[str, float] = {}
    for name, columns in output_columns(config.tasks).items():
        labels = validation.labels[name][:-1].cpu().numpy()
        figures |= score_predictions(TASKS[name], labels, final[:, columns]).figures
    return figures
