"""Attention by every route is softmax(q kᵀ / √d) v, with its gradient, and the chunked route never leaves fp32 in the softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from multitrain.model.attention import CHUNK, attention, chunked_attention


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def inputs(n: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the model hands them over: [B, N, h, d] seen as [B, h, N, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, 16), (2, m, 3, 16), (2, m, 3, 16)]
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (40, 9), (CHUNK, 10), (CHUNK + 1, 65), (2 * CHUNK + 77, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_route_is_softmax_attention_with_its_gradient(n: int, m: int, dtype: torch.dtype) -> None:
    ours = inputs(n, m, dtype)
    exact = [x.detach().double().requires_grad_() for x in ours]
    out, expected = attention(*ours), plain(*exact)
    assert out.dtype == dtype
    grad = torch.randn(expected.shape, dtype=torch.float64)
    pairs = [(out, expected)]
    pairs += list(zip(torch.autograd.grad(out, ours, grad.to(dtype)), torch.autograd.grad(expected, exact, grad)))
    room = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for actual, wanted in pairs:
        assert (actual.double() - wanted).norm() <= room * (wanted.norm() + 1)


def test_large_scores_do_not_overflow_the_chunked_route() -> None:
    q, k, v = (x.detach() * 50 for x in inputs(700, 64, torch.float16))
    out = attention(q.contiguous(), k, v)
    assert out.isfinite().all()
    expected = plain(q.double(), k.double(), v.double())
    assert (out.double() - expected).norm() <= 0.02 * expected.norm()


def test_the_chunked_operation_is_a_well_formed_torch_operation() -> None:
    torch.library.opcheck(
        chunked_attention, tuple(inputs(CHUNK + 3, 8, torch.bfloat16)), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_half_precisions_on_the_cpu_take_the_chunked_route_and_the_others_the_fused_one(dtype: torch.dtype) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        attention(*inputs(20, 8, dtype))
    names = {event.key for event in seen.key_averages()}
    half = dtype in (torch.bfloat16, torch.float16)
    assert ("multitrain::chunked_attention" in names) == half
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) == (not half)


def test_the_chunked_route_keeps_no_attention_matrix() -> None:
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel() * x.element_size()
        return x

    q, k, v = inputs(2000, 500, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(q, k, v)
    lse = 2 * 3 * 2000 * 4
    assert kept <= sum(x.numel() * 2 for x in (q, q, k, v)) + lse
