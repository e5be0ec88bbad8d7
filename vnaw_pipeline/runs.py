"""The run folder: `config.yaml, record.json, metrics.jsonl, checkpoint/, predictions/, figures/`."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vnaw_pipeline.checkpoints import load_tensors
from vnaw_pipeline.config import PipelineConfig, dump_config
from vnaw_pipeline.errors import CheckpointError
from vnaw_pipeline.features.store import FeatureStore
from vnaw_pipeline.provenance import differences, environment, utc_now, write_json, write_text
from vnaw_pipeline.tasks import TASKS, Task
from vnaw_pipeline.temporal import TemporalModel


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

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

    def predictions(self, split: str) -> Path:
        """Per-frame table of a split, gaps filled and smoothed; what every consumer reads."""
        return self.path / "predictions" / f"{split}.parquet"

    def raw_predictions(self, split: str) -> Path:
        """The same as the model gave it."""
        return self.path / "predictions" / f"{split}_raw.parquet"

    def begin(self, config: PipelineConfig, overwrite: bool) -> None:
        """Make the folder, or go on with one of the same config; `overwrite` empties a run folder first.

        Raises:
            CheckpointError: the folder holds a run with another config, or something that is no run.
        """
        if self.path.exists() and any(self.path.iterdir()) and not self.config.exists():
            raise CheckpointError(f"{self.path} is not empty and is not a run folder. Give a new folder.")
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        resolved = dump_config(config)
        if self.config.exists() and self.config.read_text(encoding="utf-8") != resolved:
            found, wanted = self.config.read_text(encoding="utf-8").splitlines(), resolved.splitlines()
            changed = [line.strip() for line in wanted if line not in found]
            raise CheckpointError(
                f"{self.path} holds a run with another config (now: {'; '.join(changed[:5])}). "
                "Give a new run folder, or --overwrite to start this one afresh."
            )
        write_text(self.config, resolved)

    def epochs_done(self) -> int:
        """Finished epochs, by `metrics.jsonl`."""
        return len(self.metrics.read_text(encoding="utf-8").splitlines()) if self.metrics.exists() else 0

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all epochs so far, a JSON object a line."""
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in history))

    def write_record(self, **facts: Any) -> None:
        """Write `record.json`: facts of the run, versions and time."""
        write_json(self.path / "record.json", {"written": utc_now(), "environment": environment(), **facts})


@dataclass(frozen=True)
class Run:
    """A trained run, open for prediction: the best model in eval mode, and the header of its checkpoint."""

    folder: RunFolder
    task: Task
    config: PipelineConfig
    model: nn.Module
    header: dict[str, Any]

    def require_features(self, store: FeatureStore) -> None:
        """Raise CheckpointError unless the store was made as the one that the run was trained on."""
        if unlike := differences(store.fingerprint, self.header["features"]):
            raise CheckpointError(
                f"{self.folder.path} was trained on other features than {store.path} holds: {'; '.join(unlike)}. "
                "Extract with the config of the run, or train on this store."
            )


def open_run(path: str | Path) -> Run:
    """Open a run folder's best model.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged or does not belong to the folder's config.
    """
    folder = RunFolder(Path(path))
    tensors, header = load_tensors(folder.best)
    if header.get("kind") != "temporal":
        raise CheckpointError(f"{folder.best} is not the checkpoint of a temporal model ({header.get('kind')!r}).")
    config = PipelineConfig.model_validate(header["config"])
    task = TASKS[config.task]
    model = TemporalModel(header["embedding_dim"], len(task.outputs), config.temporal)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder.best} does not fit the config it carries: {error}") from error
    return Run(folder, task, config, model.eval(), header)
