"""Stage `train`: the temporal model on windows. Reads a feature store, writes a run folder; a rerun goes on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.features.bank import FeatureBank, open_bank
from vnaw_pipeline.features.store import FeatureStore, open_store
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.losses.expression import expression_loss
from vnaw_pipeline.losses.objectives import class_weights, prediction_memory, update_memory
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.predict import finish_probabilities
from vnaw_pipeline.prediction.stitch import stitch_probabilities
from vnaw_pipeline.processes import process_state, sum_over_processes
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import StageReport
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS, Task
from vnaw_pipeline.temporal import TemporalModel
from vnaw_pipeline.training.loop import SCORE, Optimisation, Recipe, fit, seed_of, split_step
from vnaw_pipeline.windows.augment import channel_mask, erase_channels, mask_input, skip_frames, window_seeds
from vnaw_pipeline.windows.batches import WindowBatch, gather_windows
from vnaw_pipeline.windows.plan import (
    WindowPlan,
    balanced_weights,
    labelled_share,
    plan_windows,
    window_labels,
    window_rows,
)

_SECTIONS = {"task", "seed", "windows", "temporal", "loss", "train", "predict"}
"""What this stage reads of the config; the rest may change between a run and its continuation."""


@dataclass(frozen=True)
class LabelledBank:
    """A bank and the label of each of its rows, int64 (N + 1,), on the bank's device."""

    bank: FeatureBank
    row_labels: Tensor

    def digest(self) -> str:
        """What tells this set of videos and labels from another."""
        return digest_bytes(",".join(self.bank.video_ids).encode(), self.row_labels.cpu().numpy().tobytes())

    def learnable(self) -> "LabelledBank":
        """The same without labels on frames that have no embedding: those are scored, but nothing is learnt there."""
        return LabelledBank(self.bank, self.row_labels.masked_fill(~self.bank.valid, IGNORE_LABEL))


