"""Stage `predict`. Reads a run and a feature store, writes one row per frame; replaces its tables whole.

Columns: `video_id, frame_index, valid`, and those of every task of the run: `p_<class>...`, `valence, arousal`,
`p_<unit>...`. Every frame of every video has its row, also those without a face and those of a video shorter than a
window. Embeddings are read some videos at a time, so that of a growing split only the answers take more memory.
"""

import io
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from vnaw_pipeline.config import PredictConfig
from vnaw_pipeline.errors import CheckpointError, DataError
from vnaw_pipeline.features.bank import FeatureBank, open_bank
from vnaw_pipeline.features.store import open_store
from vnaw_pipeline.folds import fold_split
from vnaw_pipeline.locations import Location, location
from vnaw_pipeline.manifests import read_manifest
from vnaw_pipeline.prediction.finish import finish_answers
from vnaw_pipeline.prediction.stitch import stitch_predictions
from vnaw_pipeline.processes import (
    agree,
    give_back_freed_memory,
    keep_freed_memory,
    meet,
    process_state,
    sum_over_processes,
)
from vnaw_pipeline.provenance import atomic_path, digest_bytes
from vnaw_pipeline.runs import open_run
from vnaw_pipeline.stages import StageReport, progress_bar
from vnaw_pipeline.tasks import Task
from vnaw_pipeline.windows.plan import plan_windows

MADE_BY = "made_by"
"""Key of a table's attributes for the digest of the model that made it, and how its answers were finished."""
FRAMES_AT_ONCE = 100_000
"""Frames whose embeddings are in memory together, in whole videos; 200 MB at a width of 1024."""


