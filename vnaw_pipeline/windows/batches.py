"""Bank and plan to batches of windows: gathers from memory, no loader per item."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.processes import put
from vnaw_pipeline.tasks import TaskName
from vnaw_pipeline.windows.plan import of_rows


class WindowBatch(NamedTuple):
    """B windows of P positions. A position without a frame, or whose frame has no face, is not `valid` and zero.

    `embeddings` float16 (B, P, D), `valid` bool (B, P), `labels` of each task (B, P) or (B, P, outputs) with the
    task's `unlabelled` where there is none, `frame_index` int64 (B, P) in the video (-1 where there is no frame),
    `video` int64 (B,) in the bank. `mirrored` (B, P, D) are the mirror images of the same frames, where they are
    asked for.
    """

    embeddings: Tensor
    valid: Tensor
    labels: Mapping[TaskName, Tensor]
    frame_index: Tensor
    video: Tensor
    mirrored: Tensor | None = None


def gather_windows(
    bank: FeatureBank,
    row_labels: Mapping[TaskName, Tensor],
    rows: Tensor,
    video: Tensor,
    views: Sequence[str] = (PLAIN,),
    drawn: Sequence[int] = (),
) -> WindowBatch:
    """Look up bank rows (B, P) of windows of the videos (B,); `row_labels` are (N + 1, ...) for each task.

    What is drawn comes from the host, the batch lies on the bank's device; nothing waits for what that still has to do.
    Of several views, window b is seen in `views[drawn[b]]`.
    """
    device_rows, video = put(rows, bank.device), put(video, bank.device)
    frame_index = (device_rows - bank.first[video][:, None]).masked_fill_(device_rows == bank.zero_row, -1)
    embeddings = gather_view(bank, views[0], rows)
    for number, view in enumerate(views[1:], start=1):
        chosen = torch.tensor([window for window, of in enumerate(drawn) if of == number], dtype=torch.int64)
        embeddings.index_copy_(0, put(chosen, bank.device), gather_view(bank, view, rows[chosen]))
    return WindowBatch(
        embeddings=embeddings,
        valid=of_rows(bank.valid, device_rows),
        labels={name: of_rows(of_task, device_rows) for name, of_task in row_labels.items()},
        frame_index=frame_index,
        video=video,
    )


def gather_view(bank: FeatureBank, view: str, rows: Tensor) -> Tensor:
    """Embeddings (..., D), on the bank's device, of bank rows (...), on the host, in one view."""
    table = bank.view(view)
    if table.device == bank.device:
        found = table.index_select(0, put(rows.flatten(), bank.device))
    else:
        host = torch.empty(rows.numel(), bank.embedding_dim, dtype=table.dtype, pin_memory=True)
        found = torch.index_select(table, 0, rows.flatten(), out=host).to(bank.device, non_blocking=True)
    return found.view(*rows.shape, bank.embedding_dim)