def train_windows(
    manifest: Path | pd.DataFrame,
    annotations_dir: Path,
    store_path: Path,
    run_dir: Path,
    config: PipelineConfig,
    *,
    fold: int | None = None,
    overwrite: bool = False,
) -> StageReport:
    """Train the temporal model on the training videos; every epoch scores every labelled validation frame once.

    With `fold`, the manifest's fold of that number is validation and the rest of its labelled videos training.

    Raises:
        StoreError: videos missing from the store. CheckpointError: the folder holds another run.
        DataError: no labelled windows to train on, nothing to validate on.
    """
    started = time.monotonic()
    state = process_state()
    task = TASKS[config.task]
    videos = read_manifest(manifest) if isinstance(manifest, Path) else manifest
    if fold is not None:
        videos = fold_split(videos, fold)
    store = open_store(store_path)
    train, validation = (
        _labelled_bank(videos[videos.split == split], annotations_dir, store, task, split)
        for split in ("train", "validation")
    )
    train = train.learnable()
    folder = RunFolder(run_dir)
    if state.is_main_process:
        folder.begin(config, _SECTIONS, overwrite)
    state.wait_for_everyone()

    plan = training_plan(train, config, task)
    per_epoch = config.train.windows_per_epoch or len(plan)
    class_counts = _class_counts(train.row_labels, len(task.outputs))
    class_shares = [round(share, 6) for share in (class_counts / class_counts.sum()).tolist()]
    memory = prediction_memory(config.loss, len(train.row_labels), len(task.outputs))
    header = {
        "kind": "temporal",
        "task": task.name,
        "outputs": list(task.outputs),
        "embedding_dim": store.embedding_dim,
        "features": store.fingerprint,
        "config": config.model_dump(mode="json", include=_SECTIONS),
        "labels": {"train": train.digest(), "validation": validation.digest()},
        "fold": fold,
        "class_shares": class_shares,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TemporalModel(store.embedding_dim, len(task.outputs), config.temporal)
    recipe = Recipe(
        model=model,
        steps=partial(_epoch_steps, train, plan, config, task, per_epoch),
        objective=partial(
            _objective, config, train.bank.first, class_weights(class_counts, config.loss.weighting), memory
        ),
        evaluate=partial(_evaluate, validation, config, task, class_shares),
        header=header,
        label="train",
        memory=memory,
    )
    optimisation = Optimisation(
        epochs=config.train.epochs,
        steps_per_epoch=-(-per_epoch // config.train.batch_windows),
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
    best = max(history, key=lambda row: row[SCORE])
    seconds = time.monotonic() - started
    if state.is_main_process:
        folder.write_record(
            stage="train",
            device=str(state.device),
            processes=state.num_processes,
            seed=config.seed,
            features=store.fingerprint,
            videos={split: int((videos.split == split).sum()) for split in ("train", "validation")},
            windows=len(plan),
            seconds=round(seconds, 1),
            tuned={"epoch": f"best macro-F1 on the given labels of the validation videos, epoch {best['epoch']}"},
        )
    return StageReport(
        "train",
        units="epochs",
        done=len(history) - before,
        skipped=before,
        seconds=seconds,
        notes=[f"best macro-F1 {100 * best[SCORE]:.2f} on validation, in epoch {best['epoch']}"],
    )


def training_plan(train: LabelledBank, config: PipelineConfig, task: Task) -> WindowPlan:
    """Windows of the training videos with enough labelled frames.

    Raises:
        DataError: there is none.
    """
    windows = config.windows
    plan = plan_windows(train.bank.num_frames.cpu(), windows.window_frames, windows.train_stride)
    rows = window_rows(plan, train.bank.first.cpu(), windows.window_frames, train.bank.zero_row)
    share = labelled_share(train.row_labels.cpu()[rows], rows != train.bank.zero_row)
    plan = plan.select(share >= config.loss.min_labelled)
    if len(plan) == 0:
        raise DataError(
            f"No training window of {windows.window_frames} frames has {config.loss.min_labelled:.0%} of its frames "
            f"labelled for task '{task.name}'. Lower loss.min_labelled, or check the annotations with `vnaw check`."
        )
    return plan


def _labelled_bank(
    videos: pd.DataFrame, annotations_dir: Path, store: FeatureStore, task: Task, split: str
) -> LabelledBank:
    """Bank and labels of a split's videos."""
    videos = videos[videos.annotation != ""]
    if videos.empty:
        raise DataError(f"The manifest has no annotated videos in split '{split}'.")
    state = process_state()
    labels = read_labels(videos, annotations_dir, task)
    bank = open_bank(store, list(videos.video_id), shown=state.is_main_process)
    rows = np.concatenate([*(labels[video_id] for video_id in bank.video_ids), [IGNORE_LABEL]]).astype(np.int64)
    if (rows == IGNORE_LABEL).all():
        raise DataError(f"No frame of the split '{split}' has a label for task '{task.name}'.")
    return LabelledBank(bank.to(state.device), torch.from_numpy(rows).to(state.device))


def _class_counts(row_labels: Tensor, num_classes: int) -> Tensor:
    return torch.bincount(row_labels[row_labels != IGNORE_LABEL], minlength=num_classes).double()


def _epoch_steps(
    train: LabelledBank, plan: WindowPlan, config: PipelineConfig, task: Task, per_epoch: int, epoch: int
) -> Iterator[list[WindowBatch]]:
    """This process's batches of an epoch. Every process draws all windows alike and augments its own share."""
    state = process_state()
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    row_labels, first = train.row_labels.cpu(), train.bank.first.cpu()
    if config.train.sampling != "uniform":
        rows = window_rows(plan, first, config.windows.window_frames, train.bank.zero_row)
        power = 1.0 if config.train.sampling == "balanced" else 0.5
        weights = balanced_weights(window_labels(row_labels[rows], len(task.outputs)), len(task.outputs), power)
        drawn = torch.multinomial(weights, per_epoch, replacement=True, generator=generator)
    else:
        repeats = -(-per_epoch // len(plan))
        drawn = torch.cat([torch.randperm(len(plan), generator=generator) for _ in range(repeats)])[:per_epoch]
    for step, of_step in enumerate(drawn.tensor_split(-(-per_epoch // config.train.batch_windows))):
        augmentation = torch.Generator().manual_seed(seed_of(config.seed, epoch, step))
        rows = skip_frames(
            plan.select(of_step), first, row_labels, config.windows.window_frames, config.windows.skip, augmentation
        )
        keep = channel_mask(len(of_step), train.bank.embedding_dim, config.windows.erase_share, augmentation)
        seeds = window_seeds(len(of_step), augmentation)
        batches = []
        parts = split_step(
            torch.arange(len(of_step)), state.process_index, state.num_processes, config.train.accumulation
        )
        for part in parts:
            batch = gather_windows(train.bank, train.row_labels, rows[part], plan.video[of_step[part]])
            embeddings = erase_channels(batch.embeddings, keep[part])
            batches.append(
                batch._replace(embeddings=mask_input(embeddings, seeds[part], config.windows.random_masking))
            )
        yield batches


def _objective(
    config: PipelineConfig,
    first: Tensor,
    weights: Tensor | None,
    memory: dict[str, Tensor],
    model: nn.Module,
    batch: WindowBatch,
    progress: float,
) -> tuple[Tensor, Tensor]:
    """Loss sum and units of a batch; `memory` holds each bank row's moving average of predictions, if it is needed."""
    logits = model(batch.embeddings, batch.valid)
    remembered = None
    if memory:
        rows = first[batch.video][:, None] + batch.frame_index
        update_memory(memory["predictions"], rows[batch.valid], logits[batch.valid])
        remembered = memory["predictions"][rows]
    return expression_loss(
        logits, batch.labels, batch.valid, config.loss, progress, class_weights=weights, memory=remembered
    )


def _evaluate(
    validation: LabelledBank, config: PipelineConfig, task: Task, class_shares: list[float], model: nn.Module
) -> dict[str, float]:
    """Score every labelled validation frame once, finished as predictions are (gaps filled, smoothed)."""
    state = process_state()
    raw = stitch_probabilities(
        model,
        validation.bank,
        len(task.outputs),
        config.windows,
        config.predict.batch_windows,
        process_index=state.process_index,
        num_processes=state.num_processes,
        reduce_sum=sum_over_processes,
    )
    shares = np.asarray(class_shares, dtype=np.float32)
    final = finish_probabilities(raw.cpu().numpy(), validation.bank, shares, config.predict.smooth_half_width)
    labels = validation.row_labels[:-1].cpu().numpy()
    scores = expression_scores(labels, final.argmax(axis=1).astype(np.int64), len(task.outputs))
    return {SCORE: scores.macro_f1, "accuracy": scores.accuracy}
