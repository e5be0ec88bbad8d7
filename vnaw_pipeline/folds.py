"""Folds of 7:3 by video: persons of one source video stay together, classes are spread evenly."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.errors import DataError

_PARTS = 10
_VALIDATION_SHARE = 0.3
_SAMPLES = 20_000  # frames that stand for all in the stratified split, whose cost grows with them


def assign_folds(source_videos: Sequence[str], class_frames: npt.NDArray[np.int64], folds: int, seed: int) -> list[str]:
    """For each video, the folds in which it is validation: '' (always training), '0', or '0 4' where folds overlap.

    The source videos are split into ten parts (fewer if there are fewer) with like numbers of videos and of frames of
    each class; fold i validates on three of ten neighbouring parts, so up to three folds share no video.

    Args:
        source_videos: (V,) the group of each video.
        class_frames: (V, C) labelled frames of each class.
        folds: number of folds; with ten parts at most ten can differ.

    Raises:
        DataError: fewer than two source videos, or more folds than can differ.
    """
    parts = min(_PARTS, len(set(source_videos)))
    if parts < 2:
        raise DataError(f"Folds need at least two source videos with annotations, found {parts}.")
    width = max(1, min(round(_VALIDATION_SHARE * parts), parts // 3))
    distinct = parts // math.gcd(width, parts)
    if not 1 <= folds <= distinct:
        raise DataError(f"{folds} folds were asked for; {parts} parts of the videos give 1 to {distinct}.")
    part_of_video = _parts(source_videos, class_frames, parts, seed)
    validation_parts = [{(fold * width + offset) % parts for offset in range(width)} for fold in range(folds)]
    return [" ".join(str(fold) for fold in range(folds) if part in validation_parts[fold]) for part in part_of_video]


def fold_split(manifest: pd.DataFrame, fold: int | None) -> pd.DataFrame:
    """The manifest with train and validation as one fold has them, test rows as they are; None: the official split.

    Raises:
        DataError: the manifest has no such fold.
    """
    if fold is None:
        return manifest
    is_validation = manifest["fold"].map(lambda folds: str(fold) in folds.split())
    if not is_validation.any():
        known = sorted({int(number) for folds in manifest["fold"] for number in folds.split()})
        has = f"has folds {', '.join(map(str, known))}" if known else "was built without folds"
        raise DataError(f"The manifest has no fold {fold}; it {has}.")
    split = np.where(is_validation, "validation", "train")
    return manifest.assign(split=manifest["split"].where(manifest["split"] == "test", split))


def recordings_in(manifest: pd.DataFrame, split: str) -> set[str]:
    """The source videos of a split."""
    return set(manifest["source_video"][manifest["split"] == split])


def _parts(
    source_videos: Sequence[str], class_frames: npt.NDArray[np.int64], parts: int, seed: int
) -> npt.NDArray[np.int64]:
    """Part of each video, (V,). Frames are thinned alike for all classes, each class keeping at least one a video."""
    from sklearn.model_selection import StratifiedGroupKFold

    thinned = np.ceil(class_frames * (_SAMPLES / max(int(class_frames.sum()), 1))).astype(np.int64)
    # One sample of a further class per video spreads the number of videos, and places those without any label.
    samples = np.column_stack([thinned, np.ones(len(class_frames), dtype=np.int64)])
    video, stratum = np.nonzero(samples)
    repeats = samples[video, stratum]
    video, stratum = np.repeat(video, repeats), np.repeat(stratum, repeats)
    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    part = np.zeros(len(class_frames), dtype=np.int64)
    with warnings.catch_warnings():
        # A class with frames in few videos cannot be in every part; the split is still the best there is.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        groups = np.asarray(source_videos)[video]
        for index, (_, chosen) in enumerate(splitter.split(video, stratum, groups)):
            part[video[chosen]] = index
    return part
