"""`fit()`, the only training loop: the recipes of faces, frames and windows all run through it.

It owns the optimiser, the learning-rate curve, mixed precision, several processes, checkpoints and going on after a
kill. What a batch is, what the loss is and how an epoch is scored are arguments.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from pydantic import ValidationError
from torch import Tensor, nn

from vnaw_pipeline.checkpoints import load_tensors, save_tensors
from vnaw_pipeline.config import PipelineConfig
from vnaw_pipeline.errors import CheckpointError, ConfigError, DataError
from vnaw_pipeline.processes import (
    agree,
    give_back_freed_memory,
    keep_freed_memory,
    meet,
    process_state,
    sum_over_processes,
)
from vnaw_pipeline.provenance import differences, flat
from vnaw_pipeline.runs import RunFolder, lasting_settings
from vnaw_pipeline.stages import progress_bar
from vnaw_pipeline.training.depthwise import quicken_depthwise

Batch = TypeVar("Batch")
SCORE = "macro_f1"
"""The metric that chooses the best epoch where a recipe names no other."""
_MODEL, _AVERAGE, _OPTIMISER, _MEMORY = "model.", "average.", "optimiser.", "memory."


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a model is optimised: AdamW, linear warm-up, cosine to zero."""

    epochs: int
    steps_per_epoch: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    max_grad_norm: float | None
    precision: str
    tracker: str | None
    seed: int
    ema_decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Batch]):
    """What is trained on what.

    `steps(epoch)` gives this process's share of each optimiser step of an epoch, as a list of batches that are run one
    after the other; every process gets as many steps and batches as the others. It is seeded by the epoch alone.
    `objective(model, batch, progress)` is the loss summed over the batch's units and their number, so that a step's
    gradient is the mean over its units, however they are split. `evaluate(model)` scores an epoch; `score` in it
    chooses the best one, the higher the better. `header` describes the model in its checkpoints. `memory` are tensors
    that the objective changes from step to step; they go into the last checkpoint. `parameter_groups` are the
    optimiser's, each with its own `lr_scale`; None: all parameters alike. A module whose parameters all lost their
    gradient stays in eval mode, so that its running statistics stay too.
    """

    model: nn.Module
    steps: Callable[[int], Iterable[list[Batch]]]
    objective: Callable[[nn.Module, Batch, float], tuple[Tensor, Tensor]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    header: Mapping[str, Any]
    label: str
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    parameter_groups: list[dict[str, Any]] | None = None
    score: str = SCORE


@dataclass
class _Progress:
    """What is known after an epoch: how many are done, every epoch's figures, the best score."""

    epochs_done: int
    history: list[dict[str, Any]]
    best_score: float
    scaler: dict[str, Any] | None = None


def begin_run(
    run_dir: Path, config: PipelineConfig, sections: set[str], overwrite: bool, inputs: Mapping[str, Any]
) -> RunFolder:
    """The run folder for `fit`, made or gone on with as `RunFolder.begin` does it, once all processes agree on the
    config's `sections` and on `inputs`, the digests of what is learnt from.

    Raises:
        CheckpointError: the folder holds another run. ProcessError: processes that differ.
    """
    agree({**config.model_dump(mode="json", include=sections), **inputs})
    folder = RunFolder(run_dir)
    if process_state().is_main_process:
        folder.begin(config, sections, overwrite)
    meet()
    return folder


def fit(recipe: Recipe[Batch], optimisation: Optimisation, folder: RunFolder) -> list[dict[str, Any]]:
    """Train, from the last checkpoint in `folder` if there is one; the figures of every epoch.

    After each epoch `last.safetensors` (all that a continuation needs), `best.safetensors` (the model, or its moving
    average where there is one) and `metrics.jsonl` are written whole. All randomness is seeded by epoch and process,
    so a run that was killed and goes on has the same losses as one that was not.

    Raises:
        CheckpointError: the last checkpoint is of another model or of other data.
        DataError: the loss of an epoch is not a number, or infinite.
    """
    accelerator = _open_accelerator(optimisation, folder.path)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        quicken_depthwise(recipe.model)
    recipe.model.to(accelerator.device)  # before its average and its optimiser's state are made
    groups = recipe.parameter_groups or [{"params": list(recipe.model.parameters())}]
    optimiser = torch.optim.AdamW(groups, lr=optimisation.learning_rate, weight_decay=optimisation.weight_decay)
    average = copy.deepcopy(recipe.model).requires_grad_(False) if optimisation.ema_decay is not None else None
    progress = _resume(folder.last, recipe, optimiser, average)
    agree({"epochs_done": progress.epochs_done})  # a run folder that is not the same one in all of them
    # The optimiser's state is where it belongs; moved along, its counts of steps would be asked for in every step.
    model, optimiser = accelerator.prepare(recipe.model, optimiser, device_placement=[True, False])
    if accelerator.scaler is not None and progress.scaler is not None:
        accelerator.scaler.load_state_dict(progress.scaler)
    remaining = (optimisation.epochs - progress.epochs_done) * optimisation.steps_per_epoch
    with (
        torch.random.fork_rng(devices=[]),
        progress_bar(recipe.label, remaining, "steps", accelerator.is_main_process) as bar,
    ):
        for epoch in range(progress.epochs_done, optimisation.epochs):
            started = time.monotonic()
            torch.manual_seed(seed_of(optimisation.seed, epoch, accelerator.process_index))
            _train_mode(model)
            loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
            units = torch.zeros_like(loss_sum)
            for step, batches in enumerate(recipe.steps(epoch)):
                rate = learning_rate_share(epoch * optimisation.steps_per_epoch + step, optimisation)
                for group in optimiser.param_groups:
                    group["lr"] = optimisation.learning_rate * rate * group.get("lr_scale", 1.0)
                step_loss, step_units = _step(accelerator, recipe, optimisation, model, optimiser, batches, epoch)
                loss_sum += step_loss
                units += step_units
                if average is not None and optimisation.ema_decay is not None:
                    steps_before = epoch * optimisation.steps_per_epoch + step
                    move_average(average, accelerator.unwrap_model(model), optimisation.ema_decay, steps_before)
                bar.advance(1)
            train_loss = float(sum_over_processes(loss_sum) / sum_over_processes(units).clamp(min=1))
            _refuse_diverged(train_loss, epoch, optimisation, folder)
            model.eval()
            # Without the wrapper of mixed precision: an epoch is scored as predictions are made.
            kept = accelerator.unwrap_model(model, keep_fp32_wrapper=False) if average is None else average
            kept.eval()
            for buffer in kept.buffers():  # running statistics: each process has seen other batches
                broadcast(buffer)
            give_back_freed_memory()
            scores = recipe.evaluate(kept)
            give_back_freed_memory()
            row = {"epoch": epoch, "train_loss": train_loss, **scores, "seconds": time.monotonic() - started}
            progress.history.append(row)
            progress.epochs_done = epoch + 1
            accelerator.log({key: value for key, value in row.items() if key != "epoch"}, step=epoch)
            if accelerator.is_main_process:
                tensors = _training_state(recipe, accelerator.unwrap_model(model), optimiser, average)
                _save(folder, recipe, kept.state_dict(), tensors, progress, accelerator.scaler)
            progress.best_score = max(progress.best_score, scores[recipe.score])
            meet()
    if accelerator.is_main_process:
        folder.write_metrics(progress.history)
    for tracker in accelerator.trackers:  # end_training() would also part the processes, who have more to do
        tracker.finish()
    return progress.history


def _refuse_diverged(train_loss: float, epoch: int, optimisation: Optimisation, folder: RunFolder) -> None:
    if not math.isfinite(train_loss):
        kept = f"{folder.last} has the epochs before" if epoch else "nothing was written"
        raise DataError(
            f"The training loss became {train_loss} in epoch {epoch}, at learning rate {optimisation.learning_rate:g} "
            f"in {optimisation.precision}; {kept}. Lower the learning rate, or train in fp32, in a new run folder."
        )


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def learning_rate_share(step: int, optimisation: Optimisation) -> float:
    """Factor of the learning rate at a step: linear from 0 over the warm-up, then half a cosine down to 0."""
    total = optimisation.epochs * optimisation.steps_per_epoch
    warmup = round(optimisation.warmup_share * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, epoch, process); near ones give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def split_step(units: Tensor, process_index: int, num_processes: int, accumulation: int) -> list[Tensor]:
    """One process's share of a step's units (B,), which stand together, in `accumulation` parts that differ by at most
    one unit.

    Raises:
        ConfigError: fewer units than parts.
    """
    parts = num_processes * accumulation
    if len(units) < parts:
        raise ConfigError(
            f"A step of {len(units)} cannot be split over {num_processes} processes x {accumulation} passes; use fewer "
            "processes or a lower train.accumulation, or, where there is enough to learn from, larger steps."
        )
    return list(units.tensor_split(parts)[process_index * accumulation : (process_index + 1) * accumulation])


def _open_accelerator(optimisation: Optimisation, project_dir: Path) -> Accelerator:
    if optimisation.precision == "fp16" and process_state().device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; on a CPU use bf16 or fp32.")
    # Accelerate keeps the mixed precision of the first run in the process for good; another run may want another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if optimisation.precision == "fp32" else optimisation.precision,
        log_with=optimisation.tracker,
        project_dir=project_dir,
    )
    accelerator.init_trackers("tracker")
    return accelerator


