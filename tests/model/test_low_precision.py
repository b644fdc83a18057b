"""Products rounded by hand are those of hardware that multiplies in bf16 and accumulates in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multitrain.model import low_precision
from multitrain.model.pooling import head_pool, head_pool_backward


@pytest.fixture(params=[frozenset(), frozenset({torch.bfloat16, torch.float16})], ids=["torch", "by hand"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> frozenset[torch.dtype]:
    """Both routes, whatever this machine's CPU can do."""
    monkeypatch.setattr(low_precision, "_slow_dtypes", lambda: request.param)
    return request.param


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator).bfloat16().float().requires_grad_() for s in shapes]


def close(found: Tensor, exact: Tensor) -> None:
    """Equal but for one rounding to bf16 of the result (8 bits), and the order of a sum."""
    assert (found.float() - exact.float()).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_under_autocast_and_its_gradients(slow: frozenset[torch.dtype], bias: bool) -> None:
    x, w, b = leaves((3, 5, 64), (32, 64), (32,))
    with torch.autocast("cpu", torch.bfloat16):
        out = low_precision.linear(x, w, b if bias else None)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    found = [x.grad, w.grad, b.grad] if bias else [x.grad, w.grad]
    again = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = torch.nn.functional.linear(again[0], again[1], again[2] if bias else None)
    close(out, exact)
    exact.sum().backward()
    for grad, tensor in zip(found, again):
        assert grad is not None
        assert grad.dtype == torch.float32
        close(grad, tensor.grad)


def test_linear_and_matmul_of_low_precision_tensors_keep_their_dtype(slow: frozenset[torch.dtype]) -> None:
    x, w = (t.detach() for t in leaves((4, 6, 16), (4, 16, 8)))
    assert low_precision.linear(x.bfloat16(), w[0].T.bfloat16(), None).dtype == torch.bfloat16
    product = low_precision.matmul(x[0].bfloat16(), w[0].bfloat16())
    assert product.dtype == torch.bfloat16
    close(product, x[0] @ w[0])
    into = torch.empty_like(product)
    assert low_precision.matmul(x[0].bfloat16(), w[0].bfloat16(), out=into) is into
    assert into.equal(product)


def test_pooling_and_its_gradients(slow: frozenset[torch.dtype]) -> None:
    x, w = (t.detach() for t in leaves((2, 4 * 8 * 8, 6), (6, 1, 3, 3, 3)))
    grid = (4, 8, 8)
    exact = head_pool(x, w, grid, 2)
    out = head_pool(x.bfloat16(), w.bfloat16(), grid, 2)
    assert out.dtype == torch.bfloat16
    close(out, exact)
    ones = torch.ones_like(exact)
    found = head_pool_backward(ones.bfloat16(), x.bfloat16(), w.bfloat16(), grid, 2)
    for actual, wanted in zip(found, head_pool_backward(ones, x, w, grid, 2)):
        close(actual, wanted)


def test_fp32_is_left_to_torch(slow: frozenset[torch.dtype]) -> None:
    x, w = leaves((3, 16), (8, 16))
    assert low_precision.emulated_dtype(x) is None
    assert torch.equal(low_precision.linear(x, w, None), torch.nn.functional.linear(x, w))
