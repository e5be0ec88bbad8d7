"""Depthwise convolutions on small maps: PyTorch's own gradients, and names that stay."""

import copy

import pytest
import torch
from torch import nn

from vnaw_pipeline.training.depthwise import quicken_depthwise


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (6, 6), (7, 7)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(5, 1, 2), (5, 2, 2), (7, 3, 3), ((3, 5), (2, 1), (1, 2))])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_pytorch(size, kernel, stride, padding, memory_format):
    # In float64, so that only the order of sums differs.
    own = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=False).double()
    quick = copy.deepcopy(own)
    quicken_depthwise(quick)
    assert type(quick) is not nn.Conv2d
    x = torch.randn(4, 6, *size, dtype=torch.float64).to(memory_format=memory_format)
    results = []
    for module in (own, quick):
        given = x.clone().requires_grad_()
        out = module(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad, module.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_other_convolutions_and_all_names_stay():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 5, groups=4),  # with a bias
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 8, 5, groups=4, bias=False),
        nn.Conv2d(4, 4, 5, groups=2, bias=False),
        nn.Conv2d(4, 4, 5, groups=4, bias=False, dilation=2),
        nn.Conv2d(4, 4, 5, groups=4, bias=False, padding="same"),
    )
    before = list(model.state_dict())
    quicken_depthwise(model)
    assert {type(module) for module in model} == {nn.Conv2d}
    assert list(model.state_dict()) == before


def test_frozen_weights_and_mixed_precision_go_pytorchs_way():
    module = nn.Conv2d(4, 4, 5, groups=4, padding=2, bias=False)
    quicken_depthwise(module)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    module(x).sum().backward()
    assert module.weight.grad is not None
    module.requires_grad_(False)
    assert "Depthwise" not in type(module(x).grad_fn).__name__
