"""Augmentation of training windows: frame skipping on bank rows, erasing and masking on embeddings.

Skipping only moves bank rows, so a label always goes with its frame; erasing and masking take input away and leave
frames valid and labelled. Seeded by what is passed in.
`B` windows, `P` frames, `D` embedding width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vnaw_pipeline.config import MaskingConfig, SkipConfig
from vnaw_pipeline.windows.plan import WindowPlan, of_rows, window_rows


def skip_frames(
    plan: WindowPlan,
    first: Tensor,
    labelled: Tensor,
    window_frames: int,
    skip: SkipConfig,
    generator: torch.Generator,
) -> Tensor:
    """Bank rows of augmented windows, int64 (B, P); what is skipped or past the end is the bank's zero row.

    `labelled` is bool (N + 1,), whether a bank row has a label. At least one labelled frame of a window survives.
    Source: V-NAW Eq. 3 (`drop`, `mask`); `resample` is the variant of the authors' code.
    """
    zero_row = len(labelled) - 1
    rows = window_rows(plan, first, window_frames, zero_row)
    if skip.mode == "none":
        return rows
    if skip.mode == "resample":
        resampled = _resample(plan, first, window_frames, skip.speed, generator)
        # A video shorter than a window keeps its own length: it is not stretched to look longer than it is.
        is_long = (first[plan.video + 1] - first[plan.video] >= window_frames)[:, None]
        keeps_label = of_rows(labelled, resampled).any(dim=1, keepdim=True)
        return torch.where(is_long & keeps_label, resampled, rows)
    keep = draw_kept(of_rows(labelled, rows), rows != zero_row, skip.share, generator)
    kept = torch.where(keep, rows, zero_row)
    if skip.mode == "drop":
        kept.numpy().sort(axis=1)  # in place; the zero row is the bank's last, so what is skipped goes to the end
    return kept


def draw_kept(labelled: Tensor, inside: Tensor, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Which frames stay, bool (B, P): each with probability 1 - lambda, lambda ~ U(share) per window (Eq. 3).

    If no labelled frame would stay, the labelled frame that came closest does.
    """
    low, high = share
    skipped_share = low + (high - low) * torch.rand(len(inside), 1, generator=generator)
    chance = torch.rand(inside.shape, generator=generator)
    keep = (chance >= skipped_share) & inside
    lost_all = (keep & labelled).sum(dim=1) == 0  # a third of the time of `any`
    if lost_all.any():  # seldom
        lost_all &= labelled.any(dim=1)
        best = torch.where(labelled[lost_all], chance[lost_all], -1.0).argmax(dim=1)
        keep[lost_all, best] = True
    return keep


def _resample(
    plan: WindowPlan,
    first: Tensor,
    window_frames: int,
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
    return first[plan.video][:, None] + start[:, None] + positions


def channel_masks(count: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Masks of embedding channels, bool (count, D): of each, exactly round(share * D) random channels do not stay.

    A window takes one for all its frames: the paper's in-frame erasing (Eq. 4, 5), done in a feature cache.
    """
    order = torch.rand(count, width, generator=generator).argsort(dim=1, stable=True)  # alike on every processor
    return order >= round(share * width)


def erase_channels(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Set the channels of each window that `keep` (B, D) leaves out to zero, in all its frames; float16 (B, P, D), in
    place."""
    return _clear_others(embeddings, keep[:, None])


def _clear_others(embeddings: Tensor, keep: Tensor) -> Tensor:
    # By their bits, which a CPU does as fast as it copies; a product of float16 and bool takes it three times as long.
    embeddings.view(torch.int16).bitwise_and_(keep.to(torch.int16).neg_())
    return embeddings


class MaskWords(NamedTuple):
    """Random odd words, of each frame int32 (B, P) and of each channel (B, D) of the windows of a step.

    The product of a frame's and a channel's, as it overflows, is the random word of that element: uniform again over
    the odd words, and independent of those in its row and in its column. So the masks of a step are drawn at once,
    small, whatever parts the step is split into, and each part multiplies its own out where its embeddings lie.
    """

    frames: Tensor
    channels: Tensor


def draw_mask_words(num_windows: int, num_frames: int, width: int, generator: torch.Generator) -> MaskWords:
    """Words for the masks of a step's windows."""
    drawn = torch.randint(-(2**31), 2**31, (num_windows, num_frames + width), generator=generator) | 1
    return MaskWords(drawn[:, :num_frames].int(), drawn[:, num_frames:].int())


def mask_input(embeddings: Tensor, words: MaskWords, masking: MaskingConfig) -> Tensor:
    """Set random frames, or random elements, of each window to zero; float16 (B, P, D), in place.

    Only the input is masked: a masked frame stays valid, is attended to, and is learnt from by its label, which the
    model then has to find out from its neighbours. What stays is not scaled up, as dropout would. Source: Transformers
    with Random Masking (ABAW6), p = 0.5; that each frame is drawn on its own is our reading.
    """
    if masking.mode == "none":
        return embeddings
    drawn = words.frames[:, :, None]
    if masking.mode == "elements":
        drawn = drawn * words.channels[:, None]
    return _clear_others(embeddings, drawn >= int((masking.probability - 0.5) * 2**32))
