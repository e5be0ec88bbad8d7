"""Stage `combine`. Reads the final tables of several runs, writes a composed run: a mean of models, or a cascade.

The members are run folders, trained or composed; each answers as its own final table says. `composite.json` names
them with the digest of each; the same command with another split adds that split's tables.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from vnaw_pipeline.config import PredictConfig
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError, listing
from vnaw_pipeline.prediction.cascade import hard_cascade, soft_cascade
from vnaw_pipeline.prediction.predict import MADE_BY, made_by_of
from vnaw_pipeline.prediction.smooth import Probabilities
from vnaw_pipeline.prediction.tables import PredictedRun, finish_table, open_predicted
from vnaw_pipeline.provenance import atomic_path, differences, digest_bytes, write_json
from vnaw_pipeline.runs import RunFolder
from vnaw_pipeline.stages import StageReport
from vnaw_pipeline.tasks import TASKS, Task

How = Literal["mean", "hard", "soft"]


def combine_runs(run_dirs: Sequence[Path], how: How, out: Path, split: str, *, tuned: bool = False) -> StageReport:
    """Combine what runs predicted for a split into the tables of a composed run.

    Writes `<out>/composite.json`, `<out>/predictions/<split>_raw.parquet` (the members' final answers combined) and
    `<split>.parquet` (the same with gaps filled anew; with `tuned` also smoothed and biased by the composed run's
    own `tuned.json`), and their digests into `record.json`.

    Raises:
        ConfigError: too few members, or of tasks that cannot be combined so.
        DataError: members that predicted other frames. CheckpointError: no runs, or `out` holds something else.
    """
    started = time.monotonic()
    members = [open_predicted(path) for path in run_dirs]
    tasks = composed_tasks(members, how)
    members = sorted(members, key=lambda member: member.task.name) if how != "mean" else members  # coarse5 first
    tables = [member.table(split, member.task) for member in members]
    finished = [table.attrs.get(MADE_BY, {}).get("predict") for table in tables]
    tables = aligned(tables, [str(member.folder.path) for member in members])
    answers = combine(
        [table[of.columns].to_numpy(np.float32) for table, of in zip(tables, members, strict=True)],
        how,
    )
    _begin(out, members, finished, how, tasks)
    composed = open_predicted(out)
    raw = tables[0][["video_id", "frame_index"]].assign(
        valid=np.any([table["valid"] for table in tables], axis=0),
        **dict(zip(composed.columns, answers.T, strict=True)),
    )
    predict = composed.tuned() if tuned else PredictConfig()
    raw.attrs[MADE_BY] = made_by_of(composed.digest, predict)
    final = finish_table(raw, composed, predict)
    for path, table in ((composed.folder.raw_predictions(split), raw), (composed.folder.predictions(split), final)):
        with atomic_path(path) as partial:
            table.to_parquet(partial, index=False)
    _record(composed, members, split, tuned)
    num_videos = int(raw["video_id"].nunique())
    return StageReport("combine", done=num_videos, frames=len(raw), seconds=time.monotonic() - started)


def combine(answers: Sequence[Probabilities], how: How) -> Probabilities:
    """The members' answers (N, K) as one; `hard` and `soft` take those of coarse5 and of negative4."""
    if how == "mean":
        return np.asarray(np.mean(answers, axis=0, dtype=np.float64), dtype=np.float32)
    coarse, negative = answers
    return (hard_cascade if how == "hard" else soft_cascade)(coarse, negative)


def composed_tasks(members: Sequence[PredictedRun], how: How) -> tuple[Task, ...]:
    """The tasks of the composed run.

    Raises:
        ConfigError: members that cannot be combined so.
    """
    tasks = [" + ".join(task.name for task in member.tasks) for member in members]
    found = ", ".join(f"{member.folder.path} ({names})" for member, names in zip(members, tasks, strict=True))
    if how == "mean":
        if len(members) < 2 or len(set(tasks)) > 1:
            raise ConfigError(f"A mean takes two or more runs of the same tasks; given are {found}.")
        return members[0].tasks
    if sorted(tasks) != ["coarse5", "negative4"]:
        raise ConfigError(f"A {how} cascade takes one run of coarse5 and one of negative4; given are {found}.")
    return (TASKS["expr8"],)


def aligned(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> list[pd.DataFrame]:
    """The tables with the same frames in the same order: that of the first, each video's frames ascending.

    Raises:
        DataError: every video whose frames are not the same in all, by the names of the tables.
    """
    key = ["video_id", "frame_index"]
    order = pd.Categorical(tables[0]["video_id"], categories=tables[0]["video_id"].unique()).codes
    first = tables[0].iloc[np.lexsort((tables[0]["frame_index"], order))].reset_index(drop=True)
    wanted = pd.MultiIndex.from_frame(first[key])
    result = [first]
    for table, name in zip(tables[1:], names[1:], strict=True):
        found = pd.MultiIndex.from_frame(table[key])
        places = found.get_indexer(wanted) if found.is_unique and wanted.is_unique else np.array([-1])
        if len(found) != len(wanted) or (places < 0).any():
            raise DataError(_unlike(first, table, names[0], name))
        result.append(table.iloc[places].reset_index(drop=True))
    return result


def _unlike(one: pd.DataFrame, other: pd.DataFrame, one_name: str, other_name: str) -> str:
    counts = pd.DataFrame({"one": one["video_id"].value_counts(), "other": other["video_id"].value_counts()})
    counts = counts.fillna(0).astype(int)
    unlike = counts[counts["one"] != counts["other"]].sort_index()
    lines = [f"  {row.Index}: {row.one} frames and {row.other}" for row in unlike.itertuples()]
    heading = f"{one_name} and {other_name} did not predict the same frames. Predict the same split with both:"
    return listing([heading, *(lines or ["  as many frames a video, but not the same ones, or some twice"])])


def _begin(
    out: Path, members: Sequence[PredictedRun], finished: Sequence[Any], how: How, tasks: Sequence[Task]
) -> None:
    """Make the folder of the composed run, or find the same composition in it: of members whose answers were finished
    alike, or what is tuned on one split would not hold on another."""
    folds = {member.fold for member in members}
    without_any: list[npt.NDArray[np.float32]] = [member.without_any[None] for member in members]
    content: dict[str, Any] = {
        "how": how,
        "tasks": [task.name for task in tasks],
        "fold": folds.pop() if len(folds) == 1 else None,
        "without_any": combine(without_any, how)[0].tolist(),
        "members": [
            {"name": member.folder.path.name, "digest": member.digest, "predict": predict}
            for member, predict in zip(members, finished, strict=True)
        ],
    }
    path = RunFolder(out).composite
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if _unfinished(found["members"]) == _unfinished(content["members"]) and found["members"] != content["members"]:
            raise CheckpointError(
                f"The members of {out} finished their answers in another way for the split that is there. Predict all "
                "splits of a member alike (--tuned or not, with one predict.precision), and combine them in a new "
                "folder."
            )
        if unlike := differences(found, content):
            raise CheckpointError(f"{out} is composed otherwise: {'; '.join(unlike)[:500]}. Give a new folder.")
    elif out.exists() and any(entry.name[0] != "." for entry in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and is no composed run. Give a new folder.")
    else:
        write_json(path, content)


def _unfinished(members: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(member["name"], member["digest"]) for member in members]


def _record(composed: PredictedRun, members: Sequence[PredictedRun], split: str, tuned: bool) -> None:
    """Add the split to `record.json`: which tables of which members it was made of."""
    path = composed.folder.record
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    tables = {
        str(member.folder.path): digest_bytes(member.folder.predictions(split).read_bytes()) for member in members
    }
    splits = {**found.get("splits", {}), split: {"tuned": tuned, "tables": tables}}
    composed.folder.write_record(stage="combine", splits=splits, tuned=found.get("tuned", {}))
