"""In which precision a loss is worked out."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Lower precisions as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
