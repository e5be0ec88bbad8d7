"""Who computes an encoder's forward pass, and in which precision: the two decide an embedding's last bits.

PyTorch computes on any device. OpenVINO (the extra `cpu-fast`) computes on a CPU, from a graph that it makes of the
PyTorch model, and is faster there. On a CPU each forward pass runs on one core while several run side by side, so
that no embedding depends on how many cores there are.
"""

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vnaw_pipeline.errors import ConfigError, StoreError
from vnaw_pipeline.features.encoder import Encoder, Preprocessing
from vnaw_pipeline.processes import cpu_share, put
from vnaw_pipeline.textlines import shortened

Frames = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Forward = Callable[[Frames, Mask | None], npt.NDArray[np.float32]]


class Encode(Protocol):
    """An encoder as a function on frames."""

    def __call__(self, frames: Frames, erased: Mask | None = None) -> npt.NDArray[np.float16]:
        """uint8 (B, S, S, 3) -> (B, D). Pixels that are `erased`, bool (B, S, S), take the encoder's mean colour."""


@dataclass(frozen=True)
class Arithmetic:
    """`torch` or `openvino`, in `fp32` or `bf16`, on which device."""

    backend: str
    precision: str
    device: torch.device

    def fingerprint(self) -> dict[str, str]:
        """What of it decides an embedding, for the feature store's attributes."""
        return {"backend": self.backend, "precision": self.precision}


def resolve_arithmetic(backend: str, precision: str, device: torch.device) -> Arithmetic:
    """What `auto` stands for. In precision: bf16 where it is computed in (a GPU that says so, a CPU with AVX-512 bf16),
    else fp32. In backend: OpenVINO on a CPU if it is installed, else PyTorch; PyTorch too where fp32 is asked for, by
    who wants the reference, and where bf16 would be imitated. OpenVINO uses no GPU.

    Raises:
        ConfigError: OpenVINO is wanted and not installed, or in a precision that it would silently replace.
    """
    if backend == "openvino":
        device = torch.device("cpu")
    in_bf16 = computes_bf16(device)
    if backend == "auto":
        is_faster = device.type == "cpu" and (precision == "auto" or (precision == "bf16" and in_bf16))
        backend = "openvino" if is_faster and openvino_is_installed() else "torch"
    if precision == "auto":
        precision = "bf16" if in_bf16 else "fp32"
    if backend == "openvino" and not openvino_is_installed():
        raise ConfigError(
            "OpenVINO is to compute the embeddings (extract.backend says so, or the run's features were made by it), "
            "and it is not installed here: pip install 'vnaw-pipeline[cpu-fast]'. Or make new features with "
            "extract.backend=torch."
        )
    if backend == "openvino" and precision == "bf16" and not in_bf16:
        raise ConfigError(
            "OpenVINO is to compute in bf16, and this CPU does not (it has no AVX-512 bf16). "
            "Set extract.precision=fp32, or extract.backend=torch, which imitates it slowly."
        )
    return Arithmetic(backend, precision, device)


def openvino_is_installed() -> bool:
    """Whether the extra `cpu-fast` is there, without importing it."""
    return find_spec("openvino") is not None


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16, and need not imitate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def make_encode(encoder: Encoder, arithmetic: Arithmetic, forwards: int, batch_frames: int) -> Encode:
    """The encoder as a function on up to `batch_frames` frames, which threads may call; at most `forwards` passes run
    at a time. A shorter batch is padded, so that the batch never changes a number.

    The function raises StoreError for embeddings that float16 cannot hold.

    Raises:
        ConfigError: OpenVINO cannot make a graph of this encoder.
    """
    make_forward = _openvino_forward if arithmetic.backend == "openvino" else _torch_forward
    forward = make_forward(encoder, arithmetic, forwards, batch_frames)

    def encode(frames: Frames, erased: Mask | None = None) -> npt.NDArray[np.float16]:
        padding = [(0, batch_frames - len(frames)), (0, 0), (0, 0)]
        if padding[0][1]:
            frames, erased = np.pad(frames, [*padding, (0, 0)]), None if erased is None else np.pad(erased, padding)
        with np.errstate(over="ignore"):
            embeddings = forward(frames, erased)[: batch_frames - padding[0][1]].astype(np.float16)
        if not np.isfinite(embeddings).all():
            raise StoreError(
                f"{encoder.name} gives embeddings that float16 cannot hold (beyond 65504, or not a number). "
                "Check its weights and precision; another layer's output or a normalised head is needed."
            )
        return embeddings

    return encode


