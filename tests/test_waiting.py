"""A training step on a GPU never makes the host wait: run on tensors that have shapes and no values.

PyTorch's fake tensors of a device `cuda` need no GPU. What has to know a value (`.item()`, a shape that depends on
data, picking by a mask) fails on them, as do operations between host and device; copies are looked at one by one. The
backward pass needs a real GPU's streams, so the whole step, with gradients and optimiser, runs on fake tensors
of the CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vnaw_pipeline.config import PipelineConfig, PretrainConfig
from vnaw_pipeline.features.bank import FeatureBank
from vnaw_pipeline.features.encoder import Encoder, Preprocessing
from vnaw_pipeline.temporal import TemporalModel
from vnaw_pipeline.training.faces import _objective as _learn_from_faces
from vnaw_pipeline.training.images import ImageBatch, label_objective
from vnaw_pipeline.training.labels import LabelledBank
from vnaw_pipeline.training.loop import Recipe, _step
from vnaw_pipeline.training.windows import Drawing, _Learning, _objective, training_plan

from .test_training import optimisation

WIDTH = 6


class Copies(TorchDispatchMode):
    """Copies between host and device for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_for: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source, target = (args[0], found) if func is torch.ops.aten._to_copy.default else (args[1], args[0])
            asynchronous = (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])
            if source.device != target.device and (target.device.type == "cpu" or not asynchronous):
                self.waited_for.append(f"{source.device} to {target.device}: {tuple(source.shape)}")
        return found


def labelled_bank(config: PipelineConfig) -> LabelledBank:
    """Two videos of 90 frames, labelled for every task of the config, some frames for none."""
    generator = torch.Generator().manual_seed(0)
    rows = 181
    valid = torch.rand(rows, generator=generator) < 0.9
    valid[-1] = False
    views = {view: torch.randn(rows, WIDTH, generator=generator).half() for view in ("mirror", "erase0")}
    bank = FeatureBank(["a", "b"], torch.zeros(rows, WIDTH).half(), valid, torch.tensor([0, 90, 180]), views)
    every = {
        "expr8": torch.randint(-1, 8, (rows,), generator=generator),
        "va": torch.rand(rows, 2, generator=generator),
        "au": torch.randint(-1, 2, (rows, 12), generator=generator).to(torch.int8),
    }
    return LabelledBank(bank, {task.name: every[task.name] for task in config.tasks}).learnable()


def waits_of_a_step(
    config: PipelineConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    bank_on_device: bool = True,
    spoil: Callable[[Tensor], Any] = lambda total: None,
) -> list[str]:
    """Draw a step's windows on the host and run the step on fake tensors; the copies that were waited for."""
    train = labelled_bank(config)
    draws = next(Drawing(train, training_plan(train, config), config).steps(0))
    learning = _Learning.of(train, config)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # fake tensors cannot be pinned
    with FakeTensorMode() as fake, Copies() as copies:

        def objective_on(device: str) -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]]]:
            def there(real: Any) -> Any:
                move = partial(Tensor.to, device=device, non_blocking=True)
                return tree_map_only(Tensor, lambda tensor: move(fake.from_tensor(tensor)), real)

            views = {name: fake.from_tensor(train.bank.view(name)) for name in ("plain", "mirror", "erase0")}
            views = there(views) if bank_on_device else views
            bank = FeatureBank(["a", "b"], views.pop("plain"), there(train.bank.valid), there(train.bank.first), views)
            labelled = LabelledBank(bank, there(train.labels))
            known = _Learning(there(learning.class_weights), there(learning.unit_weights), there(learning.memory))
            with torch.device(device):
                model = TemporalModel(WIDTH, sum(len(task.outputs) for task in config.tasks), config.temporal)

            def objective(model: nn.Module, draw: Any, progress: float) -> tuple[Tensor, Tensor]:
                total, count = _objective(labelled, config, known, model, draw, progress)
                spoil(total)
                return total, count

            return model, objective

        host_draws = tree_map_only(Tensor, fake.from_tensor, draws)
        model, objective = objective_on("cuda")
        for draw in host_draws:
            objective(model, draw, 0.5)
        model, objective = objective_on("cpu")
        recipe = Recipe(
            model=model, steps=lambda _: [], objective=objective, evaluate=lambda _: {}, header={}, label=""
        )
        accelerator: Any = SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            autocast=nullcontext,
            backward=lambda loss: loss.backward(),
            no_sync=lambda model: nullcontext(),
        )
        # AdamW counts its steps on the host, in a tensor, which a fake one cannot.
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        _step(accelerator, recipe, optimisation(1, max_grad_norm=1.0), model, optimiser, host_draws, epoch=0)
    return copies.waited_for


