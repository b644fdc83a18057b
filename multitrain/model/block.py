"""One transformer block with a hand-written backward pass, which fixes what the block saves for it (activation checkpointing).

Every intermediate result is a lazy attribute of `BlockActivations`: computed on first use, cached until released. The forward pass
computes all of them in order and releases those that the mode does not keep. The backward pass recomputes a released one on first
use: the same line of code with the same inputs gives the same bits.

| mode | saves, in addition to the block's input | recomputes |
|---|---|---|
| none | raw q, k and v, attention, the residual stream after attention, the MLP's hidden layer | norms, poolings, GELU: no matrix product |
| mlp | the same without the hidden layer | the same and the MLP's first matrix product |
| selective | attention | everything but attention and the block's last matrix product |
| full | nothing | everything but the block's last matrix product |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.attention import attend_backward
from multitrain.model.block_activations import BlockActivations, CastParams
from multitrain.model.device import is_cuda
from multitrain.model.layers import BlockLayers, Recompute
from multitrain.model.low_precision import matmul
from multitrain.model.pooling import (
    head_pool_backward,
    skip_pool_backward,
)
from multitrain.model.random import Mask

KEPT: dict[str, tuple[str, ...]] = {
    "none": ("q_raw", "kv_raw", "attention", "residual_mid", "mlp_hidden", "pool_argmax"),
    "mlp": ("q_raw", "kv_raw", "attention", "residual_mid", "pool_argmax"),
    "selective": ("attention",),
    "full": (),
}
MLP_CHUNK_TOKENS = 2048
"""Tokens of a clip at a time in the MLP on a CPU when no backward pass follows."""
_aten = torch.ops.aten


def run(block: BlockLayers, mode: Recompute, x: Tensor, masks: tuple[Mask | None, Mask | None]) -> Tensor:
    """The block's output [B, N', C'] for tokens x [B, N, C]; differentiable where gradients are enabled."""
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        with torch.autocast(x.device.type, enabled=False):
            return _forward(BlockActivations(block, CastParams(block, dtype), x, masks, graph=False), "full")
    out: Tensor = _Block.apply(block, mode, dtype, masks, x, *block.parameters())
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the block computes: autocast's where it is enabled, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Block(torch.autograd.Function):
    """`run` as an autograd function."""

    @staticmethod
    def forward(
        ctx: Any, block: BlockLayers, mode: Recompute, dtype: torch.dtype, masks: Any, x: Tensor, *_: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weights = CastParams(block, dtype)
            computed = BlockActivations(block, weights, x, masks)
            out = _forward(computed, mode)
        ctx.block, ctx.masks, ctx.dtype = block, masks, dtype
        ctx.weights = weights if mode in ("none", "mlp") else None
        kept = {name: computed.values[name] for name in KEPT[mode] if name in computed.values}
        tensors, ctx.layout = _flatten({"x": x, **kept})
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        values = _unflatten(ctx.saved_tensors, ctx.layout)
        x = values.pop("x")
        with torch.autocast(x.device.type, enabled=False):
            weights = ctx.weights or CastParams(ctx.block, ctx.dtype)
            computed = BlockActivations(ctx.block, weights, x, ctx.masks, values)
            ctx.weights = None
            del values
            named = zip(dict(ctx.block.named_parameters()), ctx.needs_input_grad[-len(weights.full) :])
            gradients = Gradients(name for name, trained in named if trained)
            grad_x = _backward(computed, grads[0], gradients)
            return None, None, None, None, grad_x, *_in_dtype_of(ctx.block, gradients)


class Gradients(dict[str, Tensor]):
    """Gradients of a block's parameters by name; those of frozen parameters may be missing."""

    def __init__(self, trained: Iterable[str]) -> None:
        super().__init__()
        self.trained = frozenset(trained)


def _flatten(values: Mapping[str, Any]) -> tuple[list[Tensor], list[tuple[str, int | None]]]:
    """The tensors of `values`, and the layout for `_unflatten`; a value is a tensor or a tuple with tensors."""
    tensors: list[Tensor] = []
    layout: list[Any] = []
    for name, value in values.items():
        parts = value if isinstance(value, tuple) else (value,)
        slots: list[Any] = []
        for part in parts:
            slots.append((True, len(tensors)) if isinstance(part, Tensor) else (False, part))
            if isinstance(part, Tensor):
                tensors.append(part)
        layout.append((name, isinstance(value, tuple), slots))
    return tensors, layout


def _unflatten(tensors: Sequence[Tensor], layout: list[Any]) -> dict[str, Any]:
    """The inverse of `_flatten`."""
    values = {}
    for name, several, slots in layout:
        parts = tuple(tensors[content] if is_tensor else content for is_tensor, content in slots)
        values[name] = parts if several else parts[0]
    return values


def _in_dtype_of(block: BlockLayers, gradients: Gradients) -> list[Tensor | None]:
    """Gradients in the order and dtypes of the block's parameters, None for frozen ones; one multi-tensor copy converts those of another
    dtype."""
    named = list(block.named_parameters())
    trained = [(name, p) for name, p in named if name in gradients.trained]
    other = [(name, torch.empty_like(p)) for name, p in trained if gradients[name].dtype != p.dtype]
    if other:
        torch._foreach_copy_([t for _, t in other], [gradients[name] for name, _ in other])
        gradients.update(other)
    return [gradients[name].view(p.shape) if name in gradients.trained else None for name, p in named]


def _branch_gradient(grad: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a residual branch, given that of the sum: masked and scaled by stochastic depth, in `dtype`."""
    if mask is not None:
        grad = torch.addcmul(mask.zero, grad, mask.keep, value=mask.scale)
    return grad.to(dtype)


def _forward(c: BlockActivations, mode: Recompute) -> Tensor:
    """The block's output; releases every intermediate that `mode` does not keep."""

    def done(*names: str) -> None:
        c.release(*(name for name in names if name not in KEPT[mode]))

    if c.block.proj_max_pool is not None:
        _ = c.pool_argmax if "pool_argmax" in KEPT[mode] else c.pooled_shortcut
    _ = c.q_raw, c.kv_raw
    done("normed", "kv_tokens")
    _ = c.qkv
    done("q_raw", "kv_raw", "q_pooled", "kv_pooled")
    _ = c.attn_out
    done("q_normed", "k_normed", "v_normed", "attention")
    _ = c.residual_mid
    done("attn_out", "pooled_shortcut")
    if not c.graph and c.x.device.type == "cpu":
        return _mlp_by_rows(c)
    _ = c.mlp_activated
    done("residual_mid_normed", "mlp_hidden")
    out = c.out()
    done("mlp_activated", "residual_mid")
    return out


def _mlp_by_rows(c: BlockActivations) -> Tensor:
    """The block's output from `residual_mid`, in chunks of tokens, so that the hidden layer stays in the CPU's cache."""
    residual_mid: Tensor = c.residual_mid
    out = torch.empty_like(residual_mid)
    for rows, into in zip(residual_mid.split(MLP_CHUNK_TOKENS, 1), out.split(MLP_CHUNK_TOKENS, 1)):
        BlockActivations(c.block, c.weights, c.x, c.masks, {"residual_mid": rows}, graph=False).out(into)
    return out


def _backward(c: BlockActivations, grad: Tensor, gradients: Gradients) -> Tensor:
    """The gradient of the block's input, given that of its output; writes those of its parameters into `gradients`."""
    if "residual_mid" not in c.values:
        _ = c.residual_mid
        if c.block.proj_max_pool is not None:
            _ = c.pool_argmax
        c.release(
            "normed",
            "kv_tokens",
            "q_pooled",
            "q_normed",
            "kv_pooled",
            "k_normed",
            "v_normed",
            "attn_out",
            "pooled_shortcut",
        )
    return _attention_backward(c, _mlp_backward(c, grad, gradients), gradients)


def _mlp_backward(c: BlockActivations, grad: Tensor, gradients: Gradients) -> Tensor:
    """The gradient of `residual_mid`, given that of the output."""
    branch = _branch_gradient(grad, c.masks[1], c.weights.dtype)
    branch = _linear_backward(c, "mlp.fc2", branch, c.mlp_activated, gradients)
    c.release("mlp_activated")
    _aten.gelu_backward(branch, c.mlp_hidden, grad_input=branch)
    c.release("mlp_hidden")
    branch = _linear_backward(c, "mlp.fc1", branch, c.residual_mid_normed[0], gradients)
    return grad + _norm_backward(c, "norm2", branch, c.residual_mid, c.values.pop("residual_mid_normed"), gradients)


def _attention_backward(c: BlockActivations, grad: Tensor, gradients: Gradients) -> Tensor:
    """The gradient of x, given that of `residual_mid`."""
    c.release("residual_mid")
    branch = _branch_gradient(grad, c.masks[0], c.weights.dtype)
    branch = _linear_backward(c, "attn.proj", branch, c.attn_out, gradients)
    c.release("attn_out")
    out, *state = c.attention
    grad_out = c._split(branch)
    dq, dk, dv = (
        g.transpose(1, 2) for g in attend_backward(grad_out.transpose(1, 2), *c.qkv, out, tuple(state))
    )  # fmt: skip
    c.release("attention")
    del out, state
    if c.block.attn.residual_q:
        dq = dq + grad_out
    del grad_out, branch
    du = _query_backward(c, dq, gradients)
    du = _key_value_backward(c, dk, dv, du, gradients)
    del dq, dk, dv
    through = _norm_backward(c, "norm1", du, c.x, c.normed, gradients)
    c.release("normed")
    if c.block.proj_max_pool is None:
        return grad + through
    pool_argmax = c.pool_argmax
    c.release("pooled_shortcut", "pool_argmax")
    skip = skip_pool_backward(grad, pool_argmax, c.shape.grid)
    return through + _linear_backward(c, "proj_max_pool", skip.to(c.weights.dtype), c.x_cast, gradients)


def _query_backward(c: BlockActivations, grad: Tensor, gradients: Gradients) -> Tensor:
    """The part of the normed tokens' gradient that flows through the queries, given that of q [B, N', h, d]."""
    s, filters = c.shape, c.weights.filters_q
    if filters is not None:
        grad = _norm_backward(c, "attn.norm_q", grad, c.q_pooled, c.q_normed, gradients)
        c.release("q_pooled", "q_normed")
        grad, taps = head_pool_backward(grad.flatten(2), c.q_raw, filters, s.grid, s.q_stride)
        gradients["attn.pool_q.weight"] = taps.unflatten(0, (s.heads, -1)).sum(0)
    else:
        grad = grad.flatten(2)
    c.release("q_raw")
    weight = torch.empty_like(c.weights.cast["attn.qkv.weight"])
    bias = torch.empty_like(c.weights.cast["attn.qkv.bias"])
    gradients["attn.qkv.weight"], gradients["attn.qkv.bias"] = weight, bias
    return _linear_backward(c, "attn.qkv", grad, c.normed[0], gradients, slice(s.dim_out))


def _key_value_backward(c: BlockActivations, dk: Tensor, dv: Tensor, du: Tensor, gradients: Gradients) -> Tensor:
    """`du` plus the part that flows through keys and values, given their gradients [B, M, h, d]."""
    s = c.shape
    dk = _norm_backward(c, "attn.norm_k", dk, c.kv_pooled[0], c.k_normed, gradients)
    dv = _norm_backward(c, "attn.norm_v", dv, c.kv_pooled[1], c.v_normed, gradients)
    c.release("kv_pooled", "k_normed", "v_normed")
    both, taps = head_pool_backward(
        torch.cat([dk, dv], 2).flatten(2), c.kv_raw, c.weights.filters_kv, *c.kv_grid
    )  # fmt: skip
    c.release("kv_raw")
    taps_k, taps_v = taps.unflatten(0, (2, s.heads, -1)).sum(1)
    gradients["attn.pool_k.weight"], gradients["attn.pool_v.weight"] = taps_k, taps_v
    part = _linear_backward(c, "attn.qkv", both, c.kv_tokens, gradients, slice(s.dim_out, None))
    c.release("kv_tokens")
    return du.add_(part) if c.kv_positions is None else du.index_add_(1, c.kv_positions[0], part)


def _linear_backward(
    c: BlockActivations, name: str, grad: Tensor, x: Tensor, gradients: Gradients, rows: slice | None = None
) -> Tensor:
    """The gradient of a linear layer's input x; writes those of weight and bias, or of some of their rows, unless they are frozen, into
    `gradients`."""
    flat = grad.flatten(0, -2)
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight in gradients.trained:
        product = matmul(flat.T, x.flatten(0, -2), out=None if rows is None else gradients[weight][rows])
        gradients.setdefault(weight, product)
    if bias in gradients.trained:
        total = torch.sum(flat, 0, out=None if rows is None else gradients[bias][rows])
        gradients.setdefault(bias, total)
    return matmul(flat, c.weights.linear(name, rows or slice(None))[0]).view(x.shape)


def _norm_backward(
    c: BlockActivations,
    name: str,
    grad: Tensor,
    x: Tensor,
    normed: tuple[Tensor, Tensor, Tensor],
    gradients: Gradients,
) -> Tensor:
    """The gradient of a layer norm's input x; writes those of its weight and bias into `gradients`."""
    _, mean, scale = normed
    weight, bias = c.weights.norm(name, x)
    grad, size = grad.to(x.dtype).contiguous(), x.shape[-1:]
    by_hand = x.device.type == "cpu" and not is_cuda(x) and x.dtype in (torch.bfloat16, torch.float16)
    mask = [True, not by_hand, not by_hand]
    grad_x, grad_weight, grad_bias = _aten.native_layer_norm_backward(grad, x, size, mean, scale, weight, bias, mask)
    if by_hand:  # torch 2.13 sums these in bf16 on the CPU: 6 % off after 3,136 tokens
        plain = F.layer_norm(x, size, eps=c.eps(name))
        grad_weight = plain.mul_(grad).flatten(0, -2).sum(0)
        grad_bias = grad.flatten(0, -2).sum(0)
    gradients[f"{name}.weight"], gradients[f"{name}.bias"] = grad_weight, grad_bias
    return grad_x  # type: ignore[no-any-return]
