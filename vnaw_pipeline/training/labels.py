"""Frames of a split with the labels that each task has for them, row by row beside their embeddings.

`N` frames of a bank, `C` outputs of all tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vnaw_pipeline.config import BankPlace
from vnaw_pipeline.errors import DataError
from vnaw_pipeline.features.bank import FeatureBank, open_bank
from vnaw_pipeline.features.store import FeatureStore
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.losses.joint import annotated
from vnaw_pipeline.manifests import read_labels
from vnaw_pipeline.processes import process_state
from vnaw_pipeline.provenance import digest_bytes
from vnaw_pipeline.tasks import IGNORE_LABEL, TASKS, Task, TaskName

_DTYPES = {"classes": np.int64, "affect": np.float32, "units": np.int8}
"""Of labels in arrays, as `read_annotation` gives them."""


@dataclass(frozen=True)
class LabelledBank:
    """A bank and each task's label of each of its rows, (N + 1,) or (N + 1, outputs), on the bank's device.

    A frame may be labelled for any subset of the tasks; the others have the task's `unlabelled` there.
    """

    bank: FeatureBank
    labels: dict[TaskName, Tensor]

    def digest(self) -> str:
        """What tells this set of videos and labels from another."""
        labels = (of_task.cpu().numpy().tobytes() for of_task in self.labels.values())
        return digest_bytes(",".join(self.bank.video_ids).encode(), *labels)

    def learnable(self) -> "LabelledBank":
        """The same without labels on frames that have no embedding: those are scored, but nothing is learnt there."""
        hidden = {name: ~self.bank.valid.view(-1, *[1] * len(TASKS[name].label_shape)) for name in self.labels}
        return LabelledBank(
            self.bank,
            {name: of.masked_fill(hidden[name], TASKS[name].unlabelled) for name, of in self.labels.items()},
        )

    def labelled(self) -> Tensor:
        """Which rows are labelled for any task, for any of its action units; bool (N + 1,)."""
        labelled = torch.zeros_like(self.bank.valid)
        for name, of_task in self.labels.items():
            known = annotated(of_task, TASKS[name])
            labelled |= known.flatten(1).any(dim=1) if known.ndim > 1 else known
        return labelled

    def means(self) -> list[float]:
        """Class shares, mean valence and arousal, shares of present action units, over the labelled rows; (C,)."""
        found: list[float] = []
        for name, of_task in self.labels.items():
            task = TASKS[name]
            if task.kind == "classes":
                counts = torch.bincount(of_task[of_task != IGNORE_LABEL], minlength=len(task.outputs)).double()
                mean = counts / counts.sum()
            else:
                mean = of_task.double().masked_fill(~annotated(of_task, task), torch.nan).nanmean(dim=0)
            found += [round(value, 6) for value in mean.nan_to_num(0.0).tolist()]  # 0: a unit that is never annotated
        return found


def open_labelled_bank(
    videos: pd.DataFrame,
    annotations_dir: Path,
    store: FeatureStore,
    tasks: Sequence[Task],
    split: str,
    views: Sequence[str] = (PLAIN,),
    place: BankPlace = "device",
) -> LabelledBank:
    """Bank, in the views asked for, and labels of those videos that any of the tasks has labels for, on this
    process's device, the bank in `place` if it fits; `split` is what messages call them.

    Raises:
        DataError: a task without a labelled frame, unusable annotations.
        StoreError: videos missing from the store, or of another length there.
    """
    of_tasks = {task.name: read_labels(videos, annotations_dir, task) for task in tasks} if len(videos) else {}
    video_ids = [video_id for video_id in videos.video_id if any(video_id in of for of in of_tasks.values())]
    lengths = videos.num_frames[videos.video_id.isin(video_ids)].tolist()
    if not video_ids:
        raise DataError(f"The manifest has no annotated videos in split '{split}'.")
    state = process_state()
    bank = open_bank(store, video_ids, shown=state.is_main_process, views=views, device=state.device, place=place)
    store.require_lengths(video_ids, bank.num_frames.tolist(), lengths)
    row_labels: dict[TaskName, Tensor] = {}
    for task in tasks:
        rows = np.full((bank.zero_row + 1, *task.label_shape), task.unlabelled, dtype=_DTYPES[task.kind])
        for video_id, (start, stop) in zip(bank.video_ids, pairwise(bank.first.tolist()), strict=True):
            if video_id in of_tasks[task.name]:
                rows[start:stop] = of_tasks[task.name][video_id]
        row_labels[task.name] = torch.from_numpy(rows).to(state.device)
        if not annotated(row_labels[task.name], task).any():
            raise DataError(f"No frame of the split '{split}' has a label for task '{task.name}'.")
    return LabelledBank(bank, row_labels)
