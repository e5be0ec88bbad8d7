"""Augmentation of training windows: frame skipping on bank rows, erasing and masking on embeddings.

Skipping only moves bank rows, so a label always goes with its frame; erasing and masking take input away and leave
frames valid and labelled. Seeded by what is passed in.
`B` windows, `P` frames, `D` embedding width.
"""

import torch
from torch import Tensor

from vnaw_pipeline.config import MaskingConfig, SkipConfig
from vnaw_pipeline.tasks import IGNORE_LABEL
from vnaw_pipeline.windows.plan import WindowPlan, window_rows


def skip_frames(
    plan: WindowPlan,
    first: Tensor,
    row_labels: Tensor,
    window_frames: int,
    skip: SkipConfig,
    generator: torch.Generator,
) -> Tensor:
    """Bank rows of augmented windows, int64 (B, P); what is skipped or past the end is the bank's zero row.

    `row_labels` is int64 (N + 1,), the label of each bank row. At least one labelled frame of a window survives.
    Source: V-NAW Eq. 3 (`drop`, `mask`); `resample` is the variant of the authors' code.
    """
    zero_row = len(row_labels) - 1
    rows = window_rows(plan, first, window_frames, zero_row)
    if skip.mode == "none":
        return rows
    if skip.mode == "resample":
        resampled = _resample(plan, first, window_frames, zero_row, skip.speed, generator)
        keeps_label = (row_labels[resampled] != IGNORE_LABEL).any(dim=1, keepdim=True)
        return torch.where(keeps_label, resampled, rows)
    keep = draw_kept(row_labels[rows] != IGNORE_LABEL, rows != zero_row, skip.share, generator)
    kept = torch.where(keep, rows, zero_row)
    if skip.mode == "mask":
        return kept
    packed_first = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    return kept.gather(1, packed_first)


def draw_kept(labelled: Tensor, inside: Tensor, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Which frames stay, bool (B, P): each with probability 1 - lambda, lambda ~ U(share) per window (Eq. 3).

    If no labelled frame would stay, the labelled frame that came closest does.
    """
    low, high = share
    skipped_share = low + (high - low) * torch.rand(len(inside), 1, generator=generator)
    chance = torch.rand(inside.shape, generator=generator)
    keep = (chance >= skipped_share) & inside
    best = torch.where(labelled, chance, -1.0).argmax(dim=1, keepdim=True)
    lost_all = labelled.any(dim=1, keepdim=True) & ~(keep & labelled).any(dim=1, keepdim=True)
    return keep | (lost_all & (torch.arange(inside.shape[1]) == best))


def _resample(
    plan: WindowPlan,
    first: Tensor,
    window_frames: int,
    zero_row: int,
    speed: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Take a span of round(P * s) frames, s ~ U(speed) per window, and stretch it to P by nearest neighbour."""
    low, high = speed
    num_frames = first[plan.video + 1] - first[plan.video]
    drawn = low + (high - low) * torch.rand(len(plan), generator=generator)
    span = (window_frames * drawn).round().long().clamp(min=1).minimum(num_frames)
    start = plan.start.minimum(num_frames - span)
    middle = torch.arange(window_frames) + 0.5
    positions = (middle * span[:, None] / window_frames).floor().long()
    rows = first[plan.video][:, None] + start[:, None] + positions
    # A video shorter than a window keeps its own length: it is not stretched to look longer than it is.
    inside = torch.arange(window_frames) < num_frames[:, None]
    unstretched = first[plan.video][:, None] + torch.arange(window_frames)
    is_short = (num_frames < window_frames)[:, None]
    return torch.where(is_short, torch.where(inside, unstretched, zero_row), rows)


def channel_mask(num_windows: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Which embedding channels of each window stay, bool (B, D): exactly round(share * D) of them do not.

    One mask serves all frames of a window: the paper's in-frame erasing (Eq. 4, 5), done in a feature cache.
    """
    order = torch.rand(num_windows, width, generator=generator).argsort(dim=1)
    keep = torch.ones(num_windows, width, dtype=torch.bool)
    return keep.scatter_(1, order[:, : round(share * width)], False)


def erase_channels(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Set the channels of each window that `keep` (B, D) leaves out to zero, in all its frames; (B, P, D)."""
    return embeddings * keep[:, None].to(embeddings)


def window_seeds(num_windows: int, generator: torch.Generator) -> Tensor:
    """A seed for each window of a step, int64 (B,), so that a window's masks do not depend on how a step is split."""
    return torch.randint(2**62, (num_windows,), generator=generator)


def mask_input(embeddings: Tensor, seeds: Tensor, masking: MaskingConfig) -> Tensor:
    """Set random frames, or random elements, of each window to zero; (B, P, D), with a seed for each window (B,).

    Only the input is masked: a masked frame stays valid, is attended to, and is learnt from by its label, which the
    model then has to find out from its neighbours. What stays is not scaled up, as dropout would. Source: Transformers
    with Random Masking (ABAW6), p = 0.5; that each frame is drawn on its own is our reading.
    """
    if masking.mode == "none":
        return embeddings
    _, num_frames, width = embeddings.shape
    shape = (num_frames, 1) if masking.mode == "frames" else (num_frames, width)
    generator = torch.Generator()
    masks = [torch.rand(shape, generator=generator.manual_seed(seed)) < masking.probability for seed in seeds.tolist()]
    return embeddings.masked_fill(torch.stack(masks).to(embeddings.device), 0)