def config_of(task: str = "expr8", **sections: Any) -> PipelineConfig:
    base: dict[str, Any] = {
        "task": task,
        "windows": {"window_frames": 20, "train_stride": 10, "predict_stride": 10},
        "temporal": {"width": 8, "layers": 1, "heads": 2, "feed_forward": 8},
        "train": {"batch_windows": 6, "accumulation": 2, "sampling": "uniform"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return PipelineConfig.model_validate(base)


OBJECTIVES = [
    {"objective": objective, "level": level, "weighting": weighting}
    for objective in ("ce", "focal", "gce", "elr", "bootstrap")
    for level in ("window", "frame")
    for weighting in ("class", "naw")
]
OTHERS: dict[str, dict[str, Any]] = {
    "consistency": {"loss": {"consistency": 0.4}},
    "consistency of frames": {"loss": {"consistency": 0.4, "level": "frame", "label_smoothing": 0.1}},
    "views": {"windows": {"views": ["plain", "erase0", "mirror"]}},
    "frames masked": {"windows": {"random_masking": {"mode": "frames"}}},
    "elements masked": {"windows": {"random_masking": {"mode": "elements"}, "skip": {"mode": "resample"}}},
    "positions": {"temporal": {"position": "sinusoidal", "tcn_blocks": 1, "causal": True, "drop_path": 0.2}},
    "rotary": {"temporal": {"position": "rotary"}},
    "joint": {"further_tasks": {"va": 1.0, "au": 0.5}, "units_loss": {"objective": "focal", "weighting": "balanced"}},
    "affect": {"task": "va"},
    "units": {"task": "au"},
}


@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: "-".join(loss.values()))
def test_no_objective_waits(loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of_a_step(config_of(loss=loss), monkeypatch) == []


@pytest.mark.parametrize("bank_on_device", [True, False], ids=["bank on the device", "bank on the host"])
@pytest.mark.parametrize("name", OTHERS)
def test_no_variant_waits(name: str, bank_on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waits_of_a_step(config_of(**OTHERS[name]), monkeypatch, bank_on_device=bank_on_device) == []


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(spoil: Callable[[Tensor], Any]) -> list[str]:
        return waits_of_a_step(config_of(), monkeypatch, spoil=spoil)

    with pytest.raises(DataDependentOutputException):
        spoiled(lambda total: total.item())
    with pytest.raises(DynamicOutputShapeException):
        spoiled(lambda total: total[None][total[None] > 0])
    assert spoiled(lambda total: total.cpu()) == ["cuda:0 to cpu: ()"] * 2
    copies = spoiled(lambda total: torch.ones(3).to("cuda"))
    assert copies == ["cpu to cuda:0: (3,)"] * 4, "on either device, twice"


IMAGE_LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "NLA": {"weighting": "naw", "consistency": 0.4},
    "class weights": {"weighting": "class"},
    "ELR": {"objective": "elr"},
    "transition": {"transition": [[0.3 if i == j else 0.1 for j in range(8)] for i in range(8)]},
}


@pytest.mark.parametrize("loss", IMAGE_LOSSES.values(), ids=IMAGE_LOSSES)
def test_the_encoder_recipes_do_not_wait(loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loss, with a teacher of other colours, detail and size; copies of batches are looked at above."""
    settings = PretrainConfig.model_validate({"loss": loss, "sampling": "uniform"})
    targets = torch.eye(8)[torch.arange(6)]
    known = label_objective(settings.loss, targets)
    with FakeTensorMode() as fake, Copies() as copies:

        def there(tensor: Tensor) -> Tensor:
            return fake.from_tensor(tensor).to("cuda", non_blocking=True)

        known = replace(
            known,
            class_weights=there(known.class_weights) if known.class_weights is not None else None,
            transition=there(known.transition) if known.transition is not None else None,
            memory={name: there(of) for name, of in known.memory.items()},
        )
        with torch.device("cuda"):
            student, model = (timm.create_model("test_efficientnet", num_classes=8) for _ in range(2))
            head = nn.Linear(256, 8)
        model.reset_classifier(0)
        seen = Preprocessing(input_px=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
        taught = Preprocessing(
            input_px=48, mean=(0.4,) * 3, std=(0.3,) * 3, interpolation="bicubic", grey=True, detail_px=32
        )
        teacher = Encoder(
            name="", model_args={}, model=model, preprocessing=taught, embedding_dim=256, weights_digest="", head=head
        )
        images = torch.zeros(6, 64, 64, 3, dtype=torch.uint8)
        batch = ImageBatch(*(there(part) for part in (images, targets, torch.arange(6))))
        copies.waited_for.clear()  # of making the models
        _learn_from_faces(seen, settings, teacher, known, student, batch, 0.5)
    assert copies.waited_for == []
