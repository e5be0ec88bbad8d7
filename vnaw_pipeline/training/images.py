"""What both encoder recipes share: reading ahead, changing images without changing what they show, and the objective.

`B` images, `S` side in pixels, `K` classes. Draws come from torch's global generator, which `fit` seeds by
epoch and process.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnaw_pipeline.config import FinetuneConfig, ImageLossConfig, PretrainConfig
from vnaw_pipeline.errors import ConfigError
from vnaw_pipeline.losses.images import image_loss
from vnaw_pipeline.losses.objectives import class_weights, jensen_shannon, prediction_memory, update_memory
from vnaw_pipeline.processes import process_state, sum_over_processes
from vnaw_pipeline.training.loop import Optimisation, split_step

Chosen = TypeVar("Chosen")
Batch = TypeVar("Batch")


class ImageBatch(NamedTuple):
    """Images uint8 (B, S, S, 3); targets float32 (B, K), zeros where there is no label; each image's place among all
    that are learnt from, int64 (B,)."""

    images: Tensor
    targets: Tensor
    place: Tensor


@dataclass(frozen=True)
class LabelObjective:
    """The configured loss of images against their labels, with what it knows of all N of them."""

    config: ImageLossConfig
    class_weights: Tensor | None
    transition: Tensor | None
    memory: dict[str, Tensor]
    """For early-learning regularisation: 'predictions' (N, K), each image's moving average; else empty."""

    def __call__(
        self, model: nn.Module, images: Tensor, batch: ImageBatch, progress: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the loss over the labelled images (B, 3, S, S) and their number; the model's outputs (B, K or more),
        whose first K columns are the logits."""
        # An image and its mirror image go through the model together: one pass over twice the batch takes less time.
        seen = torch.cat([images, images.flip(-1)]) if self.config.consistency else images
        outputs, *mirrored = model(seen).split(len(images))
        logits = outputs[:, : batch.targets.shape[1]]
        rows = update_memory(self.memory["predictions"], batch.place, logits) if self.memory else None
        total, count = image_loss(
            logits,
            batch.targets,
            self.config,
            progress,
            class_weights=self.class_weights,
            memory=rows,
            transition=self.transition,
        )
        if self.config.consistency:
            divergence = jensen_shannon(logits, mirrored[0][:, : logits.shape[1]])
            divergence = torch.where(batch.targets.sum(dim=1) > 0, divergence, 0).sum()
            total = (1 - self.config.consistency) * total + self.config.consistency * divergence
        return total, count, outputs


def label_objective(config: ImageLossConfig, targets: Tensor) -> LabelObjective:
    """The objective for a set of targets (N, K).

    Raises:
        ConfigError: early-learning regularisation in several processes, each of which would remember a part; a
            transition of another number of classes.
    """
    if config.transition is not None and len(config.transition) != targets.shape[1]:
        raise ConfigError(
            f"The config has a transition of {len(config.transition)} classes, and there are {targets.shape[1]}."
        )
    weights = class_weights(targets.sum(dim=0), config.weighting)
    transition = None if config.transition is None else torch.tensor(config.transition)
    weights, transition = (None if of is None else of.to(process_state().device) for of in (weights, transition))
    return LabelObjective(config, weights, transition, prediction_memory(config, *targets.shape))


def encoder_optimisation(settings: PretrainConfig | FinetuneConfig, steps_per_epoch: int, seed: int) -> Optimisation:
    """How the config optimises an encoder."""
    return Optimisation(
        epochs=settings.epochs,
        steps_per_epoch=steps_per_epoch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_share=settings.warmup_share,
        max_grad_norm=1.0,
        precision=settings.precision,
        tracker=None,
        seed=seed,
        ema_decay=settings.ema_decay,
    )


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


def own_batches(drawn: Tensor, batch: int) -> Iterator[Tensor]:
    """This process's part of each optimiser step of an epoch's draws (N,)."""
    state = process_state()
    for step in drawn.tensor_split(-(-len(drawn) // batch)):
        yield split_step(step, state.process_index, state.num_processes, accumulation=1)[0]


def model_outputs(count: int, num_outputs: int, batch: int, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """A model's outputs for each of `count` images, float32 (N, outputs), worked out by one process and known to all.

    `answer` gives them for the images at some places, (B,) -> (B, outputs).
    """
    state = process_state()
    outputs = torch.zeros(count, num_outputs, device=state.device)  # those of other processes are added
    mine = torch.arange(count)[state.process_index :: state.num_processes]
    for places in torch.split(mine, batch) if len(mine) else ():  # more processes than images
        outputs[places.to(state.device)] = answer(places).float()
    return sum_over_processes(outputs).cpu()


def vary_images(images: Tensor) -> Tensor:
    """Mirror half of the images, and turn, scale, shift, brighten and contrast each a little; (B, 3, S, S), normalised.

    Drawn in float32 on the images' device. Bicubic, which blurs small images less than bilinear.
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
        varied = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
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
