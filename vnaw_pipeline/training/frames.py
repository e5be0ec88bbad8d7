"""Stage `finetune`: the image encoder on labelled frames. Reads crops, writes a run folder whose `best.safetensors` is
what `encoder.weights` of the extraction may name.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from vnaw_pipeline.config import FinetuneConfig, LossConfig, PipelineConfig
from vnaw_pipeline.crops.source import VideoCrops, decode_crop, open_listed_crops
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.features.encoder import Preprocessing, build_encoder
from vnaw_pipeline.losses.expression import expression_loss
from vnaw_pipeline.manifests import read_labels, read_manifest
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.processes import gather_all, process_state, sum_over_processes
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import Failure, StageReport
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS, Task
from vnaw_pipeline.training.images import read_ahead, vary_images
from vnaw_pipeline.training.loop import SCORE, Optimisation, Recipe, fit, seed_of, split_step
from vnaw_pipeline.windows.plan import balanced_weights

_SECTIONS = {"task", "seed", "encoder", "finetune"}
"""What this stage reads of the config; the rest may change between a run and its continuation."""


class FrameBatch(NamedTuple):
    """Images uint8 (B, S, S, 3) as decoded, labels int64 (B,), IGNORE_LABEL where a crop could not be read."""

    images: Tensor
    labels: Tensor


class LabelledFrames:
    """Labelled frames that have a crop, of the videos of one split; reads crops, and remembers which cannot be read."""

    def __init__(
        self, videos: pd.DataFrame, annotations_dir: Path, crops_root: Path, task: Task, preprocessing: Preprocessing
    ) -> None:
        labels = read_labels(videos, annotations_dir, task)
        self._crops: list[VideoCrops] = []
        self._video_ids: list[str] = []
        self.failures: list[Failure] = []
        parts = [np.zeros((0, 3), dtype=np.int64)]
        for video_id, crops in zip(videos.video_id, videos.crops, strict=True):
            try:
                source = open_listed_crops(crops_root, crops)
            except (DataError, OSError) as error:
                self.failures.append(Failure(video_id, None, str(error)))
                continue
            frames = np.flatnonzero(source.present(len(labels[video_id])))
            classes = labels[video_id][frames]
            known = classes != IGNORE_LABEL
            parts.append(np.stack([np.full(known.sum(), len(self._crops)), frames[known], classes[known]], axis=1))
            self._crops.append(source)
            self._video_ids.append(video_id)
        table = np.concatenate(parts).astype(np.int64)
        self._video, self._frame = table[:, 0], table[:, 1]
        self.labels = torch.from_numpy(table[:, 2].copy())
        self.digest = digest_bytes(",".join(self._video_ids).encode(), table.tobytes())
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self.unreadable: dict[tuple[str, int], str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: Tensor) -> FrameBatch:
        """Decode some of the frames, by index (B,)."""
        side = self._preprocessing.input_px
        images = np.zeros((len(chosen), side, side, 3), dtype=np.uint8)
        read = self._pool.map(partial(self._read_one, images), range(len(chosen)), chosen.tolist())
        readable = torch.tensor(list(read))
        labels = self.labels[chosen].masked_fill(~readable, IGNORE_LABEL)
        return FrameBatch(torch.from_numpy(images), labels)

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
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> StageReport:
    """Fine-tune the encoder with a linear head on class-balanced draws of labelled training frames.

    Raises:
        ConfigError, CheckpointError: as `load_encoder`; the folder holds another run.
        DataError: no labelled frames, crops that are not there.
    """
    started = time.monotonic()
    state = process_state()
    task = TASKS[config.task]
    videos = read_manifest(manifest) if isinstance(manifest, Path) else manifest
    model, preprocessing, _ = build_encoder(config.encoder, len(task.outputs), config.seed, allow_pickle)
    train, validation = (
        _labelled_frames(videos, split, annotations_dir, crops_root, task, preprocessing)
        for split in ("train", "validation")
    )
    folder = RunFolder(run_dir)
    if state.is_main_process:
        folder.begin(config, _SECTIONS, overwrite)
    state.wait_for_everyone()
    settings = config.finetune
    recipe = Recipe(
        model=model,
        steps=partial(_epoch_steps, train, config, len(task.outputs)),
        objective=partial(_objective, preprocessing, settings),
        evaluate=partial(_evaluate, validation, preprocessing, settings, len(task.outputs)),
        header={
            "kind": "encoder",
            "task": task.name,
            "outputs": list(task.outputs),
            "encoder": config.encoder.name,
            "model_args": config.encoder.model_args,
            **preprocessing.recorded(),
            "config": config.model_dump(mode="json", include=_SECTIONS),
            "labels": {"train": train.digest, "validation": validation.digest},
        },
        label="finetune",
    )
    optimisation = Optimisation(
        epochs=settings.epochs,
        steps_per_epoch=-(-settings.frames_per_epoch // settings.batch_frames),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_share=settings.warmup_share,
        max_grad_norm=1.0,
        precision=settings.precision,
        tracker=None,
        seed=config.seed,
    )
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
    if state.is_main_process:
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
) -> LabelledFrames:
    videos = videos[(videos.split == split) & (videos.annotation != "")]
    frames = LabelledFrames(videos, annotations_dir, crops_root, task, preprocessing) if len(videos) else None
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
    drawn = torch.multinomial(weights, settings.frames_per_epoch, replacement=True, generator=generator)
    steps = drawn.tensor_split(-(-len(drawn) // settings.batch_frames))
    mine = (split_step(step, state.process_index, state.num_processes, accumulation=1)[0] for step in steps)
    for batch in read_ahead(train.read, mine):
        yield [FrameBatch(batch.images.to(state.device), batch.labels.to(state.device))]


def _objective(
    preprocessing: Preprocessing, settings: FinetuneConfig, model: nn.Module, batch: FrameBatch, progress: float
) -> tuple[Tensor, Tensor]:
    images = preprocessing.normalise(batch.images)
    logits = model(vary_images(images) if settings.vary_images else images)
    frame_loss = LossConfig(level="frame", weighting="none", label_smoothing=settings.label_smoothing)
    every = torch.ones_like(batch.labels, dtype=torch.bool)
    return expression_loss(logits[:, None], batch.labels[:, None], every[:, None], frame_loss, progress)


@torch.inference_mode()
def _evaluate(
    validation: LabelledFrames,
    preprocessing: Preprocessing,
    settings: FinetuneConfig,
    num_classes: int,
    model: nn.Module,
) -> dict[str, float]:
    """Score evenly spaced labelled validation frames against the given labels."""
    state = process_state()
    chosen = torch.linspace(0, len(validation) - 1, min(settings.validation_frames, len(validation))).round().long()
    predicted = torch.zeros(len(chosen), dtype=torch.int64, device=state.device)
    mine = torch.arange(len(chosen))[state.process_index :: state.num_processes]
    for positions in torch.split(mine, settings.batch_frames):
        batch = validation.read(chosen[positions])
        logits = model(preprocessing.normalise(batch.images.to(state.device)))
        predicted[positions.to(state.device)] = logits.argmax(dim=1)
    predicted = sum_over_processes(predicted)  # each frame by one process, 0 in the others
    scores = expression_scores(validation.labels[chosen].numpy(), predicted.cpu().numpy(), num_classes)
    return {SCORE: scores.macro_f1, "accuracy": scores.accuracy}
