"""The image encoder: a timm model, its weights, and the preprocessing that belongs to it.

Shapes: `B` frames of a batch, `S` input side in pixels, `D` embedding width.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from vnaw_pipeline.checkpoints import load_tensors
from vnaw_pipeline.config import EncoderConfig
from vnaw_pipeline.errors import CheckpointError, ConfigError, listing
from vnaw_pipeline.provenance import differences, digest_bytes

_LOG = logging.getLogger(__name__)
WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
_CV2_INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What an encoder was trained to see: side in pixels, channel statistics in [0, 1], interpolation.

    The whole crop is resized to the side: face crops have no border to cut away, so timm's centre crop is not taken.
    """

    input_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    def resize(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Bring one crop (H, W, 3) to (S, S, 3); shrinking averages areas so that it does not alias."""
        height, width = rgb.shape[:2]
        if height == width == self.input_px:
            return rgb
        shrinks = max(height, width) > self.input_px
        method = cv2.INTER_AREA if shrinks else _CV2_INTERPOLATION.get(self.interpolation, cv2.INTER_CUBIC)
        return cv2.resize(rgb, (self.input_px, self.input_px), interpolation=method).astype(np.uint8, copy=False)

    def normalise(self, frames: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), on the device the frames are on."""
        mean = torch.tensor(self.mean, device=frames.device) * 255
        std = torch.tensor(self.std, device=frames.device) * 255
        return ((frames.float() - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A timm model without its head, its preprocessing, and the digest of its weights."""

    name: str
    model_args: dict[str, Any]
    model: nn.Module
    preprocessing: Preprocessing
    embedding_dim: int
    weights_digest: str

    def fingerprint(self) -> dict[str, Any]:
        """What decides an embedding, for the feature store's attributes."""
        return {
            "encoder": self.name,
            "model_args": self.model_args,
            "weights": self.weights_digest,
            "input_px": self.preprocessing.input_px,
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
            "interpolation": self.preprocessing.interpolation,
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
    pretrained = config.weights == "pretrained"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = timm.create_model(
                config.name, pretrained=pretrained, num_classes=num_classes, **config.model_args
            )
        except Exception as error:
            if not pretrained or isinstance(error, TypeError | IndexError | AssertionError):
                fault = f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"encoder.model_args {config.model_args} do not fit {config.name} ({fault})."
                ) from error
            raise ConfigError(
                f"The pretrained weights of {config.name} could not be downloaded ({type(error).__name__}). Without "
                "a network, set encoder.weights to a .safetensors file, or to 'untrained' to try the pipeline."
            ) from error
    return model


def preprocessing_of(model: nn.Module, config: EncoderConfig) -> Preprocessing:
    """The model's own preprocessing as timm records it, with the overrides of `config`."""
    data: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    input_px = config.model_args.get("img_size", data["input_size"][-1])
    return Preprocessing(
        input_px=int(input_px),
        mean=config.mean or tuple(data["mean"]),
        std=config.std or tuple(data["std"]),
        interpolation=str(data["interpolation"]),
    )


def load_encoder(config: EncoderConfig, seed: int = 0, allow_pickle: bool = False) -> Encoder:
    """Build the encoder without its head and load its weights; the model is in eval mode, without gradients.

    Raises:
        ConfigError: unknown model or arguments; weights that cannot be downloaded.
        CheckpointError: a weights file that is missing, damaged, a pickle not asked for, or of another model.
    """
    model = create_model(config, num_classes=0, seed=seed)
    if config.weights == "untrained":
        _LOG.warning(
            "UNTRAINED encoder: %s has random weights; its embeddings say nothing about expressions.", config.name
        )
    elif isinstance(config.weights, Path):
        load_weights(model, find_weights(config.weights), config, allow_pickle)
    model.eval().requires_grad_(False)
    preprocessing = preprocessing_of(model, config)
    embedding = _try_forward(model, preprocessing.input_px, config)
    state = model.state_dict()
    parts = [part for name in sorted(state) for part in (name.encode(), _bytes_of(state[name]))]
    return Encoder(
        name=config.name,
        model_args=config.model_args,
        model=model,
        preprocessing=preprocessing,
        embedding_dim=embedding.shape[-1],
        weights_digest=digest_bytes(*parts),
    )


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


def load_weights(model: nn.Module, path: Path, config: EncoderConfig, allow_pickle: bool = False) -> None:
    """Load a weights file into `model`; the classifier of the file is left out if the model has none.

    Raises:
        CheckpointError: see `load_encoder`.
    """
    state, header = load_tensors(path, allow_pickle)
    preprocessing = preprocessing_of(model, config)
    wanted = {
        "encoder": config.name,
        "model_args": config.model_args,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    made_for = {key: header.get(key, value) for key, value in wanted.items()}
    if unlike := differences(made_for, wanted):
        raise CheckpointError(f"{path} holds another encoder than the config names: {'; '.join(unlike)}.")
    classifier = str(getattr(model, "default_cfg", {}).get("classifier", "head"))
    current = model.state_dict()
    state = {key: value for key, value in state.items() if key in current or not key.startswith(f"{classifier}.")}
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


def resolve_precision(wanted: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device computes in it (a GPU that says so, a CPU with AVX-512 bf16), else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"
