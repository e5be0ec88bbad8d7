"""Synthetic data of any size, in the forms that the stages read: a challenge's folders, a feature store, a run.

Only sizes are real: what is in the crops, labels and embeddings is drawn at random, and the same few bytes stand for
many frames, so that half a minute makes what a week would record.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

from vnaw_pipeline.annotations import image_name, write_annotation
from vnaw_pipeline.checkpoints import save_tensors
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.features.store import FeatureStore, create_store
from vnaw_pipeline.provenance import write_text
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.tasks import IGNORE_LABEL, SPLIT_DIRS, SPLITS, TASKS
from vnaw_pipeline.temporal import TemporalModel

TASK = TASKS["expr8"]
FULL_VIDEOS = 548
_MEDIAN_FRAMES, _MEAN_FRAMES = 4002, 4927
_SHORTEST, _LONGEST = 73, 47_435
_SPLIT_SHARES = (0.456, 0.128, 0.416)
_ORDER_SEED = 841
"""Of an order, found by trying 4,000, in which 453,535 frames of 548 videos validate and 1,022,655 are tests, as of
Aff-Wild2's with expressions, within 2%."""
_VALID_SHARE = 0.985
_SPAN_FRAMES = 150
"""Frames in a row with one label."""


@dataclass(frozen=True)
class Video:
    """One synthetic video."""

    video_id: str
    split: str
    num_frames: int


def make_videos(num_videos: int) -> list[Video]:
    """Videos with the lengths of Aff-Wild2: of 548 (2.7 M frames), 250 train, 70 validate and 228 are tests.

    Lengths are the quantiles of a log-normal distribution of median 4,002 and mean 4,927, in a fixed order. From a
    hundred videos on, the shortest has 73 frames, less than a window, and the longest 47,435.
    """
    quantiles = norm.ppf((np.arange(num_videos) + 0.5) / num_videos)
    spread = np.sqrt(2 * np.log(_MEAN_FRAMES / _MEDIAN_FRAMES))
    lengths = np.round(_MEDIAN_FRAMES * np.exp(spread * quantiles)).astype(int)
    if num_videos >= 100:
        lengths[[0, -1]] = _SHORTEST, _LONGEST
    np.random.default_rng(_ORDER_SEED).shuffle(lengths)
    bounds = np.round(np.cumsum(_SPLIT_SHARES) * num_videos)
    bounds[1] = max(bounds[1], bounds[0] + 1)  # of three or four videos one validates, too
    splits = [SPLITS[int(np.searchsorted(bounds, index, side="right"))] for index in range(num_videos)]
    return [Video(f"video{i:04d}", split, int(t)) for i, (split, t) in enumerate(zip(splits, lengths, strict=True))]


def write_annotations(annotations_dir: Path, videos: Sequence[Video], seed: int = 0) -> None:
    """The challenge's tree of annotation files: spans of one expression, nearly a half of the frames without."""
    rng = np.random.default_rng(seed)
    for video in videos:
        if video.split in SPLIT_DIRS:
            spans = rng.integers(-7, len(TASK.outputs), -(-video.num_frames // _SPAN_FRAMES)).clip(IGNORE_LABEL)
            labels = np.repeat(spans, _SPAN_FRAMES)[: video.num_frames]
            folder = annotations_dir / TASK.annotation_dirs[0] / SPLIT_DIRS[video.split]
            write_annotation(folder / f"{video.video_id}.txt", labels, TASK)


def write_template(path: Path, videos: Sequence[Video]) -> None:
    """The challenge's template, which asks for every frame of the test videos."""
    lines = [TASK.template_header]
    for video in (video for video in videos if video.split == "test"):
        lines += [f"{video.video_id}/{image_name(frame)},0" for frame in range(video.num_frames)]
    write_text(path, "\n".join(lines) + "\n")


def write_crops(crops_root: Path, videos: Sequence[Video], side: int, seed: int = 0) -> None:
    """JPEG folders. The images of a video are one file under many names."""
    jpegs = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in draw_pictures(8, side, seed)]
    for index, video in enumerate(videos):
        folder = crops_root / "cropped_aligned" / video.video_id
        folder.mkdir(parents=True)
        first = folder / image_name(0)
        first.write_bytes(jpegs[index % len(jpegs)])
        for frame in range(1, video.num_frames):
            os.link(first, folder / image_name(frame))


def manifest_of(videos: Sequence[Video]) -> pd.DataFrame:
    """The manifest that `build_manifest` makes of `write_annotations` and `write_crops`."""
    rows = [
        {
            "video_id": video.video_id,
            "split": video.split,
            "num_frames": video.num_frames,
            "crops": f"cropped_aligned/{video.video_id}",
            "annotation": f"{TASK.annotation_dirs[0]}/{SPLIT_DIRS[video.split]}/{video.video_id}.txt"
            if video.split in SPLIT_DIRS
            else "",
            "fold": "",
            "source_video": video.video_id,
        }
        for video in videos
    ]
    return pd.DataFrame(rows)


def write_store(path: Path, videos: Sequence[Video], width: int, seed: int = 0) -> FeatureStore:
    """A complete feature store of random embeddings; 1.5% of the frames have none."""
    store = create_store(path, {"encoder": "synthetic", "seed": seed}, width)
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((8192, width), dtype=np.float32).astype(np.float16)
    for video in videos:
        store.add_video(video.video_id, video.num_frames)
        for unit in store.units(video.video_id):
            valid = rng.random(unit.stop - unit.start) < _VALID_SHARE
            offset = int(rng.integers(len(drawn) - len(valid) + 1))
            store.write_unit(unit, drawn[offset : offset + len(valid)] * valid[:, None], valid)
    return store


def write_run(path: Path, store: FeatureStore, config: PipelineConfig) -> RunFolder:
    """A run folder as `train` leaves it, with a model of random weights for the store's features."""
    folder = RunFolder(path)
    model = TemporalModel(store.embedding_dim, len(TASK.outputs), config.temporal)
    header: dict[str, Any] = {
        "kind": "temporal",
        "embedding_dim": store.embedding_dim,
        "features": store.fingerprint,
        "config": config.model_dump(mode="json"),
        "fold": None,
        "without_any": [1 / len(TASK.outputs)] * len(TASK.outputs),
    }
    write_text(folder.config, dump_config(config))
    save_tensors(folder.best, model.state_dict(), header)
    return folder


def draw_pictures(count: int, side: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth shapes with a little noise, (count, side, side, 3); as JPEGs about as large as crops of faces."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, side, side, 3), dtype=np.uint8)
    for picture in pictures:
        coarse = rng.integers(0, 256, (7, 7, 3)).astype(np.float32)
        smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        picture[:] = np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255)
    return pictures
