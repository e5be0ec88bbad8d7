"""The prediction tables of a run, without its model: whose they are, their frames in order, and how they are finished.

A run is trained (`vnaw train`) or composed of others (`vnaw combine`); what reads tables only does not care which.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import ValidationError

from vnaw_pipeline.checkpoints import read_header
from vnaw_pipeline.config import PipelineConfig, PredictConfig
from vnaw_pipeline.errors import CheckpointError
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.prediction.finish import finish_video
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.tasks import TASKS, Task

COMPOSITE, TUNED = "composite.json", "tuned.json"


@dataclass(frozen=True)
class PredictedRun:
    """A run as its tables' readers see it.

    `predict` is how it finishes its answers unless told otherwise, `class_shares` (K,) what a video without any face
    gets, `digest` that of the model or of the composition.
    """

    folder: RunFolder
    task: Task
    predict: PredictConfig
    fold: int | None
    class_shares: npt.NDArray[np.float32]
    digest: str

    def split_videos(self, videos: pd.DataFrame) -> pd.DataFrame:
        """The manifest with the splits that this run was trained with: those of its fold, if it had one."""
        return videos if self.fold is None else fold_split(videos, self.fold)

    def tuned(self, config: PredictConfig | None = None) -> PredictConfig:
        """`config` (None: the run's) with what `vnaw tune` found.

        Raises:
            CheckpointError: nothing was tuned, or on another model than is there now.
        """
        path = self.folder.path / TUNED
        found = _read_json(path, f"{self.folder.path} has no {TUNED}. Make it with `vnaw tune`.")
        if found.get("digest") != self.digest:
            raise CheckpointError(f"{path} was tuned on another model than this run holds now. Run `vnaw tune` again.")
        return PredictConfig.model_validate({**(config or self.predict).model_dump(), **found["predict"]})


def open_predicted(path: str | Path) -> PredictedRun:
    """Open a run folder for what reads its tables.

    Raises:
        CheckpointError: neither a trained run nor a composed one, or a damaged one.
    """
    folder = RunFolder(Path(path))
    if (folder.path / COMPOSITE).is_file():
        content = _read_json(folder.path / COMPOSITE, "")
        digest = digest_bytes(json.dumps(content, sort_keys=True).encode())
        shares = np.asarray(content["class_shares"], np.float32)
        return PredictedRun(folder, TASKS[content["task"]], PredictConfig(), content["fold"], shares, digest)
    if not folder.config.is_file():
        raise CheckpointError(f"{folder.path} is not a run folder: it has no config.yaml. Make one with `vnaw train`.")
    header = read_header(folder.best)
    if header.get("kind") != "temporal":
        raise CheckpointError(f"{folder.best} is not there or not a temporal model. Train the run with `vnaw train`.")
    try:
        config = PipelineConfig.model_validate(header["config"])
    except (ValidationError, KeyError) as error:
        raise CheckpointError(f"{folder.best} was not written by this version of the program: {error}") from error
    shares = np.asarray(header["class_shares"], np.float32)
    digest = digest_bytes(folder.best.read_bytes())
    return PredictedRun(folder, TASKS[config.task], config.predict, header["fold"], shares, digest)


def finish_table(
    raw: pd.DataFrame, class_shares: npt.NDArray[np.float32], config: PredictConfig, task: Task
) -> pd.DataFrame:
    """A table of raw answers as the final one: gaps filled, smoothed, decisions shifted, video by video.

    The frames of a video stand in their order.
    """
    given = raw[task.probability_columns].to_numpy(dtype=np.float32)
    valid = raw["valid"].to_numpy(dtype=np.bool_)
    final = np.empty_like(given)
    for rows in raw.groupby("video_id", sort=False, observed=True).indices.values():
        final[rows] = finish_video(given[rows], valid[rows], class_shares, config, task.kind)
    return raw.assign(**dict(zip(task.probability_columns, final.T, strict=True)))


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    return content
