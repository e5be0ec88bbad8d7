"""Videos made of real faces with real label noise: what does each part of the method bring when the truth is known?

    python benchmarks/ferplus_streams.py WORK_DIR --faces FERPLUS --validation FERPLUS --imagenet FILE

A stream is a Markov chain of runs of one expression each, with Aff-Wild2's shares of the classes (the next run's class
does not depend on the last one's), 20 to 400 frames long. A run shows one to four faces whose majority of ten voters
is that expression, one after the other; each drifts smoothly (turn, shift, size, light, blur), so that neighbouring
frames are nearly the same. **The dynamics are invented and the person changes within a stream**: what is real is the
faces and how people disagree about them. An annotator gives a face one label for as long as it is shown: one of its
ten votes, drawn at random (`voter`), or its original label in FER2013 (`original`). The truth is the majority; it
scores and does nothing else. Some runs have no label, some frames no face. Training streams show training faces
only, validation streams validation faces.

Streams are crops, annotations and a manifest as Aff-Wild2 has them, and go through the stages of the pipeline. Written
to WORK_DIR: `crops/`, `annotations_*/`, `manifest.csv`, one store per encoder, `runs/`, `results.jsonl`, `tables.md`.
A rerun does what is missing.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from vnaw_pipeline.annotations import write_annotation
from vnaw_pipeline.crops.detect import Face
from vnaw_pipeline.crops.sink import Crop, find_pack, write_pack
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.facesets.faces import FaceSet, Split
from vnaw_pipeline.facesets.read import read_faces
from vnaw_pipeline.stages import usable_cores
from vnaw_pipeline.tasks import EXPRESSIONS, IGNORE_LABEL, SPLIT_DIRS, TASKS

CLASS_FRAMES = (179_434, 17_153, 10_978, 9_110, 94_344, 80_671, 30_639, 169_887)
"""Labelled training frames of Aff-Wild2, by class."""
NUM_STREAMS = {"train": 200, "validation": 60}
STREAM_FRAMES, RUN_FRAMES = (300, 3_000), (20, 400)
UNLABELLED_RUNS, ABSENT_FRAMES, LONGEST_ABSENCE = 0.1, 0.02, 20
CROP_PX, FACE_REGION = 112, (0.05, 0.1, 0.95, 1.0)
"""FERPlus pictures show this part of an aligned crop (`configs/fer_lite0.yaml`)."""
KINDS = ("voter", "original", "truth")
FPS = 30.0


@dataclass(frozen=True)
class Showing:
    """One face of a run, shown from frame `start` up to `stop`."""

    face: int
    start: int
    stop: int
    labels: dict[str, int]


def make_streams(work_dir: Path, faces: Path, split: Split, count: int, seed: int) -> None:
    """Write the crops and annotations of a split's streams; those that are there already are kept."""
    with ProcessPoolExecutor(usable_cores(), get_context("spawn")) as pool:
        list(pool.map(partial(make_stream, work_dir, faces, split, seed), range(count)))


_read_once = cache(read_faces)


def make_stream(work_dir: Path, faces_path: Path, split: Split, seed: int, number: int) -> None:
    faces = _read_once(faces_path, split)
    video_id = f"{split}_{number:03}"
    generator = np.random.default_rng([seed, list(SPLIT_DIRS).index(split), number])
    num_frames = log_uniform(STREAM_FRAMES, generator)
    showings = plan_stream(faces, num_frames, generator)
    for kind in KINDS:
        labels = np.full(num_frames, IGNORE_LABEL)
        for showing in showings:
            labels[showing.start : showing.stop] = showing.labels[kind]
        path = work_dir / f"annotations_{kind}" / TASKS["expr8"].annotation_dirs[0] / SPLIT_DIRS[split]
        write_annotation(path / f"{video_id}.txt", labels, TASKS["expr8"])
    if find_pack(work_dir / "crops", video_id) is None:
        crops = draw_stream(faces, showings, absent_frames(num_frames, generator), generator)
        write_pack(work_dir / "crops", video_id, crops, Source(Path(video_id)), {"benchmark": "ferplus_streams"})


@dataclass(frozen=True)
class Source:
    """What a pack records of the video it was made from."""

    path: Path
    fps: float = FPS

    def loss(self) -> str | None:
        return None


