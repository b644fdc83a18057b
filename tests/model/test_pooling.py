"""Both poolings equal torch's, values and gradients, on every grid; ties go to the first maximum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.pooling import Grid, _MaxPool, head_pool, pooled, skip_pool

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))


def volume(x: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, N, C] -> [B, C, T, H, W], contiguous."""
    return x.unflatten(1, grid).permute(0, 4, 1, 2, 3).contiguous()


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def agree(actual: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(expected.shape, dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (actual, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3))
def test_head_pool_is_the_depthwise_convolution(grid: Grid, stride: int, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, grid[0] * grid[1] * grid[2], 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = tokens(F.conv3d(volume(x, grid), weight, stride=(1, stride, stride), padding=1, groups=6))
    t, h, w = pooled(grid, stride)
    assert expected.shape == (batch, t * h * w, 6)
    agree(head_pool(x, weight, grid, stride), expected, x, weight)


def test_the_weight_gradient_keeps_fp32_accuracy_over_many_positions() -> None:
    torch.manual_seed(0)
    grid = (2, 56, 56)
    x, weight = torch.randn(2, 2 * 56 * 56, 8), torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    grad = torch.randn_like(x)
    (actual,) = torch.autograd.grad(head_pool(x, weight, grid, 1), weight, grad)
    exact_weight = weight.detach().double().requires_grad_()
    exact = tokens(F.conv3d(volume(x, grid).double(), exact_weight, padding=1, groups=8))
    (expected,) = torch.autograd.grad(exact, exact_weight, grad.double())
    assert (actual - expected).norm() <= 5e-6 * expected.norm()


def test_the_weight_gradient_of_bf16_tokens_is_summed_in_fp32() -> None:
    grid = (16, 64, 64)
    x, weight = (
        torch.full((4, 16 * 64 * 64, 2), 143 / 128).bfloat16(),
        torch.zeros(2, 1, 3, 3, 3).bfloat16().requires_grad_(),
    )
    grad = torch.ones_like(x)
    (actual,) = torch.autograd.grad(head_pool(x, weight, grid, 1), weight, grad)
    expected = x.double().sum((0, 1))[:, None, None]
    centre = actual[:, 0, 1]
    assert ((centre[:, 1:2, 1:2].double() - expected).abs() <= 2**-8 * expected).all()


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 3), st.booleans())
def test_both_max_pools_are_torchs_with_ties(grid: Grid, batch: int, for_cuda: bool) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (batch, grid[0] * grid[1] * grid[2], 5)).double().requires_grad_()
    expected = tokens(F.max_pool3d(volume(x, grid), (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    if for_cuda:
        actual = _MaxPool.apply(_MaxPool.apply(x.unflatten(1, grid), 3), 2).flatten(1, 3)
    else:
        actual = skip_pool(x, grid)
    agree(actual, expected, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_not_hidden_by_the_max_pool(bad: float) -> None:
    x = torch.zeros(1, 4, 4, 4, 1)
    x[0, 0, 1, 1] = bad
    out = _MaxPool.apply(_MaxPool.apply(x, 3), 2)
    assert not out[0, 0, 0, 0].isfinite()
    assert not out[0, 0, 1, 1].isfinite()
    assert out[0, 1].isfinite().all()
