"""Depthwise convolutions with large kernels on small maps, whose weight gradient PyTorch works out slowly on a CPU.

In the last stages of an EfficientNet at 48 to 96 px the maps are 2 to 6 pixels wide and the kernels 5. The gradient of
such a kernel then takes up to 100 times its forward pass. Here each of its weights is the sum of products of the input
and the output's gradient over the few pixels that it joins, up to 60 times as fast.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MOST_PIXELS = 36
"""Of an input map. On larger ones PyTorch's own way is as fast."""
_PLAIN_KERNEL = 9
"""Weights of a kernel for which PyTorch's own way is fast on every map."""


def quicken_depthwise(model: nn.Module) -> None:
    """Have the model's depthwise convolutions work out weight gradients this way where it is faster, in place.

    Gradients are the same up to the order of sums. Other modules, and names of parameters, stay.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_large_depthwise(module):
            module.__class__ = _DepthwiseConv2d


def _is_large_depthwise(module: nn.Conv2d) -> bool:
    plain = module.bias is None and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    depthwise = module.groups == module.in_channels == module.out_channels > 1 and set(module.dilation) == {1}
    return plain and depthwise and module.weight[0].numel() > _PLAIN_KERNEL


class _DepthwiseConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H', W')."""
        small = x.shape[2] * x.shape[3] <= _MOST_PIXELS and not torch.is_autocast_enabled(x.device.type)
        if small and torch.is_grad_enabled() and self.weight.requires_grad:
            convolved: Tensor = _Depthwise.apply(x, self.weight, self.stride, self.padding)
            return convolved
        return super().forward(x)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        geometry = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight))  # no bias, not transposed
        wanted = (ctx.needs_input_grad[0], False, False)
        of_input = torch.ops.aten.convolution_backward(gradient, x, weight, *geometry, wanted)[0]
        return of_input, _weight_gradient(x, gradient, weight, ctx.stride, ctx.padding), None, None


def _weight_gradient(
    x: Tensor, gradient: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Gradient of a kernel (C, 1, K, L) from the input (B, C, H, W) and the output's gradient (B, C, H', W')."""
    channels = len(weight)
    x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    rows, columns = (
        [
            _joined(step, x.shape[axis], gradient.shape[axis], stride[axis - 1], padding[axis - 1])
            for step in range(size)
        ]
        for axis, size in ((1, weight.shape[2]), (2, weight.shape[3]))
    )
    found = weight.new_zeros(len(rows), len(columns), channels)
    for i, (rows_in, rows_out) in enumerate(rows):
        for j, (columns_in, columns_out) in enumerate(columns):
            products = x[:, rows_in, columns_in] * gradient[:, rows_out, columns_out]
            torch.sum(products.reshape(-1, channels), 0, out=found[i, j])
    return found.permute(2, 0, 1)[:, None]


def _joined(step: int, size_in: int, size_out: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Along one axis: the input's and the output's places that the kernel's weight `step` joins; both may be empty."""
    offset = step - padding
    start = max(0, -(offset // stride))
    stop = max(start, min(size_out, (size_in - 1 - offset) // stride + 1))
    if start == stop:  # where a slice that began before the first place would count from the last
        return slice(0), slice(0)
    return slice(start * stride + offset, stop * stride + offset, stride), slice(start, stop)
