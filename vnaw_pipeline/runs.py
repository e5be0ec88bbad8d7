"""The run folder: `config.yaml, record.json, metrics.jsonl, checkpoint/, predictions/`, and what stages add."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError
from torch import nn

from vnaw_pipeline.checkpoints import load_tensors, read_header
from vnaw_pipeline.config import PipelineConfig, dump_config, load_config
from vnaw_pipeline.errors import CheckpointError, DataError
from vnaw_pipeline.features.fingerprints import feature_differences
from vnaw_pipeline.features.store import FeatureStore, what_to_set
from vnaw_pipeline.locations import Location, location
from vnaw_pipeline.provenance import differences, environment, flat, utc_now, write_json, write_text
from vnaw_pipeline.tasks import TASKS, Task
from vnaw_pipeline.temporal import TemporalModel, for_prediction


def lasting_settings(config: PipelineConfig, sections: set[str]) -> dict[str, Any]:
    """What may not change while a run goes on: of these sections all but what says how much is in memory at once."""
    settings = flat(config.model_dump(mode="json", include=sections))
    settings.pop("predict.batch_windows", None)
    passes = settings.pop("train.accumulation", None) or 1
    return {**settings, "train.accumulation": passes} if config.learns_by_passes else settings


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie. `tables` are its predictions; None: in the folder itself."""

    path: Path
    tables: Location | None = None

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def composite(self) -> Path:
        """Instead of a config and a model: which runs a composed one was made of."""
        return self.path / "composite.json"

    @property
    def best(self) -> Path:
        """Model of the epoch with the best validation score."""
        return self.path / "checkpoint" / "best.safetensors"

    @property
    def last(self) -> Path:
        """Model and optimiser of the last finished epoch, to go on from."""
        return self.path / "checkpoint" / "last.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON line per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def record(self) -> Path:
        """How, when and with what the run was made, and what was tuned on what."""
        return self.path / "record.json"

    def predictions(self, split: str) -> Location:
        """Per-frame table of a split, gaps filled and smoothed; what every consumer reads."""
        return (self.tables or self.path / "predictions") / f"{split}.parquet"

    def raw_predictions(self, split: str) -> Location:
        """The same as the model gave it."""
        return (self.tables or self.path / "predictions") / f"{split}_raw.parquet"

    def begin(self, config: PipelineConfig, sections: set[str], overwrite: bool) -> None:
        """Make the folder, or go on with one whose config is the same in the `sections` that the stage reads.

        `overwrite` empties a run folder first. Partial files that a killed process left are removed.

        Raises:
            CheckpointError: the folder holds a run with another config, or something that is no run.
        """
        visible = [entry for entry in self.path.iterdir() if entry.name[0] != "."] if self.path.exists() else []
        if visible and not self.config.exists():
            raise CheckpointError(f"{self.path} is not empty and is not a run folder. Give a new folder.")
        if overwrite and self.path.exists():
            # Under a hidden name first: a kill half-way through must not leave half a run.
            whole = self.path.resolve()
            doomed = whole.with_name(f".{whole.name}.removed")
            if doomed.exists():  # left by a kill
                shutil.rmtree(doomed)
            whole.rename(doomed)
            shutil.rmtree(doomed)
        for pattern in (".*.partial.*", ".tmp*"):  # the second is what safetensors leaves
            for partial in self.path.rglob(pattern):
                partial.unlink(missing_ok=True)
        if self.config.exists() and self.last.exists():  # else nothing was learnt yet: a start that failed
            found, wanted = (lasting_settings(each, sections) for each in (load_config(self.config), config))
            if changed := differences(found, wanted):
                raise CheckpointError(
                    f"{self.path} holds a run with another config: {'; '.join(changed[:5])}. "
                    "Give a new run folder, or --overwrite to start this one afresh."
                )
        else:
            write_text(self.config, dump_config(config))

    def epochs_done(self) -> int:
        """Finished epochs, by `metrics.jsonl`."""
        return len(self.metrics.read_text(encoding="utf-8").splitlines()) if self.metrics.exists() else 0

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all epochs so far, a JSON object a line."""
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in history))

    def wants_record(self, new_epochs: int) -> bool:
        """Whether a training has something to record. A rerun with nothing to do leaves what was recorded, of failures
        too, and what `tune` has added since."""
        return new_epochs > 0 or not self.record.exists()

    def write_record(self, **facts: Any) -> None:
        """Write `record.json`: facts of the run, versions and time."""
        write_json(self.record, {"written": utc_now(), "environment": environment(), **facts})


@dataclass(frozen=True)
class Run:
    """A trained run, open for prediction: the best model, as `for_prediction` makes it, and its checkpoint's header.

    `task` is the main one; the model's outputs are those of `config.tasks`, side by side.
    """

    folder: RunFolder
    task: Task
    config: PipelineConfig
    model: nn.Module
    header: dict[str, Any]

    def require_unseen(self, videos: pd.DataFrame, split: str) -> None:
        """Raise DataError if a split other than 'train' has videos that this run has learnt from: a score on them would
        say nothing. `videos` have the splits of this run."""
        seen = set(videos.video_id[videos.split == split]) & set(self.header.get("learnt_from", ()))
        if split != "train" and seen:
            raise DataError(
                f"{self.folder.path} has learnt from {len(seen)} videos of the split '{split}', such as "
                f"{', '.join(sorted(seen)[:3])}. Use the manifest that it was trained with."
            )

    def require_features(self, store: FeatureStore) -> None:
        """Raise CheckpointError unless the store was made as the one that the run was trained on."""
        if unlike := feature_differences(store.fingerprint, self.header["features"]):
            raise CheckpointError(
                f"{self.folder.path} was trained on other features than {store.path} holds (found in the store, wanted "
                f"by the run): {'; '.join(unlike)}. "
                "Extract with the config of the run, or train on this store."
                f"{what_to_set(self.header['features'], store.fingerprint)}"
            )


def run_folder(path: str | Path, predictions: str | Location | None = None) -> RunFolder:
    """A run folder whose tables lie in `predictions`; None: in the folder itself."""
    return RunFolder(Path(path), None if predictions is None else location(predictions))


def read_run(folder: RunFolder) -> tuple[PipelineConfig, dict[str, Any]]:
    """Config and header of a trained run's best checkpoint.

    Raises:
        CheckpointError: none is there, or one of something else or of another version.
    """
    if folder.composite.is_file():
        raise CheckpointError(
            f"{folder.path} is a composed run, which has no model of its own. Predict with each of its members, then "
            "run `vnaw combine` for that split."
        )
    if not folder.config.is_file():
        raise CheckpointError(f"{folder.path} is not a run folder: it has no config.yaml. Make one with `vnaw train`.")
    header = read_header(folder.best)
    if header.get("kind") != "temporal":
        raise CheckpointError(
            f"{folder.best} is not there, or not the checkpoint of a temporal model. Make it with `vnaw train`."
        )
    try:
        return PipelineConfig.model_validate(header["config"]), header
    except (ValidationError, KeyError) as error:
        raise CheckpointError(f"{folder.best} was not written by this version of the program: {error}") from error


def open_run(path: str | Path, predictions: str | Location | None = None) -> Run:
    """Open a run folder's best model; its tables lie in `predictions` if not in the run folder.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged or does not belong to the folder's config.
    """
    folder = run_folder(path, predictions)
    config, header = read_run(folder)
    tensors, _ = load_tensors(folder.best)
    try:
        num_outputs = sum(len(task.outputs) for task in config.tasks)
        model = TemporalModel(header["embedding_dim"], num_outputs, config.temporal)
        model.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder.best} does not fit the config it carries: {error}") from error
    return Run(folder, TASKS[config.task], config, for_prediction(model), header)
