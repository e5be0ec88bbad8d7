"""Bank and plan to batches of windows: gathers from memory, no loader per item."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.tasks import TaskName


class WindowBatch(NamedTuple):
    """B windows of P positions. A position without a frame, or whose frame has no face, is not `valid` and zero.

    `embeddings` float16 (B, P, D), `valid` bool (B, P), `labels` of each task (B, P) or (B, P, outputs) with the
    task's `unlabelled` where there is none, `frame_index` int64 (B, P) in the video (-1 where there is no frame),
    `video` int64 (B,) in the bank. `mirrored` (B, P, D) are the mirror images of the same frames, where they are asked
    for. In training `step_units` counts the units that each task has in the whole
    optimiser step which the batch is a part of.
    """

    embeddings: Tensor
    valid: Tensor
    labels: Mapping[TaskName, Tensor]
    frame_index: Tensor
    video: Tensor
    mirrored: Tensor | None = None
    step_units: Mapping[TaskName, int] = {}


def gather_windows(
    bank: FeatureBank,
    row_labels: Mapping[TaskName, Tensor],
    rows: Tensor,
    video: Tensor,
    views: Sequence[str] = (PLAIN,),
    drawn: Tensor | None = None,
) -> WindowBatch:
    """Look up bank rows (B, P) of windows of the videos (B,); `row_labels` are (N + 1, ...) for each task.

    Of several views, window b is seen in `views[drawn[b]]`; drawn int64 (B,).
    """
    device_rows, video = rows.to(bank.first.device), video.to(bank.first.device)
    frame_index = (device_rows - bank.first[video][:, None]).masked_fill(device_rows == bank.zero_row, -1)
    embeddings = gather_view(bank, views[0], rows)
    if drawn is not None:
        for number, view in enumerate(views[1:], start=1):
            chosen = drawn == number
            embeddings[chosen.to(embeddings.device)] = gather_view(bank, view, rows[chosen])
    return WindowBatch(
        embeddings=embeddings,
        valid=bank.valid[device_rows],
        labels={name: of_task[device_rows] for name, of_task in row_labels.items()},
        frame_index=frame_index,
        video=video,
    )


def gather_view(bank: FeatureBank, view: str, rows: Tensor) -> Tensor:
    """Embeddings (B, P, D) of bank rows (B, P) in one view."""
    rows = rows.to(bank.first.device)
    return bank.view(view).index_select(0, rows.flatten()).view(*rows.shape, bank.embedding_dim)
