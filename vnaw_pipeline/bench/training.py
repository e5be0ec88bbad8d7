"""Figures on the bank, windows, training and prediction."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vnaw_pipeline.annotations import image_name
from vnaw_pipeline.bench.data import (
    TASK,
    Video,
    make_videos,
    manifest_of,
    write_annotations,
    write_crops,
    write_run,
    write_store,
)
from vnaw_pipeline.bench.figure import Figure, Goal
from vnaw_pipeline.bench.measure import in_turns, of_turns, peak_memory_of, seconds
from vnaw_pipeline.bench.size import Size
from vnaw_pipeline.config import PipelineConfig, TemporalConfig, WindowConfig
from vnaw_pipeline.crops.source import decode_crop
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.features.encoder import build_encoder
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.prediction.predict import predict_videos
from vnaw_pipeline.processes import keep_freed_memory, process_state, put
from vnaw_pipeline.tasks import IGNORE_LABEL
from vnaw_pipeline.temporal import TemporalModel, for_prediction
from vnaw_pipeline.training.labels import LabelledBank
from vnaw_pipeline.training.windows import Drawing, gather_draw, train_windows
from vnaw_pipeline.windows.batches import WindowBatch
from vnaw_pipeline.windows.plan import WindowPlan, plan_windows, window_rows

_WINDOWS = WindowConfig()
_ENCODER_BATCH = 16
"""Frames of a training pass through the encoder."""


def measure_bank(work: Path, size: Size) -> list[Figure]:
    """Loading the bank, against a copy of as many bytes from memory, and against a file a frame."""
    width = size.widths[0]
    store = write_store(work / "store.zarr", make_videos(size.bank_videos), width)
    bank = open_bank(store, shown=False)  # and now its files are in the system's cache
    source = bank.embeddings.numpy()
    paths = [work / "npy" / f"{frame}.npy" for frame in range(size.npy_frames)]
    paths[0].parent.mkdir()
    for path, row in zip(paths, source, strict=False):
        np.save(path, row)
    target = np.empty_like(source)

    def load() -> None:
        open_bank(open_store(store.path), shown=False)

    copied = in_turns(source.copy, load, size.repeats)
    filled = statistics.median(seconds(lambda: np.copyto(target, source)) for _ in range(size.repeats))
    by_file = in_turns(lambda: [np.load(path) for path in paths], load, size.repeats)
    per_frame = by_file.ratio * len(source) / len(paths)
    rate = source.nbytes / copied.second_s / 1e9
    copy_rate, filled_rate = (source.nbytes / taken / 1e9 for taken in (copied.first_s, filled))
    detail = f"{source.nbytes / 1e9:.2f} GB at {rate:.1f} GB/s; copied into an array made for it, as the bank's is, at "
    detail += f"{copy_rate:.1f} GB/s, into one made before at {filled_rate:.1f}"
    return [
        Figure("bank load / memcpy", copied.ratio, Goal("at least", 0.7), detail),
        Figure(
            "bank load / one .npy a frame",
            per_frame,
            Goal("at least", 100),
            f"{len(paths) / by_file.first_s:.0f} files/s of {width} numbers, read one after the other",
        ),
    ]


def measure_windows(work: Path, size: Size) -> list[Figure]:
    """A window batch with skipped frames and erased channels, against a bare gather into memory that is there."""
    keep_freed_memory()  # as training does
    train, plan = _labelled_bank(work, size)
    bank, batches = train.bank, _batches(train, plan, size.batch_windows)
    generator = torch.Generator().manual_seed(0)
    rows = window_rows(plan, bank.first.cpu(), _WINDOWS.window_frames, bank.zero_row)
    shape = (size.batch_windows * _WINDOWS.window_frames, bank.embedding_dim)
    out = torch.empty(shape, dtype=torch.float16, device=bank.device)

    def drawn() -> Tensor:
        return torch.randint(len(plan), (size.batch_windows,), generator=generator)

    turns = in_turns(
        lambda: torch.index_select(bank.embeddings, 0, put(rows[drawn()].flatten(), bank.device), out=out),
        lambda: next(batches),
        10 * size.repeats,
    )
    detail = f"{size.batch_windows} windows of {_WINDOWS.window_frames} frames, {bank.embedding_dim} wide: "
    detail += f"{size.batch_windows / turns.second_s:,.0f} and {size.batch_windows / turns.first_s:,.0f} windows/s"
    return [Figure("window batch / bare gather", turns.ratio, Goal("at least", 0.5), detail)]


def measure_training(work: Path, size: Size) -> list[Figure]:
    """A training step with and without its data, an epoch with a loader per item, and one through the encoder."""
    train, plan = _labelled_bank(work, size)
    bank, count = train.bank, min(size.step_windows, len(plan))
    batches = _batches(train, plan, count)
    step = _training_step(TemporalModel(bank.embedding_dim, len(TASK.outputs), size.temporal).to(bank.device))
    kept = next(batches)
    loader = _per_item_batches(work / "store.zarr", train, plan, count)

    def with_data() -> None:
        made = next(batches)
        step(made.embeddings, made.valid, made.labels[TASK.name])

    def alone() -> None:
        step(kept.embeddings, kept.valid, kept.labels[TASK.name])

    def per_item() -> None:
        step(*(put(part, bank.device) for part in next(loader)))

    alone()  # takes the memory that later steps use again
    turns = in_turns(with_data, alone, size.repeats * size.steps)
    items = in_turns(per_item, with_data, size.repeats * size.steps)
    frame_s = _encoder_frame_seconds(work / "encoder", size)
    window_s = turns.first_s / count
    end_to_end = frame_s * _WINDOWS.window_frames + window_s
    epoch = f"an epoch of {len(plan)} windows takes {window_s * len(plan):.1f} s"
    return [
        Figure(
            "training step with data / alone",
            turns.ratio,
            Goal("at most", 1.03),
            f"{count} windows in {turns.first_s:.3f} s",
        ),
        Figure(
            "training epoch, loader per item on the store / ours",
            items.ratio,
            None,
            f"extrapolated from {size.repeats * size.steps} steps: {epoch}, with the loader "
            f"{items.first_s / count * len(plan):.1f} s",
        ),
        Figure(
            "training epoch end to end through the encoder / from the cache",
            end_to_end / window_s,
            None,
            f"extrapolated from {size.repeats} passes of {_ENCODER_BATCH} frames, {size.encoder.name} at "
            f"{size.encoder_px} px in float32: {epoch} from the cache, "
            f"{end_to_end * len(plan) / 3600:.1f} h end to end",
        ),
    ]


def measure_prediction(work: Path, size: Size) -> list[Figure]:
    """The stage `predict`, from opening the store to writing tables, against the bare forward pass of as many windows
    that overlap alike.

    The same for a single short video, which is what starting takes, is taken off the stage.
    """
    videos = [video for video in make_videos(size.prediction_videos) if video.split == "test"]
    short = Video("short", "validation", _WINDOWS.window_frames)
    config = PipelineConfig(temporal=size.temporal)
    store = write_store(work / "store.zarr", [*videos, short], size.widths[0])
    run = write_run(work / "run", store, config)
    manifest = manifest_of([*videos, short])
    lengths = torch.tensor([video.num_frames for video in videos])
    num_windows = len(plan_windows(lengths, _WINDOWS.window_frames, _WINDOWS.predict_stride))
    batch = config.predict.batch_windows
    device = process_state().device
    model = for_prediction(TemporalModel(store.embedding_dim, len(TASK.outputs), size.temporal)).to(device)
    stride, window_frames = _WINDOWS.predict_stride, _WINDOWS.window_frames
    places = (torch.arange(batch)[:, None] * stride + torch.arange(window_frames)).to(device)
    embeddings = torch.randn(int(places[-1, -1]) + 1, store.embedding_dim).half().to(device)
    valid = torch.ones(len(embeddings), dtype=torch.bool, device=device)

    @torch.inference_mode()
    def forward() -> None:
        for start in range(0, num_windows, batch):
            count = min(batch, num_windows - start)
            frames = (count - 1) * stride + window_frames
            model(embeddings[:frames], valid[:frames], places[:count])

    def predict(split: str) -> float:
        return seconds(lambda: predict_videos(manifest, store.path, run.path, split))

    predict("validation")
    turns = of_turns([(seconds(forward), predict("test") - predict("validation")) for _ in range(min(size.repeats, 3))])
    detail = f"{int(lengths.sum())} frames, {num_windows} windows in {turns.second_s:.1f} s"
    return [Figure("prediction / bare forward", turns.ratio, Goal("at least", 0.9), detail)]


def measure_training_memory(work: Path, size: Size) -> list[Figure]:
    """What training takes beside its bank and model: weights, gradients and two moments of each parameter."""
    videos = make_videos(max(size.bank_videos, 3))
    width = size.widths[-1]
    config = PipelineConfig.model_validate(
        {
            "temporal": size.temporal.model_dump(),
            "train": {"epochs": 1, "windows_per_epoch": 2 * size.step_windows, "batch_windows": size.step_windows},
        }
    )
    write_annotations(work / "annotations", videos)
    write_store(work / "store.zarr", videos, width)
    paths = (work / "annotations", work / "store.zarr", work / "run")
    peak = peak_memory_of(train_windows, manifest_of(videos), *paths, config)
    frames = sum(video.num_frames for video in videos if video.split != "test")
    if process_state().device.type == "cuda":
        beside = peak / 1e9
        detail = f"peak of the host; the bank ({frames} frames) and the model lie on the GPU"
    else:
        model = TemporalModel(width, len(TASK.outputs), size.temporal)
        bank_bytes, model_bytes = 2 * width * frames, 16 * sum(parameter.numel() for parameter in model.parameters())
        beside = (peak - bank_bytes - model_bytes) / 1e9
        detail = f"peak {peak / 1e9:.2f} GB, bank {bank_bytes / 1e9:.2f} GB ({frames} frames), "
        detail += f"model {model_bytes / 1e9:.2f} GB"
    return [Figure("training memory beside bank and model, GB", beside, Goal("at most", 1.0), detail)]


def measure_prediction_memory(work: Path, size: Size) -> list[Figure]:
    """How much of further embeddings stays in memory when more frames are predicted; 1 would be all of them."""
    width = size.widths[-1]
    config = PipelineConfig(temporal=TemporalConfig(width=16, layers=1, feed_forward=16))
    peaks = []
    for frames in size.prediction_memory_frames:
        folder = work / str(frames)
        lengths = np.diff([*range(0, frames, 5000), frames])
        videos = [Video(f"video{index:04d}", "test", int(length)) for index, length in enumerate(lengths)]
        store = write_store(folder / "store.zarr", videos, width)
        run = write_run(folder / "run", store, config)
        peaks.append(peak_memory_of(predict_videos, manifest_of(videos), store.path, run.path, "test"))
    few, many = size.prediction_memory_frames
    share = (peaks[1] - peaks[0]) / (2 * width * (many - few))
    detail = f"{peaks[0] / 1e9:.2f} GB at {few} frames, {peaks[1] / 1e9:.2f} GB at {many}, {width} wide; "
    detail += "what grows are the answers"
    return [Figure("prediction memory, share of further embeddings", share, Goal("at most", 0.5), detail)]


def _labelled_bank(work: Path, size: Size) -> tuple[LabelledBank, WindowPlan]:
    """A bank with random labels, and the plan of its training windows."""
    store = write_store(work / "store.zarr", make_videos(size.bank_videos), size.widths[0])
    bank = open_bank(store, shown=False, device=process_state().device)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(IGNORE_LABEL, len(TASK.outputs), (bank.zero_row + 1,), generator=generator)
    labels[-1] = IGNORE_LABEL
    plan = plan_windows(bank.num_frames.cpu(), _WINDOWS.window_frames, _WINDOWS.train_stride)
    return LabelledBank(bank, {TASK.name: labels.to(bank.device)}), plan


def _batches(train: LabelledBank, plan: WindowPlan, count: int) -> Iterator[WindowBatch]:
    """Batches without end, as training makes them by default: drawn by class, frames skipped, channels erased."""
    of_train = {"batch_windows": count, "windows_per_epoch": 64 * count, "accumulation": 1}
    config = PipelineConfig.model_validate({"task": TASK.name, "train": of_train})
    drawing = Drawing(train, plan, config)
    for epoch in itertools.count():
        for (draw,) in drawing.steps(epoch):
            yield gather_draw(train, draw, config)


def _training_step(model: nn.Module) -> Callable[..., None]:
    """Forward, cross-entropy of every labelled frame, backward, AdamW."""
    optimiser = torch.optim.AdamW(model.parameters())

    def step(embeddings: Tensor, valid: Tensor, labels: Tensor) -> None:
        logits = model(embeddings, valid)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    return step


class _StoredWindows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Windows read one by one from the store's arrays, as a loader per item reads them."""

    def __init__(self, store_path: Path, train: LabelledBank, plan: WindowPlan) -> None:
        group: Any = zarr.open_group(store_path, mode="r")
        bank = train.bank
        self.arrays = [group[f"{PLAIN}/{video_id}"] for video_id in bank.video_ids]
        self.valid, self.labels = bank.valid.cpu(), train.labels[TASK.name].cpu()
        self.plan, self.first = plan, bank.first.tolist()

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        video, start = int(self.plan.video[index]), int(self.plan.start[index])
        rows = torch.from_numpy(np.asarray(self.arrays[video][start : start + _WINDOWS.window_frames]))
        missing = _WINDOWS.window_frames - len(rows)
        own = slice(self.first[video] + start, self.first[video] + start + len(rows))
        return (
            F.pad(rows, (0, 0, 0, missing)),
            F.pad(self.valid[own].byte(), (0, missing)).bool(),
            F.pad(self.labels[own], (0, missing), value=IGNORE_LABEL),
        )


def _per_item_batches(
    store_path: Path, train: LabelledBank, plan: WindowPlan, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Shuffled batches without end."""
    loader = DataLoader(_StoredWindows(store_path, train, plan), batch_size=count, shuffle=True, drop_last=True)
    while True:
        yield from loader


def _encoder_frame_seconds(work: Path, size: Size) -> float:
    """Seconds a frame of reading a JPEG, forward and backward through the encoder in float32, and its optimiser."""
    video = Video("video0000", "train", _ENCODER_BATCH)
    write_crops(work, [video], size.encoder_px)
    paths = [work / "cropped_aligned" / video.video_id / image_name(frame) for frame in range(_ENCODER_BATCH)]
    device = process_state().device
    model, preprocessing, _ = build_encoder(size.encoder, len(TASK.outputs))
    optimiser = torch.optim.AdamW(model.to(device).parameters())
    labels = torch.zeros(_ENCODER_BATCH, dtype=torch.int64, device=device)

    def step() -> None:
        crops = np.stack([preprocessing.of_crop(decode_crop(path.read_bytes())) for path in paths])
        images = preprocessing.normalise(torch.from_numpy(crops).to(device))
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    return statistics.median(seconds(step) for _ in range(size.repeats)) / _ENCODER_BATCH
