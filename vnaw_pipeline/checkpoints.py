"""Checkpoints: tensors and a JSON header in one safetensors file, written whole. No pickle is read unless asked for."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vnaw_pipeline.errors import CheckpointError
from vnaw_pipeline.provenance import atomic_path, digest_bytes

_HEADER, _DIGEST = "vnaw", "digest"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and what describes them as one file: the old one or the new one is there, never a part. The
    digest of all of it is in it, and is checked when they are read."""
    kept = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    # In one entry: of several, safetensors writes now this one first and now that one, and equal files must be equal.
    described = json.loads(json.dumps(header))
    metadata = {_HEADER: json.dumps({**described, _DIGEST: _digest(kept, described)})}
    with atomic_path(path) as partial:
        try:
            save_file(kept, partial, metadata)
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
        with _opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
        header = _parsed(metadata, path)
        wanted = header.pop(_DIGEST, metadata.get(_DIGEST))  # its own entry in files of earlier versions
        # Those have the digest of the tensors alone.
        if wanted is not None and (found := _digest(tensors, header)) != wanted != _digest(tensors, {}):
            raise CheckpointError(
                f"{path} is damaged: its digest is {found[:12]}, and it was written with {wanted[:12]}. Get it again."
            )
        return tensors, header
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


def read_header(path: Path) -> dict[str, Any]:
    """What a checkpoint records of itself, without reading its tensors; empty for a foreign file or a pickle.

    Raises:
        CheckpointError: a damaged .safetensors file.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with _opened(path) as file:
        header = _parsed(file.metadata() or {}, path)
    header.pop(_DIGEST, None)
    return header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}.") from error


def _parsed(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(metadata.get(_HEADER, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: what it records of itself cannot be read ({error}).") from error
    return header


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Of names, types, shapes and values, and of what describes them."""
    parts = [json.dumps(header, sort_keys=True).encode()] if header else []
    for key in sorted(tensors):
        tensor = tensors[key]
        parts += [
            f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(),
            tensor.reshape(-1).view(torch.uint8).numpy().tobytes(),
        ]
    return digest_bytes(*parts)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """Find the tensors in the usual wrappings of a .pth and drop the prefix that DistributedDataParallel adds."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no table of tensors (looked for a state dict, 'state_dict', 'model').")
    return {str(key).removeprefix("module."): value for key, value in content.items()}
