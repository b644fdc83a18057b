"""softmax(q kᵀ / √d) v without the attention matrix in memory, and its gradient, by the fastest exact route of each device.

| device, type | route | reason |
|---|---|---|
| CUDA, bf16 and fp16, from compute capability 8.0 | flash | head size 96, no bias, no mask: what it is made for |
| CUDA, otherwise but fp64 | memory-efficient | flash has no fp32 and needs Ampere |
| CPU, fp32 and fp64 | torch's fused one | |
| CPU, bf16 and fp16 | 512 queries at a time, softmax in fp32 | torch 2.13's fused one runs these at its fp32 speed there |
| elsewhere | torch's choice | its gradient is taken by autograd, from the inputs alone |

`attend` gives a state beside its output; `attend_backward` needs both. Everything works on tensors without a graph.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.device import is_cuda
from multitrain.model.products import bmm

CHUNK = 512
"""Queries at a time in the chunked route; its score matrix stays in the cache."""
HALVES = (torch.bfloat16, torch.float16)
State = tuple[Tensor | int | None, ...]
"""What a route's gradient needs beside inputs and output."""
Gradients = tuple[Tensor, Tensor, Tensor]

_aten = torch.ops.aten


class Route(Protocol):
    """One way to compute attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]: ...

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients: ...


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
    """Scaled dot-product attention, q [B, h, N, d], k and v [B, h, M, d], of one dtype -> [B, h, N, d] and a state."""
    return route(q).forward(q, k, v)


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
    """Gradients of q, k and v, from that of `out` [B, h, N, d]."""
    return route(q).backward(grad, q, k, v, out, state)


def route(q: Tensor) -> Route:
    """The route for queries like `q`."""
    half = q.dtype in HALVES
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
    """`CHUNK` queries at a time; the state is the log-sum-exp, float32 [B·h, N]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        b, h, n, d = q.shape
        out = q.new_empty(b, n, h, d).transpose(1, 2)
        lse = q.new_empty(b * h, n, dtype=torch.float32)
        q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
        keys = k.transpose(1, 2)
        for i in range(0, n, CHUNK):
            scores = _scores(q[:, i : i + CHUNK], keys)
            probabilities = torch.softmax(scores, -1)
            # The largest probability is exp(largest score - lse): two maxima are cheaper than a log-sum-exp.
            torch.sub(scores.amax(-1), probabilities.amax(-1).log_(), out=lse[:, i : i + CHUNK])
            part = bmm(probabilities.to(v.dtype), v)
            out[:, :, i : i + CHUNK] = part.view(b, h, -1, d)
        return out, (lse,)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        """The probabilities are computed again from the log-sum-exp (Dao et al., 2022, appendix B.4)."""
        b, h, n, d = q.shape
        shape_q, shape_k, (lse,) = (b, h, n, d), k.shape, state
        assert isinstance(lse, Tensor)
        grad, q, k, v, out = (x.reshape(b * h, -1, d) for x in (grad, q, k, v, out))
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        grad_q = torch.empty_like(q)
        grad_k = torch.zeros_like(k, dtype=torch.float32)
        grad_v = torch.zeros_like(v, dtype=torch.float32)
        for i in range(0, n, CHUNK):
            part = slice(i, i + CHUNK)
            probabilities = _scores(q[:, part], keys).sub_(lse[:, part, None]).exp_()
            grad_v += bmm(probabilities.to(v.dtype).transpose(1, 2), grad[:, part])
            grad_scores = bmm(grad[:, part], values).float().sub_(delta[:, part]).mul_(probabilities).mul_(d**-0.5)
            grad_scores = grad_scores.to(q.dtype)
            grad_q[:, part] = bmm(grad_scores, k)
            grad_k += bmm(grad_scores.transpose(1, 2), q[:, part])
        return grad_q.view(shape_q), grad_k.to(k.dtype).view(shape_k), grad_v.to(v.dtype).view(shape_k)


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """float32 [·, n, M]: the queries scaled, then multiplied in their own dtype."""
    return bmm(q * q.shape[-1] ** -0.5, keys).float()


class _FusedCpu(NamedTuple):
    """torch's fused attention on the CPU; the state is the log-sum-exp."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, (lse,)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        gradients: Gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, state[0], 0.0, False
        )
        return gradients


class _Flash(NamedTuple):
    """Flash attention (Dao, 2023); the state is the log-sum-exp, lengths and an unused random state."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        out, *state = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        return out, tuple(state)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        return tuple(  # type: ignore[return-value]
            _aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, *state, 0.0, [True, True, True, False]
            )[:3]
        )


class _Autograd(NamedTuple):
    """`F.scaled_dot_product_attention`; its gradient repeats the forward pass."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        return F.scaled_dot_product_attention(q, k, v), ()

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State) -> Gradients:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, grad)  # type: ignore[return-value]


CHUNKED, FUSED_CPU, FLASH, EFFICIENT, AUTOGRAD = _Chunked(), _FusedCpu(), _Flash(), _Efficient(), _Autograd()
