"""Where windows start: integer arithmetic only.

`V` videos, `M` windows of a plan, `P` frames of a window, `T` frames of a video.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vnaw_pipeline.tasks import IGNORE_LABEL

_MOST_WEIGHTS = 2**24
"""That torch.multinomial takes."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows as int64 (M,) pairs: index of the video in the bank, and first frame."""

    video: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.video)

    def select(self, windows: Tensor) -> "WindowPlan":
        """Some of the windows, by index (B,) or mask (M,)."""
        return WindowPlan(self.video[windows], self.start[windows])

    def blocks(self, num_windows: int = 4096) -> "list[WindowPlan]":
        """The same windows in order, so many at a time: the rows of all of them may take more memory than there is."""
        return [self.select(block) for block in torch.split(torch.arange(len(self)), num_windows)]


def plan_windows(num_frames: Tensor, window_frames: int, stride: int) -> WindowPlan:
    """Cover every frame of every video: a window every `stride`, and the last one flush with the end.

    `num_frames` is int64 (V,). A video shorter than a window has one window, which starts at 0 and runs over its end.
    250 frames, windows of 100, stride 100 -> starts 0, 100, 150.
    """
    if stride > window_frames:
        raise ValueError(f"stride {stride} leaves gaps between windows of {window_frames} frames")
    last = (num_frames - window_frames).clamp(min=0)
    counts = (last + stride - 1) // stride + 1
    video = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number = torch.arange(len(video)) - (counts.cumsum(0) - counts)[video]
    return WindowPlan(video, torch.minimum(number * stride, last[video]))


def window_rows(plan: WindowPlan, first: Tensor, window_frames: int, zero_row: int) -> Tensor:
    """Bank rows of each window, int64 (M, P); positions after the end of a video are `zero_row`.

    `first` is int64 (V + 1,), the bank row of each video's first frame.
    """
    rows = (first[plan.video] + plan.start)[:, None] + torch.arange(window_frames, device=plan.start.device)
    return rows.masked_fill_(rows >= first[plan.video + 1][:, None], zero_row)


def of_rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]` of a table (N + 1, ...) and rows (B, P); on a CPU a few times as fast."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, *table.shape[1:])


def window_labels(labels: Tensor, num_classes: int) -> Tensor:
    """One label per window: the class of most labelled frames; int64 (M, P) -> (M,).

    A tie goes to the class whose nearest frame is closest to the window's centre (then to the earlier class); a window
    without a labelled frame gets IGNORE_LABEL. The paper leaves this rule open.
    """
    window_frames = labels.shape[1]
    is_class = labels[:, :, None] == torch.arange(num_classes, device=labels.device)
    off_centre = (2 * torch.arange(window_frames, device=labels.device) - (window_frames - 1)).abs()
    nearest = torch.where(is_class, off_centre[:, None], window_frames).amin(dim=1)
    # Counts are whole numbers, so a penalty below 1 only decides between equal ones.
    score = is_class.sum(dim=1).double() - nearest.double() / (window_frames + 1)
    return torch.where(is_class.any(dim=(1, 2)), score.argmax(dim=1), IGNORE_LABEL)


def labelled_share(labelled: Tensor, inside: Tensor) -> Tensor:
    """Share of a window's frames that are `labelled` (M, P), float (M,); `inside` (M, P) marks frames of the video."""
    return labelled.sum(dim=1) / inside.sum(dim=1).clamp(min=1)


def balanced_weights(labels: Tensor, num_classes: int, power: float = 1.0) -> Tensor:
    """Sampling weight of each unit, n ** -power for one of a class of n; float64 (M,).

    With power 1 every class that occurs is drawn equally often, with power 1/2 in proportion to the square root of its
    size (CFC-SP). Units with IGNORE_LABEL get weight 0.
    """
    counts = torch.bincount(labels[labels != IGNORE_LABEL], minlength=num_classes).double()
    return torch.where(labels == IGNORE_LABEL, 0.0, counts.clamp(min=1)[labels.clamp(min=0)] ** -power)


def draw_by_weight(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Places (count,) among the weights, float64 (M,), with replacement, each as often as it weighs."""
    if len(weights) <= _MOST_WEIGHTS:
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    bounds = weights.cumsum(0)
    drawn = torch.rand(count, dtype=torch.float64, generator=generator) * bounds[-1]
    return torch.searchsorted(bounds, drawn, right=True).clamp(max=len(weights) - 1)
