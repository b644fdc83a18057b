"""softmax(q kᵀ / √d) v and its gradient, without the attention matrix in memory, by the fastest exact backend of each device.

| device, type | backend | reason |
|---|---|---|
| CUDA, bf16 and fp16, from compute capability 8.0 | flash | head size 96, no bias, no mask: supported and fastest |
| CUDA, fp32, and bf16 and fp16 before 8.0 | memory-efficient | flash has no fp32 kernel and needs Ampere |
| CPU, fp32 and fp64 | torch's fused kernel | |
| CPU, bf16 and fp16 | 512 queries at a time, softmax in fp32 | torch 2.13's fused kernel is no faster here than in fp32 |
| anything else | torch's choice | autograd computes the gradient from the inputs alone |

`attend` returns its output and a state; `attend_backward` needs both. No function here builds an autograd graph.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.device import is_cuda
from multitrain.model.low_precision import matmul

QUERY_CHUNK = 512
"""Queries at a time in the chunked backend, few enough that the scores of one head stay in the cache."""
HALF_DTYPES = (torch.bfloat16, torch.float16)
State = tuple[Tensor | int | None, ...]
"""What a backend's gradient needs in addition to the inputs and the output."""
Gradients = tuple[Tensor, Tensor, Tensor]

_aten = torch.ops.aten


class Backend(Protocol):
    """One way to compute attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]: ...

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients: ...


def attend(q: Tensor, k: Tensor, v: Tensor, graph: bool = True) -> tuple[Tensor, State]:
    """Scaled dot-product attention: q [B, h, N, d], k and v [B, h, M, d], all of one dtype -> [B, h, N, d] and a state.

    `graph=False` means that no backward pass follows; the state may then be empty.
    """
    return select_backend(q).forward(q, k, v, graph)


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
    """Gradients of q, k and v, given the gradient of `out` [B, h, N, d]."""
    return select_backend(q).backward(grad, q, k, v, out, state)


def select_backend(q: Tensor) -> Backend:
    """The backend for the device, dtype and head size of `q`."""
    half = q.dtype in HALF_DTYPES
    if is_cuda(q):
        aligned = q.shape[-1] % 8 == 0 and q.dtype != torch.float64
        return (FLASH if half and has_flash(q.device) else EFFICIENT) if aligned else AUTOGRAD
    if q.device.type == "cpu":
        return CHUNKED if half else FUSED_CPU
    return AUTOGRAD


def has_flash(device: torch.device) -> bool:
    """Whether a CUDA device is new enough for flash attention."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class _Chunked(NamedTuple):
    """One head and at most `QUERY_CHUNK` queries at a time, in two buffers that are reused; saves nothing for the gradient.

    torch computes the softmax of bf16 and fp16 tensors, and its gradient, in fp32 and rounds once, so the scores need no fp32 copy.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]:
        b, h, n, d = q.shape
        out = q.new_empty(b, n, h, d).transpose(1, 2)
        chunks, buffer = _chunks(n), q.new_empty(min(QUERY_CHUNK, n), k.shape[2])
        for head in range(b * h):
            queries, keys, values, into = (x[head // h, head % h] for x in (q, k, v, out))
            scaled = keys * d**-0.5
            for rows in chunks:
                matmul(_probabilities(queries[rows], scaled, buffer), values, out=into[rows])
        return out, ()

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        """Recompute the probabilities, bit-equal to those of the forward pass, then the gradients."""
        b, h, n, d = q.shape
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        chunks, *buffers = _chunks(n), *(q.new_empty(min(QUERY_CHUNK, n), k.shape[2]) for _ in range(2))
        for head in range(b * h):
            at = head // h, head % h
            queries, keys, values, g = (x[at].contiguous() for x in (q, k, v, grad))
            scaled = keys * d**-0.5
            sum_k, sum_v = (torch.zeros(keys.shape, dtype=torch.float32, device=q.device) for _ in range(2))
            for rows in chunks:
                probabilities = _probabilities(queries[rows], scaled, buffers[0])
                sum_v += matmul(probabilities.T, g[rows])
                scores = matmul(g[rows], values.T, out=buffers[1][: len(probabilities)])
                _aten._softmax_backward_data(scores, probabilities, -1, scores.dtype, grad_input=scores)
                matmul(scores, scaled, out=grad_q[at][rows])
                sum_k += matmul(scores.T, queries[rows])
            grad_k[at], grad_v[at] = sum_k.mul_(d**-0.5), sum_v
        return grad_q, grad_k, grad_v


def _chunks(n: int) -> list[slice]:
    """Slices of n rows: as few as possible of at most `QUERY_CHUNK` rows each, of nearly equal size."""
    size = -(-n // -(-n // QUERY_CHUNK))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _probabilities(queries: Tensor, keys: Tensor, buffer: Tensor) -> Tensor:
    """softmax(q kᵀ) of queries [n, d] and scaled keys [M, d], written to the first n rows of the buffer."""
    scores = matmul(queries, keys.T, out=buffer[: len(queries)])
    return torch.softmax(scores, -1, out=scores)


class _FusedCpu(NamedTuple):
    """torch's fused attention on the CPU; the state is the log-sum-exp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, (lse,)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, state[0], 0.0, False
        )
        return gradients


class _Flash(NamedTuple):
    """Flash attention (Dao, 2023); the state is the log-sum-exp, lengths and an unused random state."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]:
        out, *state, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
        return out, tuple(state)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        lse, lengths_q, lengths_k, longest_q, longest_k, seed, offset = state
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, lengths_q, lengths_k, longest_q, longest_k, 0.0, False, seed, offset
        )
        return gradients


class _Efficient(NamedTuple):
    """Memory-efficient attention (Rabe and Staats, 2021); the state is the log-sum-exp and an unused random state."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]:
        out, *state = _aten._scaled_dot_product_efficient_attention(q, k, v, None, graph)
        return out, tuple(state)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        return tuple(  # type: ignore[return-value]
            _aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, *state, 0.0, [True, True, True, False]
            )[:3]
        )


class _Autograd(NamedTuple):
    """`F.scaled_dot_product_attention`; its gradient repeats the forward pass."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, graph: bool) -> tuple[Tensor, State]:
        return F.scaled_dot_product_attention(q, k, v), ()

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)  # type: ignore[return-value]


CHUNKED, FUSED_CPU, FLASH, EFFICIENT, AUTOGRAD = _Chunked(), _FusedCpu(), _Flash(), _Efficient(), _Autograd()
