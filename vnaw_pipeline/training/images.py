"""What both encoder recipes share: reading ahead, and changing images without changing what they show.

`B` images, `S` side in pixels. Draws come from torch's global generator, which `fit` seeds by epoch and process.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Chosen = TypeVar("Chosen")
Batch = TypeVar("Batch")
_ERASED_SHARE = (0.02, 0.2)
_ASPECT = (0.3, 3.3)


def read_ahead(read: Callable[[Chosen], Batch], chosen: Iterable[Chosen]) -> Iterator[Batch]:
    """`map(read, chosen)`, one batch ahead of its consumer, so that reading hides behind the training step."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting = None
        for item in chosen:
            following = pool.submit(read, item)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def vary_images(images: Tensor) -> Tensor:
    """Mirror half of the images, and turn, scale, shift, brighten and contrast each a little; (B, 3, S, S), normalised.

    Drawn in float32 on the images' device.
    """
    count, device = len(images), images.device

    def uniform(half_range: float) -> Tensor:
        return (2 * torch.rand(count, device=device) - 1) * half_range

    mirror = torch.where(torch.rand(count, device=device) < 0.5, -1.0, 1.0)
    angle, scale = uniform(0.2), 1 + uniform(0.12)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [cos * mirror, -sin, uniform(0.1), sin * mirror, cos, uniform(0.1)]
    with torch.autocast(device.type, enabled=False):  # bf16 coordinates would be pixels off
        grid = F.affine_grid(torch.stack(rows, dim=1).view(count, 2, 3), list(images.shape), align_corners=False)
        varied = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness, contrast = uniform(0.4), 1 + uniform(0.3)
    varied = varied * contrast[:, None, None, None] + brightness[:, None, None, None]
    return varied.contiguous(memory_format=torch.channels_last)


def erase_rectangles(images: Tensor, probability: float) -> Tensor:
    """Set a random rectangle to zero (the mean colour) in a share of the images; (B, 3, S, S), normalised.

    Random erasing, Zhong et al. 2020: 2 to 20% of the image (theirs: up to 40%), its aspect between .3 and 3.3.
    """
    count, side, device = len(images), images.shape[-1], images.device
    area, aspect, centre_x, centre_y, chance = torch.rand(5, count, device=device)
    area = _ERASED_SHARE[0] + area * (_ERASED_SHARE[1] - _ERASED_SHARE[0])
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** aspect  # as often tall as wide
    half_width, half_height = (area * aspect).sqrt().clamp(max=1) / 2, (area / aspect).sqrt().clamp(max=1) / 2
    # The whole rectangle lies in the image.
    centre_x = half_width + centre_x * (1 - 2 * half_width)
    centre_y = half_height + centre_y * (1 - 2 * half_height)
    middle = (torch.arange(side, device=device) + 0.5) / side
    in_columns = (middle - centre_x[:, None]).abs() <= half_width[:, None]
    in_rows = (middle - centre_y[:, None]).abs() <= half_height[:, None]
    erased = in_rows[:, :, None] & in_columns[:, None, :] & (chance < probability)[:, None, None]
    return images.masked_fill(erased[:, None], 0.0)
