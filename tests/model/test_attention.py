"""Attention by every backend is softmax(q kᵀ / √d) v, with its gradient, and the chunked backend never leaves fp32 in the softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multitrain.model.attention import (
    AUTOGRAD,
    CHUNKED,
    EFFICIENT,
    FLASH,
    FUSED_CPU,
    QUERY_CHUNK,
    Backend,
    _chunks,
    attend,
    attend_backward,
    select_backend,
)

ROOM = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error that a type is allowed."""


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def inputs(n: int, m: int, dtype: torch.dtype, d: int = 16, device: str = "cpu") -> list[Tensor]:
    """q, k, v as the model hands them over: [B, N, h, d] seen as [B, h, N, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, d), (2, m, 3, d), (2, m, 3, d)]
    return [torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2) for s in shapes]


def agrees(by: Backend, ours: list[Tensor]) -> None:
    """Output and gradients of a backend are those of the formula in fp64."""
    out, state = by.forward(*ours, graph=True)
    assert out.dtype == ours[0].dtype
    exact = [x.double().requires_grad_() for x in ours]
    expected = plain(*exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    found = by.backward(grad.to(out.dtype), *ours, out, state)
    pairs = [(out, expected), *zip(found, torch.autograd.grad(expected, exact, grad))]
    for actual, wanted in pairs:
        assert actual.dtype == out.dtype
        assert (actual.double() - wanted).norm() <= ROOM[out.dtype] * (wanted.norm() + 1)


ROUTES: dict[str, Backend | None] = {"chosen": None, "autograd": AUTOGRAD, "chunked": CHUNKED}
"""The chunked one is for half precisions."""


@pytest.mark.parametrize(
    ("n", "m"), [(1, 2), (40, 9), (QUERY_CHUNK, 10), (QUERY_CHUNK + 1, 65), (2 * QUERY_CHUNK + 77, 33)]
)
@pytest.mark.parametrize(
    ("by", "dtype"), [(by, dtype) for by in ROUTES for dtype in ROOM if by != "chunked" or dtype.itemsize == 2]
)
def test_every_route_is_softmax_attention_with_its_gradient(n: int, m: int, dtype: torch.dtype, by: str) -> None:
    ours = inputs(n, m, dtype)
    agrees(ROUTES[by] or select_backend(ours[0]), ours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("n", "m"), [(40, 9), (3136, 784)])
@pytest.mark.parametrize("dtype", list(ROOM))
def test_the_routes_of_a_gpu_are_softmax_attention_with_its_gradient(n: int, m: int, dtype: torch.dtype) -> None:
    ours = inputs(n, m, dtype, 96, "cuda")
    assert select_backend(ours[0]) in {torch.float64: [AUTOGRAD], torch.float32: [EFFICIENT]}.get(
        dtype, [FLASH, EFFICIENT]
    )
    agrees(select_backend(ours[0]), ours)


def test_large_scores_do_not_overflow_the_chunked_route() -> None:
    q, k, v = (x * 50 for x in inputs(700, 64, torch.float16))
    out, state = attend(q, k, v)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in attend_backward(out * 1e-3, q, k, v, out, state))
    expected = plain(q.double(), k.double(), v.double())
    assert (out.double() - expected).norm() <= 0.02 * expected.norm()


def test_without_a_graph_the_output_has_the_same_bits() -> None:
    ours = inputs(QUERY_CHUNK + 9, 65, torch.bfloat16)
    assert attend(*ours, graph=False)[0].equal(attend(*ours)[0])


@pytest.mark.parametrize("dtype", list(ROOM))
def test_half_precisions_on_the_cpu_take_the_chunked_route_and_the_others_the_fused_one(dtype: torch.dtype) -> None:
    half = dtype in (torch.bfloat16, torch.float16)
    assert select_backend(torch.empty(1, dtype=dtype)) is (CHUNKED if half else FUSED_CPU)


def test_the_chunked_route_keeps_nothing_for_its_gradient() -> None:
    assert attend(*inputs(2000, 500, torch.bfloat16))[1] == ()


def test_chunks_are_all_rows_in_parts_of_nearly_one_size() -> None:
    for n in (1, QUERY_CHUNK - 1, QUERY_CHUNK, QUERY_CHUNK + 1, 784, 3136, 50176):
        parts = [list(range(n))[rows] for rows in _chunks(n)]
        assert [row for part in parts for row in part] == list(range(n))
        assert len(parts) == -(-n // QUERY_CHUNK)
        assert min(map(len, parts[:-1]), default=1) == max(map(len, parts[:-1]), default=1) <= QUERY_CHUNK
