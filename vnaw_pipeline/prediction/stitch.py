"""Window answers to frame answers: every frame once, overlapping windows averaged.

`N` frames of a bank, `C` outputs of all tasks of a run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vnaw_pipeline.config import PredictConfig, WindowConfig
from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.features.views import PLAIN
from vnaw_pipeline.processes import put
from vnaw_pipeline.stages import Bar
from vnaw_pipeline.tasks import Task, output_columns
from vnaw_pipeline.windows.batches import gather_view
from vnaw_pipeline.windows.plan import plan_windows, window_rows

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Embeddings (U, D) and valid (U,) of frames and their places (B, P) in windows -> logits (B, P, C)."""


@torch.inference_mode()
def stitch_predictions(
    forward: Forward,
    bank: FeatureBank,
    tasks: Sequence[Task],
    windows: WindowConfig,
    config: PredictConfig,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    reduce_sum: Callable[[Tensor], Tensor] = lambda total: total,
    bar: Bar | None = None,
) -> Tensor:
    """Mean over windows of what `predictions_of` makes of every frame of the bank, float32 (N, C).

    Each process takes windows in a row; `reduce_sum` adds up their tensors. Rows of frames that are not valid are what
    the model made of an empty place; fill them with `fill_gaps`.
    """
    plan = plan_windows(bank.num_frames.cpu(), windows.window_frames, windows.predict_stride)
    device, first = bank.device, bank.first.cpu()
    total = torch.zeros(bank.zero_row + 1, sum(len(task.outputs) for task in tasks), device=device)
    counts = torch.zeros(bank.zero_row + 1, device=device)
    mine = torch.arange(len(plan)).tensor_split(num_processes)[process_index]
    for chosen in torch.split(mine, config.batch_windows) if len(mine) else ():  # more processes than windows
        rows = window_rows(plan.select(chosen), first, windows.window_frames, bank.zero_row)
        frames, places = torch.unique(rows, return_inverse=True)  # windows overlap
        valid = bank.valid.index_select(0, put(frames, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = forward(gather_view(bank, PLAIN, frames), valid, put(places, device))
        predictions = predictions_of(logits.float(), tasks)
        flat = put(rows.flatten(), device)
        total.index_add_(0, flat, predictions.flatten(0, 1))
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))
        if bar is not None:
            bar.advance(len(chosen))
    total, counts = reduce_sum(total), reduce_sum(counts)
    return total[:-1] / counts[:-1, None]


def predictions_of(logits: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Class probabilities, valence and arousal in [-1, 1], probabilities of action units; (..., C) -> (..., C)."""
    parts = []
    for task, columns in zip(tasks, output_columns(tasks).values(), strict=True):
        of_task = logits[..., columns]
        if task.kind == "classes":
            parts.append(of_task.softmax(dim=-1))
        else:
            parts.append(of_task.tanh() if task.kind == "affect" else of_task.sigmoid())
    return torch.cat(parts, dim=-1)
