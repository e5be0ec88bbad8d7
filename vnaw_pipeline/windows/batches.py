"""Bank and plan to batches of windows: gathers from memory, no loader per item."""

from typing import NamedTuple

from torch import Tensor

from vnaw_pipeline.features.bank import FeatureBank


class WindowBatch(NamedTuple):
    """B windows of P positions. A position without a frame, or whose frame has no face, is not `valid` and zero.

    `embeddings` float16 (B, P, D), `valid` bool (B, P), `labels` int64 (B, P) with IGNORE_LABEL where there is none,
    `frame_index` int64 (B, P) in the video (-1 where there is no frame), `video` int64 (B,) in the bank.
    """

    embeddings: Tensor
    valid: Tensor
    labels: Tensor
    frame_index: Tensor
    video: Tensor


def gather_windows(bank: FeatureBank, row_labels: Tensor, rows: Tensor, video: Tensor) -> WindowBatch:
    """Look up bank rows (B, P) of windows of the videos (B,); `row_labels` is int64 (N + 1,)."""
    rows, video = rows.to(bank.first.device), video.to(bank.first.device)
    frame_index = (rows - bank.first[video][:, None]).masked_fill(rows == bank.zero_row, -1)
    return WindowBatch(
        embeddings=bank.embeddings.index_select(0, rows.flatten()).view(*rows.shape, bank.embedding_dim),
        valid=bank.valid[rows],
        labels=row_labels[rows],
        frame_index=frame_index,
        video=video,
    )
