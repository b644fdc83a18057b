"""Both poolings equal torch's, values and gradients, on every grid; ties go to the first maximum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.pooling import (
    Grid,
    head_pool,
    head_pool_backward,
    pooled_grid,
    read_positions,
    skip_pool,
    skip_pool_backward,
)

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 10), st.integers(1, 10))


def volume(x: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, N, C] -> [B, C, T, H, W], contiguous."""
    return x.unflatten(1, grid).permute(0, 4, 1, 2, 3).contiguous()


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3))
def test_head_pool_is_the_depthwise_convolution(grid: Grid, stride: int, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(batch, grid[0] * grid[1] * grid[2], 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = tokens(F.conv3d(volume(x, grid), weight, stride=(1, stride, stride), padding=1, groups=6))
    t, h, w = pooled_grid(grid, stride)
    assert expected.shape == (batch, t * h * w, 6)
    torch.testing.assert_close(head_pool(x, weight, grid, stride), expected)
    grad = torch.randn_like(expected)
    found = head_pool_backward(grad, x.detach(), weight.detach(), grid, stride)
    for actual, wanted in zip(found, torch.autograd.grad(expected, (x, weight), grad)):
        torch.testing.assert_close(actual, wanted)


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 9))
def test_pooling_only_what_is_read_is_pooling_everything(grid: Grid, stride: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, grid[0] * grid[1] * grid[2], 6), torch.randn(6, 1, 3, 3, 3)
    found = read_positions(grid, stride, x.device)
    assert (found is None) == (stride <= 3)
    if found is not None:
        positions, compact = found
        assert len(positions) == compact[0] * compact[1] * compact[2]
        actual = head_pool(x[:, positions], weight, compact, 3)
        torch.testing.assert_close(actual, head_pool(x, weight, grid, stride), rtol=1e-6, atol=1e-6)


def test_the_weight_gradient_keeps_fp32_accuracy_over_many_positions() -> None:
    torch.manual_seed(0)
    grid = (2, 56, 56)
    x, weight = torch.randn(2, 2 * 56 * 56, 8), torch.randn(8, 1, 3, 3, 3, requires_grad=True)
    grad = torch.randn_like(x)
    actual = head_pool_backward(grad, x, weight.detach(), grid, 1)[1]
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
    actual = head_pool_backward(grad, x, weight.detach(), grid, 1)[1]
    expected = x.double().sum((0, 1))[:, None, None]
    centre = actual[:, 0, 1]
    assert ((centre[:, 1:2, 1:2].double() - expected).abs() <= 2**-8 * expected).all()


@settings(deadline=None, max_examples=60)
@given(GRIDS, st.integers(1, 3))
def test_the_max_pool_is_torchs_with_ties(grid: Grid, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (batch, grid[0] * grid[1] * grid[2], 5)).double().requires_grad_()
    expected = tokens(F.max_pool3d(volume(x, grid), (1, 3, 3), (1, 2, 2), (0, 1, 1)))
    actual, chosen = skip_pool(x.detach(), grid)
    assert actual.equal(expected)
    grad = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(skip_pool_backward(grad, chosen, grid), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflow_is_not_hidden_by_the_max_pool(bad: float) -> None:
    x = torch.zeros(1, 4, 4, 4, 1)
    x[0, 0, 1, 1] = bad
    out = skip_pool(x.flatten(1, 3), (4, 4, 4))[0].view(1, 4, 2, 2, 1)
    assert not out[0, 0, 0, 0].isfinite()
    assert not out[0, 0, 1, 1].isfinite()
    assert out[0, 1].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_convolution_of_a_gpu_is_that_of_the_cpu_in_fp64(dtype: torch.dtype, stride: int) -> None:
    torch.manual_seed(0)
    grid = (4, 14, 14)
    x, weight = torch.randn(2, 4 * 196, 96).to(dtype), torch.randn(96, 1, 3, 3, 3).to(dtype)
    expected = head_pool(x.double(), weight.double(), grid, stride)
    grad = torch.randn_like(expected).to(dtype)
    wanted = (expected, *head_pool_backward(grad.double(), x.double(), weight.double(), grid, stride))
    x, weight, grad = x.cuda(), weight.cuda(), grad.cuda()
    found = (head_pool(x, weight, grid, stride), *head_pool_backward(grad, x, weight, grid, stride))
    for actual, exact in zip(found, wanted):
        assert (actual.cpu().double() - exact).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * exact.norm()
