"""The image encoder: a timm model, its weights, and the preprocessing that belongs to it.

Shapes: `B` frames of a batch, `S` input side in pixels, `D` embedding width.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from pydantic import ValidationError
from timm.data.config import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from vnaw_pipeline.checkpoints import load_tensors, read_header
from vnaw_pipeline.config import EncoderConfig
from vnaw_pipeline.crops.video import Rgb
from vnaw_pipeline.errors import CheckpointError, ConfigError, listing
from vnaw_pipeline.features import hybrid  # noqa: F401 -- timm knows its model from here on
from vnaw_pipeline.features.fingerprints import lasting_args
from vnaw_pipeline.provenance import differences, digest_bytes

_LOG = logging.getLogger(__name__)
WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
_LUMA = (0.299, 0.587, 0.114)
_CV2_INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What an encoder was trained to see; the fields are those of EncoderConfig, resolved.

    There is no centre crop as timm does it: a face crop has no border to cut away.
    """

    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    grey: bool = False
    detail_px: int | None = None
    face_region: tuple[float, float, float, float] | None = None

    def of_crop(self, rgb: Rgb) -> Rgb:
        """Bring an aligned crop (H, W, 3) to (S, S, 3): its face region, then as `of_face`."""
        if self.face_region is not None:
            (height, width), (x0, y0, x1, y1) = rgb.shape[:2], self.face_region
            rgb = rgb[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)]
        return self.of_face(rgb)

    def of_face(self, rgb: Rgb) -> Rgb:
        """Bring a picture that is framed as the encoder's training pictures are to (S, S, 3)."""
        if self.grey:
            rgb = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.uint8, copy=False)
        if self.detail_px is not None and max(rgb.shape[:2]) > self.detail_px:
            rgb = self._resize(rgb, self.detail_px)
        return self._resize(rgb, self.input_px)

    def _resize(self, rgb: Rgb, side: int) -> Rgb:
        """Shrinking averages areas so that it does not alias."""
        height, width = rgb.shape[:2]
        if height == width == side:
            return rgb
        shrinks = max(height, width) > side
        method = cv2.INTER_AREA if shrinks else _CV2_INTERPOLATION.get(self.interpolation, cv2.INTER_CUBIC)
        return cv2.resize(rgb, (side, side), interpolation=method).astype(np.uint8, copy=False)

    def from_normalised(self, images: Tensor, given: "Preprocessing") -> Tensor:
        """Images normalised for another encoder, (B, 3, S, S), brought to this one's statistics, colours, detail and
        side."""
        mean, std, own_mean, own_std, luma = (
            _constant(values, images.device).view(3, 1, 1)
            for values in (given.mean, given.std, self.mean, self.std, _LUMA)
        )
        images = images * std + mean
        if self.grey and not given.grey:
            images = (images * luma).sum(dim=1, keepdim=True).expand_as(images)
        images = (images - own_mean) / own_std
        if self.detail_px is not None and self.detail_px < min(given.detail_px or given.input_px, given.input_px):
            images = _resized(images, self.detail_px)
        return _resized(images, self.input_px)

    def recorded(self) -> dict[str, Any]:
        """As plain values, for a weights file's header and a store's fingerprint."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), on the device the frames are on."""
        mean, std = (_constant(values, frames.device) * 255 for values in (self.mean, self.std))
        return ((frames.float() - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _constant(values: Sequence[float], device: torch.device) -> Tensor:
    """A vector on a device that the host need not wait for, as it would for a copy."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=side, mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A timm model without its head, its preprocessing, and the digest of its weights.

    `head` maps an embedding (B, D) to the logits (B, K) of `outputs`; None where the weights have no head of ours, or
    one that was trained on another `pool` (see `resolve_pool`). `learnt_from` are the recordings it was fine-tuned on.
    """

    name: str
    model_args: dict[str, Any]
    model: nn.Module
    preprocessing: Preprocessing
    embedding_dim: int
    weights_digest: str
    pool: str | None = None
    head: nn.Module | None = None
    outputs: tuple[str, ...] = ()
    learnt_from: tuple[str, ...] = ()

    def fingerprint(self) -> dict[str, Any]:
        """What decides an embedding, for the feature store's attributes."""
        return {
            "encoder": self.name,
            "model_args": lasting_args(self.model_args),
            "weights": self.weights_digest,
            "pool": self.pool,
            **({"learnt_from": list(self.learnt_from)} if self.learnt_from else {}),
            **self.preprocessing.recorded(),
        }


def create_model(config: EncoderConfig, num_classes: int, seed: int = 0) -> nn.Module:
    """Build the timm model of `config`; `num_classes=0` leaves out the head. Weights other than timm's own
    download are the seeded random ones.

    Raises:
        ConfigError: timm does not know the name or an argument, or its weights cannot be had.
    """
    if not timm.is_model(config.name):
        close = timm.list_models(f"*{config.name.split('_')[0]}*")[:8]
        raise ConfigError(f"encoder.name {config.name!r} is not a timm model. Similar: {', '.join(close) or 'none'}.")
    pretrained, pool = config.weights == "pretrained", resolve_pool(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = timm.create_model(
                config.name, pretrained=pretrained, num_classes=num_classes, **config.model_args
            )
            if pool is not None:
                # Not timm's `global_pool` argument: it may move the last norm, which the weights were not trained for.
                model.reset_classifier(num_classes, pool)  # type: ignore[operator]
            _start_small(model)
        except Exception as error:
            if not pretrained or isinstance(error, TypeError | IndexError | AssertionError):
                fault = f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"encoder.model_args {config.model_args} and pool {pool!r} do not fit {config.name} ({fault})."
                ) from error
            raise ConfigError(
                f"The pretrained weights of {config.name} could not be downloaded ({type(error).__name__}). Without "
                "a network, set encoder.weights to a .safetensors file, or to 'untrained' to try the pipeline."
            ) from error
    return model


def _start_small(model: nn.Module) -> None:
    """Give a new head small weights. timm draws those of some convolutional models by the number of outputs: with
    eight, the first answers are far too sure (a loss of 5 instead of 2), and unlearning them spoils the encoder."""
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        nn.init.trunc_normal_(head.weight, std=0.02)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def build_encoder(
    config: EncoderConfig, num_classes: int, seed: int = 0, allow_pickle: bool = False
) -> tuple[nn.Module, Preprocessing, dict[str, Tensor]]:
    """The timm model of `config` with its weights, the preprocessing that belongs to them, and the weights file's
    tensors that the model has no place for (its head, if `num_classes` is 0).

    Raises:
        ConfigError: unknown model or arguments; weights that cannot be downloaded.
        CheckpointError: a weights file that is missing, damaged, a pickle not asked for, or of another model.
    """
    path = find_weights(config.weights) if isinstance(config.weights, Path) else None
    # Before what they record of themselves is used: this checks their digest.
    state, header = load_tensors(path, allow_pickle) if path is not None else ({}, {})
    model = create_model(config, num_classes, seed).to(memory_format=torch.channels_last)  # as `normalise` gives images
    preprocessing = _preprocessing(model, config, header)
    if config.weights == "untrained":
        _LOG.warning(
            "UNTRAINED encoder: %s has random weights; its embeddings say nothing about expressions.", config.name
        )
    if path is None:
        return model, preprocessing, {}
    # Size, detail and region may be chosen anew; other channel statistics would go unnoticed and spoil everything.
    statistics = {key: preprocessing.recorded()[key] for key in ("mean", "std", "grey")}
    wanted = {"encoder": config.name, "model_args": config.model_args, **statistics}
    found = {key: header.get(key, value) for key, value in wanted.items()}
    for each in (found, wanted):
        each["model_args"] = lasting_args(each["model_args"])
    if unlike := differences(found, wanted):
        raise CheckpointError(f"{path} holds another encoder than the config names: {'; '.join(unlike)}.")
    classifier = _classifier_of(model)
    current = model.state_dict()
    head = {key: value for key, value in state.items() if key.startswith(f"{classifier}.")}
    if any(key not in current or current[key].shape != value.shape for key, value in head.items()):
        # The model has no head, or one for other outputs: the file's is left out.
        state = {key: value for key, value in state.items() if key not in head}
        state |= {key: value for key, value in current.items() if key.startswith(f"{classifier}.")}
    else:
        head = {}
    _load_state(model, state, path, config)
    return model, preprocessing, head


def take_over_outputs(model: nn.Module, left_out: Mapping[str, Tensor], num_outputs: int) -> None:
    """Begin the first `num_outputs` outputs of a model's head as a head that `build_encoder` left out has them."""
    head = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            given = next((value for key, value in left_out.items() if key.endswith(f".{name}")), None)
            if given is not None and given.shape[1:] == parameter.shape[1:]:
                parameter[:num_outputs] = given[:num_outputs]


def load_encoder(config: EncoderConfig, seed: int = 0, allow_pickle: bool = False) -> Encoder:
    """Build the encoder and load its weights; the model is without its head, in eval mode, without gradients.

    Raises:
        ConfigError, CheckpointError: as `build_encoder`.
    """
    model, preprocessing, head_state = build_encoder(config, 0, seed, allow_pickle)
    model.eval().requires_grad_(False)
    embedding = _try_forward(model, preprocessing.input_px, config)
    state = model.state_dict()
    parts = [part for name in sorted(state) for part in (name.encode(), _bytes_of(state[name]))]
    recorded = recorded_of(config)
    outputs = tuple(recorded.get("outputs", ()))
    pool = resolve_pool(config)
    fits_head = pool == recorded.get("pool")
    return Encoder(
        name=config.name,
        model_args=config.model_args,
        model=model,
        preprocessing=preprocessing,
        embedding_dim=embedding.shape[-1],
        weights_digest=digest_bytes(*parts),
        pool=pool,
        head=_linear_head(head_state, embedding.shape[-1], len(outputs)) if fits_head else None,
        outputs=outputs,
        learnt_from=tuple(recorded.get("learnt_from", ())),
    )


def encoder_of_weights(weights: str | Path) -> EncoderConfig:
    """The config of an encoder whose weights file records what it is: one that ships, by its name (its ending may be
    left out), or a file of ours.

    The file's digest is checked where its weights are loaded; here only if what it records is of no use.

    Raises:
        CheckpointError: no such file, or one that is damaged or does not record its model.
    """
    path = Path(weights)
    if not path.suffix and (WEIGHTS_DIR / f"{path}.safetensors").is_file():
        path = Path(f"{path}.safetensors")
    if not find_weights(path).is_file():
        shipped = ", ".join(sorted(file.stem for file in WEIGHTS_DIR.glob("*.safetensors")))
        raise CheckpointError(
            f"There are no encoder weights '{weights}': not a file, and not one that ships ({shipped})."
        )
    header = weights_header(path)
    with suppress(KeyError, ValidationError):
        if header.get("kind") == "encoder":
            return EncoderConfig(name=header["encoder"], weights=path, model_args=header["model_args"])
    if path.suffix == ".safetensors":
        load_tensors(find_weights(path))
    raise CheckpointError(
        f"{path} does not record which encoder it holds. Give one that `vnaw pretrain` or `vnaw finetune` wrote."
    )


def resolve_pool(config: EncoderConfig) -> str | None:
    """How the model of `config` pools: as it says, else as its weights file records it, else None, the model's own."""
    recorded: str | None = recorded_of(config).get("pool")
    return config.pool or recorded


def recorded_of(config: EncoderConfig) -> dict[str, Any]:
    """What the weights file of `config` records of itself; empty for a foreign one, or where there is none."""
    return weights_header(config.weights) if isinstance(config.weights, Path) else {}


def weights_header(path: Path) -> dict[str, Any]:
    """What a weights file records of itself; empty for a foreign one."""
    return read_header(find_weights(path))


def _preprocessing(model: nn.Module, config: EncoderConfig, header: Mapping[str, Any]) -> Preprocessing:
    """Each value as the config has it, else as the weights file records it, else as timm records it for the model."""
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    timms = {"input_px": config.model_args.get("img_size", data["input_size"][-1])}
    timms |= {key: data[key] for key in ("mean", "std", "interpolation")}
    values: dict[str, Any] = {}
    for field in fields(Preprocessing):
        chosen = getattr(config, field.name, None)
        recorded = header.get(field.name, timms.get(field.name, field.default))
        value = recorded if chosen is None else chosen
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return Preprocessing(**values)


def _classifier_of(model: nn.Module) -> str:
    """Name of the model's head among its tensors."""
    return str(getattr(model, "default_cfg", {}).get("classifier", "head"))


def _linear_head(state: Mapping[str, Tensor], embedding_dim: int, num_outputs: int) -> nn.Module | None:
    weight = next((value for key, value in state.items() if key.endswith(".weight")), None)
    bias = next((value for key, value in state.items() if key.endswith(".bias")), None)
    if weight is None or bias is None or weight.shape[1:] != (embedding_dim,) or not 0 < num_outputs <= len(weight):
        return None
    head = nn.Linear(embedding_dim, num_outputs)
    head.load_state_dict({"weight": weight[:num_outputs], "bias": bias[:num_outputs]})  # what follows: extra heads
    return head.eval().requires_grad_(False)


def _try_forward(model: nn.Module, input_px: int, config: EncoderConfig) -> Tensor:
    try:
        with torch.inference_mode():
            embedding: Tensor = model(torch.zeros(1, 3, input_px, input_px))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{config.name} with encoder.model_args {config.model_args} cannot take images of {input_px} px: {error}"
        ) from error
    if embedding.ndim != 2:
        raise ConfigError(f"{config.name} gives {tuple(embedding.shape)} for one image, not one embedding.")
    return embedding


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def find_weights(path: Path) -> Path:
    """A weights file by its path, or, if nothing is there, the file of that name among those that ship."""
    shipped = WEIGHTS_DIR / path
    return shipped if not path.exists() and shipped.exists() else path


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path, config: EncoderConfig) -> None:
    current = model.state_dict()
    problems = [f"missing {key}" for key in current if key not in state]
    problems += [f"unknown {key}" for key in state if key not in current]
    problems += [
        f"{key} is {tuple(value.shape)}, the model has {tuple(current[key].shape)}"
        for key, value in state.items()
        if key in current and value.shape != current[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {config.name} with {config.model_args or 'no arguments'}:\n{listing(problems, 5)}"
        )
    model.load_state_dict(state)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, frozen_stages: int
) -> list[dict[str, Any]]:
    """The model's parameters for its optimiser; each group's `lr_scale` is its factor of the learning rate.

    Biases, norms and what timm's model names for it (a Swin's position biases) have no weight decay. The first
    `frozen_stages` stages, as timm groups the model's parameters, lose their gradient and are in no group.

    Raises:
        ConfigError: more frozen stages than the model has, or a model whose parameters timm cannot group.
    """
    exempt: Any = getattr(model, "no_weight_decay", set)()
    if frozen_stages == 0 and layer_decay == 1:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
        return [{**group, "lr_scale": 1.0} for group in groups]
    if not hasattr(model, "group_matcher"):
        raise ConfigError("timm knows no layers of this encoder; layer_decay must be 1 and frozen_stages 0.")
    grouping: Any = model
    stages = group_parameters(model, grouping.group_matcher(coarse=True))
    names = [names for _, names in sorted(stages.items())]
    if frozen_stages >= len(names):
        raise ConfigError(f"finetune.frozen_stages {frozen_stages} leaves nothing to train of {len(names)} stages.")
    for name in (name for stage in names[:frozen_stages] for name in stage):
        model.get_parameter(name).requires_grad_(False)
    groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    return [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in groups]