def predict_videos(
    manifest: Path | pd.DataFrame,
    store_path: str | Location,
    run_dir: Path,
    split: str,
    config: PredictConfig | None = None,
    predictions: str | Location | None = None,
) -> StageReport:
    """Predict every frame of a split's videos with a run's best model; of a fold's run, the splits are its fold's.

    `config` None: that of the run. `predictions` None: the run's own folder of tables; else another one, or `s3://...`.

    Writes `<run>/predictions/<split>_raw.parquet` (as the model says) and `<split>.parquet` (gaps filled, smoothed,
    biased, as `config` has it).

    Raises:
        CheckpointError: the run was trained on other features; its model's answers are not numbers.
        StoreError: videos missing from the store, or of another length there; S3 fails for good.
        DataError: the manifest has no video in this split, or the run has learnt from one of them.
        ProcessError: processes that differ in program, config, manifest, model or features.
    """
    started = time.monotonic()
    state = process_state()
    videos = read_manifest(manifest)
    run = open_run(run_dir, predictions)
    videos = fold_split(videos, run.header["fold"])
    of_split = videos[videos.split == split]
    video_ids = list(of_split.video_id)
    if not video_ids:
        raise DataError(f"The manifest has no videos in split '{split}', only in {sorted(set(videos.split))}.")
    run.require_unseen(videos, split)
    config = config or run.config.predict
    store = open_store(store_path)
    run.require_features(store)
    store.require(video_ids)
    model_digest = digest_bytes(run.folder.best.read_bytes())
    settings = {"split": split, "model": model_digest, "predict": config.model_dump(mode="json")}
    agree({"manifest": digest_bytes(videos.to_csv().encode()), "features": store.fingerprint, **settings})
    without_any = np.asarray(run.header["without_any"], dtype=np.float32)
    lengths = store.lengths(video_ids)
    store.require_lengths(video_ids, lengths, of_split.num_frames.tolist())
    windows = run.config.windows
    num_windows = len(plan_windows(torch.tensor(lengths), windows.window_frames, windows.predict_stride))
    model = run.model.to(state.device)
    if state.device.type == "cpu":
        keep_freed_memory()

    def predict_part(part: slice) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Tensor]:
        give_back_freed_memory()
        bank = open_bank(store, video_ids[part], shown=False, device=state.device)
        stitched = stitch_predictions(
            model,
            bank,
            run.config.tasks,
            windows,
            config,
            process_index=state.process_index,
            num_processes=state.num_processes,
            reduce_sum=sum_over_processes,
            bar=bar,
        )
        raw = stitched.cpu().numpy()
        if not np.isfinite(raw).all():
            raise CheckpointError(f"{run.folder.best} gives answers that are not numbers. Train it again.")
        if not state.is_main_process:  # writes nothing, and need not keep it; a slice would
            return np.empty_like(raw[:0]), np.empty_like(raw[:0]), torch.empty(0, dtype=torch.bool)
        return raw, finish_probabilities(raw, bank, without_any, config, run.config.tasks), bank.valid[:-1].cpu()

    with progress_bar("predict", num_windows // state.num_processes, "windows", state.is_main_process) as bar:
        # in a function of its own, so that the embeddings of one part are gone before those of the next are read
        parts = [predict_part(part) for part in parts_of_videos(lengths, FRAMES_AT_ONCE)]
    give_back_freed_memory()
    raws, finals, valid = zip(*parts, strict=True)
    if state.is_main_process:
        frames = _without_embeddings(video_ids, lengths, torch.cat(valid))
        made_by = made_by_of(model_digest, config)
        for path, answers in ((run.folder.raw_predictions(split), raws), (run.folder.predictions(split), finals)):
            write_predictions(path, np.concatenate(answers), frames, run.config.tasks, made_by)
    meet()
    return StageReport("predict", done=len(video_ids), frames=sum(lengths), seconds=time.monotonic() - started)


def parts_of_videos(lengths: Sequence[int], frames_at_once: int) -> list[slice]:
    """Videos in a row of at most so many frames together; a longer one stands alone."""
    bounds, frames = [0], 0
    for index, length in enumerate(lengths):
        if frames and frames + length > frames_at_once:
            bounds.append(index)
            frames = 0
        frames += length
    return [slice(start, stop) for start, stop in pairwise([*bounds, len(lengths)])]


def finish_probabilities(
    raw: npt.NDArray[np.float32],
    bank: FeatureBank,
    without_any: npt.NDArray[np.float32],
    config: PredictConfig,
    tasks: Sequence[Task],
) -> npt.NDArray[np.float32]:
    """Final answers of a bank's frames, video by video and task by task; (N, C) -> (N, C)."""
    valid = bank.valid.cpu().numpy()
    bounds = bank.first.tolist()
    finished = np.empty_like(raw)
    for start, stop in pairwise(bounds):
        finished[start:stop] = finish_answers(raw[start:stop], valid[start:stop], without_any, config, tasks)
    return finished


def made_by_of(digest: str, config: PredictConfig) -> dict[str, Any]:
    """What a table's attributes say of the model and of how its answers were finished."""
    return {"model": digest, "predict": config.model_dump(mode="json", exclude={"batch_windows"})}


def write_predictions(
    path: Location,
    predictions: npt.NDArray[np.float32],
    bank: FeatureBank,
    tasks: Sequence[Task],
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Write what the tasks predict (N, C) for a bank's frames as the prediction table."""
    columns = [name for task in tasks for name in task.prediction_columns]
    counts = bank.num_frames.tolist()
    table = pd.DataFrame(
        {
            "video_id": pd.Categorical.from_codes(np.repeat(np.arange(len(counts)), counts), pd.Index(bank.video_ids)),
            "frame_index": np.concatenate([np.arange(count) for count in counts]),
            "valid": bank.valid[:-1].cpu().numpy(),
            **{name: predictions[:, column] for column, name in enumerate(columns)},
        }
    )
    table.attrs[MADE_BY] = dict(made_by or {})
    with atomic_path(path) as partial:
        table.to_parquet(partial, index=False)


def read_predictions(path: str | Location, task: Task) -> pd.DataFrame:
    """Read a prediction table, whatever other tasks it holds too.

    Raises:
        DataError: not there, not a Parquet table, or one without this task.
    """
    try:
        table = pd.read_parquet(io.BytesIO(location(path).read_bytes()))
    except FileNotFoundError as error:
        raise DataError(f"There are no predictions at {path}. Make them with `vnaw predict`.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a Parquet table: {error}") from error
    if missing := [name for name in ("video_id", "frame_index", *task.prediction_columns) if name not in table]:
        raise DataError(
            f"{path} has no column {', '.join(missing)}: it holds no predictions of task '{task.name}' "
            f"(columns: {', '.join(map(str, table.columns))})."
        )
    return table.astype({"video_id": "str"})


def _without_embeddings(video_ids: list[str], lengths: Sequence[int], valid: Tensor) -> FeatureBank:
    """Which frames there are, as a bank of width 0."""
    first = torch.tensor([0, *accumulate(lengths)])
    valid = torch.cat([valid, valid.new_zeros(1)])
    return FeatureBank(video_ids, torch.empty(len(valid), 0, dtype=torch.float16), valid, first)