class _OfPixels(nn.Module):
    """The encoder with its normalising: uint8 (B, S, S, 3) and bool (B, S, S) -> (B, D)."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.preprocessing, self.dtype = model, preprocessing, dtype

    def forward(self, frames: Tensor, erased: Tensor | None) -> Tensor:
        images = self.preprocessing.normalise(frames)
        if erased is not None:
            images = images.masked_fill(erased[:, None], 0.0)
        embeddings: Tensor = self.model(images.to(self.dtype))
        return embeddings.float()


def _torch_forward(encoder: Encoder, arithmetic: Arithmetic, forwards: int, batch_frames: int) -> Forward:
    device, dtype = arithmetic.device, torch.bfloat16 if arithmetic.precision == "bf16" else torch.float32
    own = copy.deepcopy(encoder.model).to(device, dtype).to(memory_format=torch.channels_last)
    model = _OfPixels(own, encoder.preprocessing, dtype)
    slots = threading.Semaphore(forwards)

    @torch.inference_mode()
    def forward(frames: Frames, erased: Mask | None) -> npt.NDArray[np.float32]:
        images = put(torch.from_numpy(frames), device)
        mask = None if erased is None else put(torch.from_numpy(erased), device)
        with slots:
            embeddings: npt.NDArray[np.float32] = model(images, mask).cpu().numpy()
        return embeddings

    return forward


def _openvino_forward(encoder: Encoder, arithmetic: Arithmetic, forwards: int, batch_frames: int) -> Forward:
    side = encoder.preprocessing.input_px
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if arithmetic.precision == "bf16" else "f32",
        "NUM_STREAMS": forwards,
        "INFERENCE_NUM_THREADS": forwards,  # one for each
        "ENABLE_CPU_PINNING": False,  # several processes would pin theirs to the same cores
    }
    model = _OfPixels(encoder.model, encoder.preprocessing, torch.float32).eval()
    # Not one frame: a size of 1 that the trace took for a constant would go unnoticed.
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8), torch.zeros(2, side, side, dtype=torch.bool)
    shapes = [[batch_frames, *part.shape[1:]] for part in example]
    openvino = _openvino()
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # that sizes become constants, which they are
            # Traced here, since OpenVINO would trace twice, to compare, and that takes a third longer.
            traced = torch.jit.trace(model, example, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
            graph = openvino.convert_model(traced, example_input=example)
        graph.reshape(dict(zip(graph.inputs, shapes, strict=True)))
        compiled = openvino.Core().compile_model(graph, "CPU", settings)
    except Exception as error:
        raise ConfigError(
            f"OpenVINO cannot take the encoder {encoder.name} ({type(error).__name__}: {shortened(str(error), 300)}). "
            "Set extract.backend=torch."
        ) from error
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(forwards):
        idle.put(compiled.create_infer_request())
    none_erased = np.zeros(shapes[1], np.bool_)

    def forward(frames: Frames, erased: Mask | None) -> npt.NDArray[np.float32]:
        request = idle.get()
        try:
            request.infer([frames, none_erased if erased is None else erased], share_inputs=True)
            embeddings: npt.NDArray[np.float32] = request.get_output_tensor().data.copy()
        finally:
            idle.put(request)
        return embeddings

    return forward


def _openvino() -> Any:
    # It reports its use to its makers when it is imported and when it converts, unless it finds no package to do so.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@contextmanager
def one_core_per_forward(device: torch.device) -> Iterator[int]:
    """On a CPU, run each forward pass on one core, as many at a time as there are cores (yielded).

    Splitting one pass over cores may change the order of its sums, and so the bytes.
    """
    if device.type != "cpu":
        yield 1
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cpu_share()
    finally:
        torch.set_num_threads(before)
