"""Bank and plan to batches of windows: gathers from memory, no loader per item."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.tasks import TaskName


class WindowBatch(NamedTuple):
    """B windows of P positions. A position without a frame, or whose frame has no face, is not `valid` and zero.

    `embeddings` float16 (B, P, D), `valid` bool (B, P), `labels` of each task (B, P) or (B, P, outputs) with the
    task's `unlabelled` where there is none, `frame_index` int64 (B, P) in the video (-1 where there is no frame),
    `video` int64 (B,) in the bank. In training `step_units` counts the units that each task has in the whole
    optimiser step which the batch is a part of.
    """

    embeddings: Tensor
    valid: Tensor
    labels: Mapping[TaskName, Tensor]
    frame_index: Tensor
    video: Tensor
    step_units: Mapping[TaskName, int] = {}


def gather_windows(
    bank: FeatureBank, row_labels: Mapping[TaskName, Tensor], rows: Tensor, video: Tensor
) -> WindowBatch:
    """Look up bank rows (B, P) of windows of the videos (B,); `row_labels` are (N + 1, ...) for each task."""
    rows, video = rows.to(bank.first.device), video.to(bank.first.device)
    frame_index = (rows - bank.first[video][:, None]).masked_fill(rows == bank.zero_row, -1)
    return WindowBatch(
        embeddings=bank.embeddings.index_select(0, rows.flatten()).view(*rows.shape, bank.embedding_dim),
        valid=bank.valid[rows],
        labels={name: of_task[rows] for name, of_task in row_labels.items()},
        frame_index=frame_index,
        video=video,
    )