def _step(
    accelerator: Accelerator,
    recipe: Recipe[Batch],
    optimisation: Optimisation,
    model: nn.Module,
    optimiser: Any,
    batches: list[Batch],
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """One optimiser step; the loss sum and the number of units of this process."""
    loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    units = torch.zeros_like(loss_sum)
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):  # one exchange of gradients a step
            with accelerator.autocast():
                loss, count = recipe.objective(model, batch, epoch / optimisation.epochs)
            accelerator.backward(loss)
        loss_sum += loss.detach()
        units += count
    if optimisation.precision == "fp16":
        accelerator.unscale_gradients(optimiser)
    # Gradients are sums over units, averaged over processes; make them the mean over all units of the step.
    scale = accelerator.num_processes / sum_over_processes(units.clone()).clamp(min=1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
    if optimisation.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), optimisation.max_grad_norm)
    optimiser.step()
    optimiser.zero_grad()
    return loss_sum, units


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, steps_before: int) -> None:
    """Move the average of a model's weights and running statistics on by one step, in place.

    In the first steps the decay is smaller, (1 + n) / (10 + n) after n of them, so that a short training does not keep
    the weights it started from. Whole numbers (a Swin's positions, a count of batches) are the model's own.
    """
    share = max(1 - decay, 9 / (10 + steps_before))
    pairs = list(zip(_tensors(average), _tensors(model), strict=True))
    averaged = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([kept for kept, _ in averaged], [current for _, current in averaged], share)
    for kept, current in pairs:
        if not kept.is_floating_point():
            kept.copy_(current)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _training_state(
    recipe: Recipe[Batch], model: nn.Module, optimiser: Any, average: nn.Module | None
) -> dict[str, Tensor]:
    """All tensors that a continuation needs, by prefixed names."""
    tensors = {f"{_MODEL}{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"{_MEMORY}{key}": value for key, value in recipe.memory.items()}
    if average is not None:
        tensors |= {f"{_AVERAGE}{key}": value for key, value in average.state_dict().items()}
    names = _optimised(model, optimiser)
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{_OPTIMISER}{names[index]}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def _optimised(model: nn.Module, optimiser: Any) -> list[str]:
    """Names of the optimiser's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimiser.param_groups for parameter in group["params"]]


def _save(
    folder: RunFolder,
    recipe: Recipe[Batch],
    kept: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    progress: _Progress,
    scaler: Any,
) -> None:
    row = progress.history[-1]
    if row[recipe.score] > progress.best_score:
        save_tensors(folder.best, kept, {**recipe.header, "epoch": row["epoch"], recipe.score: row[recipe.score]})
    header = {
        **recipe.header,
        "epochs_done": progress.epochs_done,
        "history": progress.history,
        "best_score": max(progress.best_score, row[recipe.score]),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    save_tensors(folder.last, tensors, header)
    folder.write_metrics(progress.history)


def _resume(
    path: Path, recipe: Recipe[Batch], optimiser: torch.optim.Optimizer, average: nn.Module | None
) -> _Progress:
    if not path.exists():
        return _Progress(0, [], -math.inf)
    tensors, header = load_tensors(path)
    found, wanted = {key: header.get(key) for key in recipe.header}, dict(recipe.header)
    with suppress(ValidationError, KeyError):  # what has come into the config since has its default
        sections = set(recipe.header["config"])
        for each in (found, wanted):
            each["config"] = lasting_settings(PipelineConfig.model_validate(each["config"]), sections)
    if unlike := differences(flat(found), flat(wanted)):
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(unlike)[:500]}. Give a new run folder, or --overwrite."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    place_of = {name: place for place, name in enumerate(_optimised(recipe.model, optimiser))}
    state: dict[int, dict[str, Tensor]] = {}
    try:
        recipe.model.load_state_dict(part(_MODEL))
        if average is not None:
            average.load_state_dict(part(_AVERAGE))
        for key, value in part(_OPTIMISER).items():
            name, _, what = key.rpartition(".")
            state.setdefault(place_of[name], {})[what] = value
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} was not written by this version of the program. Give a new run folder, or --overwrite."
        ) from error
    for key, value in part(_MEMORY).items():
        recipe.memory[key].copy_(value)
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return _Progress(header["epochs_done"], header["history"], header["best_score"], header["scaler"])
