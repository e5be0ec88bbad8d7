"""Figures on the encoder: extraction end to end, the fast backend, and what it does to the scores."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vnaw_pipeline.bench.data import Video, draw_pictures, manifest_of, write_crops
from vnaw_pipeline.bench.figure import Figure, Goal
from vnaw_pipeline.bench.measure import of_turns, peak_memory_of, seconds
from vnaw_pipeline.bench.size import TINY_ENCODER, Size
from vnaw_pipeline.config import EncoderConfig, PipelineConfig, load_config
from vnaw_pipeline.demo import DEMO_CONFIG, demo_manifest
from vnaw_pipeline.features.backends import make_encode, one_core_per_forward, resolve_arithmetic
from vnaw_pipeline.features.bank import open_bank
from vnaw_pipeline.features.encoder import load_encoder
from vnaw_pipeline.features.extract import extract_features
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.manifests import read_labels
from vnaw_pipeline.metrics import expression_scores
from vnaw_pipeline.prediction.predict import finish_probabilities
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.processes import process_state
from vnaw_pipeline.rendering.dataset import render_dataset
from vnaw_pipeline.runs import open_run
from vnaw_pipeline.tasks import TASKS
from vnaw_pipeline.training.windows import train_windows

Frames = npt.NDArray[np.uint8]
EAGER = {"precision": "fp32", "backend": "torch"}
"""Settings of `extract` that leave the fast backend out."""


def measure_extraction(work: Path, size: Size) -> list[Figure]:
    """JPEG folder to store, against the bare forward pass of as many frames that are decoded already.

    A rerun, which loads the encoder and finds nothing to do, is taken off the extraction.
    """
    videos = [Video("video0000", "train", size.extraction_frames)]
    write_crops(work / "crops", videos, size.encoder_px)
    config = _config(size.encoder)
    frames, batch = size.extraction_frames, config.extract.batch_frames
    batches = list(islice(cycle(_batches(4 * batch, batch, size.encoder_px)), -(-frames // batch)))

    def extract() -> float:
        shutil.rmtree(work / "store.zarr", ignore_errors=True)
        first, again = (seconds(lambda: _extract(work, videos, config)) for _ in range(2))
        return first - again

    with fast_encode(config) as encode:
        encode(batches[:2])
    pairs = []
    for _ in range(min(size.repeats, 3)):
        with fast_encode(config) as encode:
            bare = seconds(lambda: encode(batches))
        pairs.append((bare, extract()))
    found = of_turns(pairs)
    detail = f"{frames} frames: {frames / found.second_s:.1f} and {frames / found.first_s:.1f} frames/s"
    return [Figure("extraction / bare forward", found.ratio, Goal("at least", 0.97), detail)]


def measure_backend(work: Path, size: Size) -> list[Figure]:
    """`vnaw extract` as it is by default, against eager PyTorch in float32 with all cores on each batch."""
    config = _config(size.encoder)
    batch = min(config.extract.batch_frames, size.eager_frames)
    config = _with_extract(config, {"batch_frames": batch})
    batches = _batches(size.eager_frames, batch, size.encoder_px) * 2  # for two cores at least
    encoder, device = load_encoder(size.encoder), process_state().device
    model = encoder.model.to(device)

    @torch.inference_mode()
    def eager() -> npt.NDArray[np.float32]:
        images = (encoder.preprocessing.normalise(torch.from_numpy(frames).to(device)) for frames in batches)
        return np.concatenate([model(of_batch).cpu().numpy() for of_batch in images])

    wanted = eager()
    pairs = []
    with fast_encode(config) as encode:
        found = encode(batches)
    for _ in range(size.repeats):
        slow = seconds(eager)
        with fast_encode(config) as encode:
            encode(batches[:2])
            pairs.append((slow, seconds(lambda: encode(batches))))
    turns = of_turns(pairs)
    cosine = centred_cosine(found.astype(np.float32), wanted)
    arithmetic = resolve_arithmetic(config.extract.backend, config.extract.precision, device)
    goal = Goal("at least", 4.5 if arithmetic.backend == "openvino" else 3.0)
    frames = len(wanted)
    detail = f"{frames / turns.second_s:.1f} and {frames / turns.first_s:.1f} frames/s, by {arithmetic.backend} in "
    detail += arithmetic.precision
    return [
        Figure("backend auto / eager fp32", turns.ratio, goal, detail),
        Figure(
            "backend auto, centred cosine to fp32",
            float(cosine.mean()),
            Goal("at least", 0.999),
            f"{frames} frames, untrained weights; least {cosine.min():.5f}",
        ),
    ]


def measure_scores(work: Path, size: Size) -> list[Figure]:
    """Macro-F1 of one temporal model, trained on float32 embeddings of rendered faces, on these and on the default
    ones of the validation videos; both against the true expressions."""
    data = work / "data"
    render_dataset(data, size.drawn, shown=False)
    manifest = demo_manifest(data)
    base = load_config(DEMO_CONFIG, [f"train.epochs={size.drawn_epochs}"])
    task = TASKS[base.task]
    stores = {}
    for name, extract in (("eager", EAGER), ("auto", {})):
        config = _with_extract(base, extract)
        stores[name] = work / f"{name}.zarr"
        extract_features(manifest, data / "crops", stores[name], config)
    train_windows(manifest, data / "annotations", stores["eager"], work / "run", base)
    run = open_run(work / "run")
    rows = manifest[manifest.split == "validation"]
    truth = np.concatenate(list(read_labels(rows, data / "truth", task).values()))
    without_any = np.asarray(run.header["without_any"], np.float32)
    scores = {}
    for name, path in stores.items():
        bank = open_bank(open_store(path), list(rows.video_id), shown=False)
        raw = stitch_predictions(run.model, bank, [task], base.windows, base.predict).numpy()
        final = finish_probabilities(raw, bank, without_any, base.predict, [task])
        scores[name] = 100 * expression_scores(truth, final.argmax(axis=1), len(task.outputs)).macro_f1
    detail = f"{scores['auto']:.2f} and {scores['eager']:.2f} on {len(truth)} rendered frames"
    change = abs(scores["auto"] - scores["eager"])
    return [Figure("macro-F1 change by backend auto, points", change, Goal("at most", 0.2), detail)]


def measure_extraction_memory(work: Path, size: Size) -> list[Figure]:
    """Peak memory of extraction by a tiny encoder, of many frames against few."""
    peaks = []
    for frames in size.extraction_memory_frames:
        folder = work / str(frames)
        lengths = [min(5000, frames - start) for start in range(0, frames, 5000)]
        videos = [Video(f"video{index:04d}", "train", length) for index, length in enumerate(lengths)]
        write_crops(folder / "crops", videos, 32)
        stage = (extract_features, manifest_of(videos), folder / "crops", folder / "store.zarr", _config(TINY_ENCODER))
        peaks.append(peak_memory_of(*stage))
        shutil.rmtree(folder)
    few, many = size.extraction_memory_frames
    detail = f"{peaks[0] / 1e6:.0f} MB at {few} frames, {peaks[1] / 1e6:.0f} MB at {many}"
    return [Figure("extraction memory, many / few frames", peaks[1] / peaks[0], Goal("at most", 1.1), detail)]


@contextmanager
def fast_encode(config: PipelineConfig) -> Iterator[Callable[[Sequence[Frames]], npt.NDArray[np.float16]]]:
    """The encoder as `extract` runs it: a function on batches, as many at a time as there are cores."""
    encoder = load_encoder(config.encoder)
    arithmetic = resolve_arithmetic(config.extract.backend, config.extract.precision, process_state().device)
    with one_core_per_forward(arithmetic.device) as forwards, ThreadPoolExecutor(forwards) as pool:
        encode = make_encode(encoder, arithmetic, forwards, config.extract.batch_frames)
        yield lambda batches: np.concatenate(list(pool.map(encode, batches)))


def centred_cosine(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine of each row with its counterpart, (N, D) twice -> (N,), after the mean row of each was taken off."""
    one, other = (rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64) for rows in (found, wanted))
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / norms)


def _extract(folder: Path, videos: Sequence[Video], config: PipelineConfig) -> None:
    extract_features(manifest_of(videos), folder / "crops", folder / "store.zarr", config)


def _batches(frames: int, batch: int, side: int) -> list[Frames]:
    pictures = draw_pictures(frames, side)
    return [pictures[start : start + batch] for start in range(0, frames, batch)]


def _config(encoder: EncoderConfig) -> PipelineConfig:
    return PipelineConfig(encoder=encoder)


def _with_extract(config: PipelineConfig, values: Mapping[str, str | int]) -> PipelineConfig:
    return config.model_copy(update={"extract": config.extract.model_copy(update=values)})
