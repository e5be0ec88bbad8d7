"""Checkpoints: tensors and a JSON header in one safetensors file, written whole. No pickle is read unless asked for."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vnaw_pipeline.errors import CheckpointError
from vnaw_pipeline.provenance import atomic_path

_HEADER = "vnaw"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and what describes them as one file: the old one or the new one is there, never a part."""
    with atomic_path(path) as partial:
        try:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, partial, {_HEADER: json.dumps(header)}
            )
        except SafetensorError as error:  # its word for any failed write, such as a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error


def load_tensors(path: Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors (on the CPU) and header. A foreign file has an empty header.

    Raises:
        CheckpointError: a missing or damaged file; a pickle that was not asked for.
    """
    if not path.is_file():
        raise CheckpointError(f"The weights file {path} is not there.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118 -- not a dict
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is not a .safetensors file. A pickle can run code when it is read; if you trust where it comes "
            "from, pass --allow-pickle (it is then read with weights_only=True)."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as tensors only: {error}") from error
    return _unwrap(content, path), {}


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """Find the tensors in the usual wrappings of a .pth and drop the prefix that DistributedDataParallel adds."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors (looked for a state dict, 'state_dict', 'model').")
    return {str(key).removeprefix("module."): value for key, value in content.items()}
