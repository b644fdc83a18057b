"""softmax(q kᵀ / √d) v without the attention matrix in memory, by the fastest exact route of each device.

CUDA, and the CPU in fp32 and fp64: torch's fused attention. On the CPU in bf16 and fp16 torch 2.13's fused attention
runs at its fp32 speed; a loop over 512 queries at a time, with the softmax in fp32, is 2.1–2.4 × faster there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.products import bmm

CHUNK = 512
"""Queries at a time in `chunked_attention`; its score matrix stays in the cache."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, q [B, h, N, d], k and v [B, h, M, d] -> [B, h, N, d], all of one dtype."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = chunked_attention(q, k, v)[0]
        return out
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("multitrain::chunked_attention", mutates_args=())
def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over `CHUNK` queries at a time, softmax in fp32.

    Args: q [B, h, N, d]; k, v [B, h, M, d]; all bf16 or fp16.
    Returns: the output [B, h, N, d] in the dtype of q, laid out as [B, N, h, d], and the log-sum-exp, float32 [B·h, N].
    """
    b, h, n, d = q.shape
    out = q.new_empty(b, n, h, d).transpose(1, 2)
    lse = q.new_empty(b * h, n, dtype=torch.float32)
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    keys = k.transpose(1, 2)
    for i in range(0, n, CHUNK):
        scores = _scores(q[:, i : i + CHUNK], keys)
        lse[:, i : i + CHUNK] = torch.logsumexp(scores, -1)
        part = bmm(torch.softmax(scores, -1).to(v.dtype), v)
        out[:, :, i : i + CHUNK] = part.view(b, h, -1, d)
    return out, lse


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """float32 [·, n, M]: the queries scaled, then multiplied in their own dtype."""
    return bmm(q * q.shape[-1] ** -0.5, keys).float()


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2), q.new_empty(b * h, n, dtype=torch.float32)


@torch.library.custom_op("multitrain::chunked_attention_backward", mutates_args=())
def _chunked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities are recomputed from the log-sum-exp (Dao et al., 2022, appendix B.4)."""
    b, h, n, d = q.shape
    shape_q, shape_k = (b, h, n, d), k.shape
    grad, q, k, v, out = (x.reshape(b * h, -1, d) for x in (grad, q, k, v, out))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    grad_q = torch.empty_like(q)
    grad_k = torch.zeros_like(k, dtype=torch.float32)
    grad_v = torch.zeros_like(v, dtype=torch.float32)
    for i in range(0, n, CHUNK):
        part = slice(i, i + CHUNK)
        probabilities = torch.exp(_scores(q[:, part], keys) - lse[:, part, None])
        grad_v += bmm(probabilities.to(v.dtype).transpose(1, 2), grad[:, part])
        grad_scores = probabilities * (bmm(grad[:, part], values).float() - delta[:, part])
        grad_scores = (grad_scores * d**-0.5).to(q.dtype)
        grad_q[:, part] = bmm(grad_scores, k)
        grad_k += bmm(grad_scores.transpose(1, 2), q[:, part])
    return grad_q.view(shape_q), grad_k.to(k.dtype).view(shape_k), grad_v.to(v.dtype).view(shape_k)


@_chunked_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = _chunked_attention_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]
    return gradients


chunked_attention.register_autograd(_backward, setup_context=_setup)

CHUNKED = torch.ops.multitrain.chunked_attention.default
"""The operation as a dispatcher sees it."""