def plan_stream(faces: FaceSet, num_frames: int, generator: np.random.Generator) -> list[Showing]:
    """Which face is shown when, and what each kind of annotator calls it."""
    majority = np.where(faces.single != IGNORE_LABEL, faces.majority(), IGNORE_LABEL)
    by_class = [np.flatnonzero(majority == index) for index in range(len(EXPRESSIONS))]
    shares = np.array(CLASS_FRAMES) / sum(CLASS_FRAMES)
    showings, start = [], 0
    while start < num_frames:
        expression = int(generator.choice(len(EXPRESSIONS), p=shares))
        stop = min(num_frames, start + log_uniform(RUN_FRAMES, generator))
        chosen = generator.choice(by_class[expression], min(int(generator.integers(1, 5)), stop - start))
        inner = np.sort(generator.choice(np.arange(start + 1, stop), len(chosen) - 1, replace=False))
        bounds = [start, *inner.tolist(), stop]
        is_labelled = generator.random() >= UNLABELLED_RUNS
        for face, first, last in zip(chosen.tolist(), bounds[:-1], bounds[1:], strict=True):
            votes = faces.votes[face, : len(EXPRESSIONS)]
            given = {
                "voter": int(generator.choice(len(votes), p=votes / votes.sum())),
                "original": int(faces.single[face]),
                "truth": expression,
            }
            labels = given if is_labelled else dict.fromkeys(given, IGNORE_LABEL)
            showings.append(Showing(face, first, last, labels))
        start = stop
    return showings


def draw_stream(
    faces: FaceSet, showings: list[Showing], absent: npt.NDArray[np.bool_], generator: np.random.Generator
) -> Iterator[Crop]:
    box = np.array([0, 0, CROP_PX, CROP_PX], dtype=np.float32)
    face = Face(box=box, score=1.0, landmarks=np.full((5, 2), np.nan, np.float32))
    for showing in showings:
        pictures = draw_showing(faces.image(showing.face), showing.stop - showing.start, generator)
        for frame_index, picture in enumerate(pictures, start=showing.start):
            if absent[frame_index]:
                yield Crop(frame_index, frame_index / FPS, None, None)
            else:
                jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)
                yield Crop(frame_index, frame_index / FPS, face, jpeg)


def draw_showing(picture: Rgb, num_frames: int, generator: np.random.Generator) -> Iterator[Rgb]:
    """A face as aligned crops (112, 112, 3) of its frames, drifting smoothly; even frames are never quite the same."""
    turn, right, down, size, contrast, light, blur = (smooth_noise(num_frames, generator) for _ in range(7))
    x0, y0, x1, y1 = (CROP_PX * share for share in FACE_REGION)
    middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    for frame in range(num_frames):
        angle, scale = 0.15 * turn[frame], (1 + 0.08 * size[frame]) * (x1 - x0) / picture.shape[1]
        linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array(picture.shape[1::-1]) / 2
        shift = middle + 0.04 * CROP_PX * np.array([right[frame], down[frame]]) - linear @ centre
        moved = cv2.warpAffine(
            picture,
            np.column_stack([linear, shift]),
            (CROP_PX, CROP_PX),
            flags=cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if blur[frame] > 0:
            moved = cv2.GaussianBlur(moved, (0, 0), 0.1 + 1.5 * blur[frame])
        lit = (1 + 0.2 * contrast[frame]) * (moved - 128.0) + 128 + 20 * light[frame]
        grain = generator.normal(0, 2, (CROP_PX, CROP_PX, 1))
        yield np.clip(lit + grain, 0, 255).astype(np.uint8)


def smooth_noise(num_frames: int, generator: np.random.Generator, frames_per_knot: int = 25) -> npt.NDArray[np.float64]:
    """A curve within [-1, 1] through random knots, (num_frames,)."""
    knots = generator.uniform(-1, 1, num_frames // frames_per_knot + 2)
    position = np.arange(num_frames) / frames_per_knot
    share = (1 - np.cos(np.pi * (position % 1))) / 2
    before = position.astype(int)
    return (1 - share) * knots[before] + share * knots[before + 1]


def absent_frames(num_frames: int, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Frames without a face, in spans of up to `LONGEST_ABSENCE`."""
    absent = np.zeros(num_frames, dtype=np.bool_)
    mean_span = (1 + LONGEST_ABSENCE) / 2
    for start in np.flatnonzero(generator.random(num_frames) < ABSENT_FRAMES / mean_span):
        absent[start : start + generator.integers(1, LONGEST_ABSENCE + 1)] = True
    return absent


def log_uniform(bounds: tuple[int, int], generator: np.random.Generator) -> int:
    return round(float(np.exp(generator.uniform(*np.log(bounds)))))
