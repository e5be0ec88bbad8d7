"""The objective of a temporal model that learns one task or several. `B` windows, `P` frames, `C` outputs of all tasks.

A frame may be labelled for any subset of the tasks. Each task's loss is the mean over its own units in an optimiser
step, so that rarely labelled tasks weigh as much as their weight says.
"""

from collections.abc import Mapping

from torch import Tensor

from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.losses.affect import affect_loss
from vnaw_pipeline.losses.expression import expression_loss
from vnaw_pipeline.losses.precision import at_least_float32
from vnaw_pipeline.losses.units import units_loss
from vnaw_pipeline.tasks import IGNORE_LABEL, Task, TaskName, output_columns


def joint_loss(
    logits: Tensor,
    labels: Mapping[TaskName, Tensor],
    valid: Tensor,
    config: PipelineConfig,
    progress: float,
    step_units: Mapping[TaskName, int],
    *,
    class_weights: Tensor | None = None,
    memory: Tensor | None = None,
    unit_weights: Tensor | None = None,
    mirrored_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a part of an optimiser step, to be divided by the units that the main task has in the whole step.

    After the division it is main mean + sum over further tasks of weight * mean, however the step is split over
    forward passes and processes, but for the concordance of valence and arousal, which is that of each part, weighted
    by its frames.

    Args:
        logits: (B, P, C), the outputs of `config.tasks` side by side.
        labels: per task (B, P) or (B, P, outputs). A frame that is not valid is not used.
        valid: bool (B, P).
        progress: share of training done, in [0, 1].
        step_units: `count_units` of each task over the whole step.
        class_weights, memory: as of `expression_loss`.
        unit_weights: (U, 2), as of `units_loss`.
        mirrored_logits: (B, P, C), for the mirror images, with `loss.consistency`.

    Returns:
        loss sum and number of the main task's units in this part, both scalars.
    """
    columns = output_columns(config.tasks)
    logits = at_least_float32(logits)

    def loss_of(task: Task) -> tuple[Tensor, Tensor]:
        of_task, truth = logits[..., columns[task.name]], labels[task.name]
        if task.kind == "classes":
            return expression_loss(
                of_task,
                truth,
                valid,
                config.loss,
                progress,
                class_weights=class_weights,
                memory=memory,
                mirrored_logits=None if mirrored_logits is None else mirrored_logits[..., columns[task.name]],
            )
        truth = truth.masked_fill(~valid[..., None], task.unlabelled)
        if task.kind == "units":
            return units_loss(of_task, truth, config.units_loss, unit_weights)
        count = (~truth.isnan().any(dim=-1)).sum()
        return count * affect_loss(of_task.tanh().flatten(0, 1), truth.flatten(0, 1)), count

    main, *further = config.tasks
    total, units = loss_of(main)
    for task in further:
        share = max(step_units[main.name], 1) / max(step_units[task.name], 1)
        total = total + config.further_tasks[task.name] * share * loss_of(task)[0]
    return total, units


def annotated(labels: Tensor, task: Task) -> Tensor:
    """Which numbers of a task's labels are annotated, bool of their shape."""
    return ~labels.isnan() if task.kind == "affect" else labels != IGNORE_LABEL


def count_units(task: Task, labels: Tensor, config: PipelineConfig) -> int:
    """What a task's loss is a mean over, in windows (B, P) or (B, P, outputs): windows or frames with an expression,
    as the level says; frames with valence and arousal; annotated action units of frames."""
    counted = annotated(labels, task)
    if task.kind == "affect":
        counted = counted.all(dim=-1)
    elif task.kind == "classes" and config.loss.level == "window":
        counted = counted.sum(dim=1) > 0  # a third of the time of `any`
    return int(counted.sum())
