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

from vnaw_pipeline.config import PredictConfig
from vnaw_pipeline.errors import CheckpointError, DataError
from vnaw_pipeline.locations import Location
from vnaw_pipeline.prediction.finish import finish_answers
from vnaw_pipeline.prediction.predict import MADE_BY, read_predictions
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.runs import RunFolder, read_run, run_folder
from vnaw_pipeline.tasks import TASKS, Task

TUNED = "tuned.json"


@dataclass(frozen=True)
class PredictedRun:
    """A run as its tables' readers see it.

    `tasks` are the main one and what it was learnt with, `predict` how it finishes its answers unless told otherwise,
    `without_any` (C,) what a video without any face gets, over the columns of all tasks, `digest` that of the model or
    of the composition.
    """

    folder: RunFolder
    tasks: tuple[Task, ...]
    predict: PredictConfig
    fold: int | None
    without_any: npt.NDArray[np.float32]
    digest: str

    @property
    def task(self) -> Task:
        """The main task."""
        return self.tasks[0]

    @property
    def columns(self) -> list[str]:
        """Columns of the tables that hold the answers, of all tasks."""
        return [name for task in self.tasks for name in task.prediction_columns]

    def table(self, split: str, task: Task, *, raw: bool = False) -> pd.DataFrame:
        """The final table of a split, or the raw one, with the columns of one of the tasks among others.

        Raises:
            DataError: not there, or unusable, or made by another model than the run holds now.
        """
        path = self.folder.raw_predictions(split) if raw else self.folder.predictions(split)
        found = read_predictions(path, task)
        if found.attrs.get(MADE_BY, {}).get("model", self.digest) != self.digest:
            raise DataError(
                f"{path} was made by another model than {self.folder.path} holds now. Run `vnaw "
                f"{'combine' if self.folder.composite.is_file() else 'predict'}` again for the split '{split}'."
            )
        return found

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


def open_predicted(path: str | Path, predictions: str | Location | None = None) -> PredictedRun:
    """Open a run folder for what reads its tables, which lie in `predictions` if not in the run folder.

    Raises:
        CheckpointError: neither a trained run nor a composed one, or a damaged one.
    """
    folder = run_folder(path, predictions)
    if folder.composite.is_file():
        content = _read_json(folder.composite, "")
        digest = digest_bytes(json.dumps(content, sort_keys=True).encode())
        tasks = tuple(TASKS[name] for name in content["tasks"])
        without_any = np.asarray(content["without_any"], np.float32)
        return PredictedRun(folder, tasks, PredictConfig(), content["fold"], without_any, digest)
    config, header = read_run(folder)
    without_any = np.asarray(header["without_any"], np.float32)
    digest = digest_bytes(folder.best.read_bytes())
    return PredictedRun(folder, config.tasks, config.predict, header["fold"], without_any, digest)


def finish_table(raw: pd.DataFrame, run: PredictedRun, config: PredictConfig) -> pd.DataFrame:
    """A run's table of raw answers as the final one: gaps filled, smoothed, decisions shifted, video by video.

    The frames of a video stand in their order.
    """
    given = raw[run.columns].to_numpy(dtype=np.float32)
    valid = raw["valid"].to_numpy(dtype=np.bool_)
    final = np.empty_like(given)
    for rows in raw.groupby("video_id", sort=False, observed=True).indices.values():
        final[rows] = finish_answers(given[rows], valid[rows], run.without_any, config, run.tasks)
    return raw.assign(**dict(zip(run.columns, final.T, strict=True)))


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(missing) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    return content
