"""One transformer block whose gradient is written by hand, so that what is kept for the backward pass is chosen, not found.

Every intermediate of the block is a `_value`: computed when it is asked for, held until it is released. The forward pass asks for all, in
order, and holds on to those that the mode keeps; the backward pass asks for what it needs, and what was not kept is computed
again by the same line, from the same inputs, to the same bits.

| mode | keeps, beside the block's input | computes again |
|---|---|---|
| none | raw q, k and v, attention, the stream between the halves, the MLP's hidden layer | norms, poolings, GELU: no matrix product |
| mlp | the same without the hidden layer | and the MLP's first product |
| selective | attention | everything but attention and the block's last product |
| full | nothing | everything but the block's last product |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.attention import attend_backward
from multitrain.model.block_values import Pass, Weights
from multitrain.model.device import is_cuda
from multitrain.model.layers import BlockLayers, Recompute
from multitrain.model.low_precision import product
from multitrain.model.pooling import (
    head_pool_backward,
    skip_pool_backward,
)
from multitrain.model.random import Mask

KEPT: dict[str, tuple[str, ...]] = {
    "none": ("q_raw", "kv_raw", "attended", "middle", "hidden", "chosen"),
    "mlp": ("q_raw", "kv_raw", "attended", "middle", "chosen"),
    "selective": ("attended",),
    "full": (),
}
ROWS = 2048
"""Tokens of a clip at a time in the MLP of a CPU when there is no graph."""
_aten = torch.ops.aten


def run(block: BlockLayers, mode: Recompute, x: Tensor, masks: tuple[Mask | None, Mask | None]) -> Tensor:
    """The block's output [B, N', C'] of tokens x [B, N, C], with its graph where gradients are on."""
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled():
        with torch.autocast(x.device.type, enabled=False):
            return _forward(Pass(block, Weights(block, dtype), x, masks, graph=False), "full")
    out: Tensor = _Block.apply(block, mode, dtype, masks, x, *block.parameters())
    return out


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of the arithmetic on x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Block(torch.autograd.Function):
    """`run` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, block: BlockLayers, mode: Recompute, dtype: torch.dtype, masks: Any, x: Tensor, *_: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weights = Weights(block, dtype)
            computed = Pass(block, weights, x, masks)
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
            weights = ctx.weights or Weights(ctx.block, ctx.dtype)
            computed = Pass(ctx.block, weights, x, ctx.masks, values)
            ctx.weights = None
            del values
            grad_x, gradients = _backward(computed, grads[0])
            return None, None, None, None, grad_x, *_in_dtype_of(ctx.block, gradients)


def _flatten(values: Mapping[str, Any]) -> tuple[list[Tensor], list[tuple[str, int | None]]]:
    """Tensors, and how to find them again; a value may be a tensor or a tuple of tensors and other things."""
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


def _in_dtype_of(block: BlockLayers, gradients: dict[str, Tensor]) -> list[Tensor]:
    """Gradients in the order and types of the block's parameters; one multi-tensor copy converts those of another type."""
    named = list(block.named_parameters())
    other = [(name, torch.empty_like(p)) for name, p in named if gradients[name].dtype != p.dtype]
    if other:
        torch._foreach_copy_([t for _, t in other], [gradients[name] for name, _ in other])
        gradients |= dict(other)
    return [gradients[name].view(p.shape) for name, p in named]


def _branch_gradient(grad: Tensor, mask: Mask | None, dtype: torch.dtype) -> Tensor:
    if mask is not None:
        grad = torch.addcmul(mask.zero, grad, mask.ones, value=mask.factor)
    return grad.to(dtype)


def _forward(c: Pass, mode: Recompute) -> Tensor:
    """The block's output; of its intermediates, those that `mode` keeps stay."""

    def done(*names: str) -> None:
        c.release(*(name for name in names if name not in KEPT[mode]))

    if c.block.proj_max_pool is not None:
        _ = c.chosen if "chosen" in KEPT[mode] else c.projected
    _ = c.q_raw, c.kv_raw
    done("normed", "seen")
    _ = c.qkv
    done("q_raw", "kv_raw", "q_pooled", "kv_pooled")
    _ = c.mixed
    done("q_normed", "k_normed", "v_normed", "attended")
    _ = c.middle
    done("mixed", "projected")
    if not c.graph and c.x.device.type == "cpu":
        return _mlp_by_rows(c)
    _ = c.activated
    done("middle_normed", "hidden")
    out = c.out()
    done("activated", "middle")
    return out


def _mlp_by_rows(c: Pass) -> Tensor:
    """The block's output from `middle`, some tokens at a time, so that the hidden layer stays in a CPU's cache."""
    middle: Tensor = c.middle
    out = torch.empty_like(middle)
    for rows, into in zip(middle.split(ROWS, 1), out.split(ROWS, 1)):
        Pass(c.block, c.weights, c.x, c.masks, {"middle": rows}, graph=False).out(into)
    return out


def _backward(c: Pass, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the block's input and, by name, of its parameters."""
    gradients: dict[str, Tensor] = {}
    if "middle" not in c.values:
        _ = c.middle
        if c.block.proj_max_pool is not None:
            _ = c.chosen
        c.release("normed", "seen", "q_pooled", "q_normed", "kv_pooled", "k_normed", "v_normed", "mixed", "projected")
    grad = _mlp_backward(c, grad, gradients)
    return _attention_backward(c, grad, gradients), gradients


def _mlp_backward(c: Pass, grad: Tensor, gradients: dict[str, Tensor]) -> Tensor:
    """The gradient of `middle`, from that of the output."""
    branch = _branch_gradient(grad, c.masks[1], c.weights.dtype)
    branch = _linear_backward(c, "mlp.fc2", branch, c.activated, gradients)
    c.release("activated")
    _aten.gelu_backward(branch, c.hidden, grad_input=branch)
    c.release("hidden")
    branch = _linear_backward(c, "mlp.fc1", branch, c.middle_normed[0], gradients)
    return grad + _norm_backward(c, "norm2", branch, c.middle, c.values.pop("middle_normed"), gradients)


def _attention_backward(c: Pass, grad: Tensor, gradients: dict[str, Tensor]) -> Tensor:
    """The gradient of x, from that of `middle`."""
    c.release("middle")
    branch = _branch_gradient(grad, c.masks[0], c.weights.dtype)
    branch = _linear_backward(c, "attn.proj", branch, c.mixed, gradients)
    c.release("mixed")
    out, *state = c.attended
    mixed = c._split(branch)
    dq, dk, dv = (
        g.transpose(1, 2) for g in attend_backward(mixed.transpose(1, 2), *c.qkv, out, tuple(state))
    )  # fmt: skip
    c.release("attended")
    del out, state
    if c.block.attn.residual_q:
        dq = dq + mixed
    del mixed, branch
    du = _query_backward(c, dq, gradients)
    du = _key_value_backward(c, dk, dv, du, gradients)
    del dq, dk, dv
    through = _norm_backward(c, "norm1", du, c.x, c.normed, gradients)
    c.release("normed")
    if c.block.proj_max_pool is None:
        return grad + through
    chosen = c.chosen
    c.release("projected", "chosen")
    skip = skip_pool_backward(grad, chosen, c.shape.grid)
    return through + _linear_backward(c, "proj_max_pool", skip.to(c.weights.dtype), c.x_cast, gradients)


def _query_backward(c: Pass, grad: Tensor, gradients: dict[str, Tensor]) -> Tensor:
    """The gradient of the normed tokens by way of the queries, from that of q [B, N', h, d]."""
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


def _key_value_backward(c: Pass, dk: Tensor, dv: Tensor, du: Tensor, gradients: dict[str, Tensor]) -> Tensor:
    """`du` with the part that comes by way of keys and values, from their gradients [B, M, h, d]."""
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
    part = _linear_backward(c, "attn.qkv", both, c.seen, gradients, slice(s.dim_out, None))
    c.release("seen")
    return du.add_(part) if c.read is None else du.index_add_(1, c.read[0], part)


def _linear_backward(
    c: Pass, name: str, grad: Tensor, x: Tensor, gradients: dict[str, Tensor], rows: slice | None = None
) -> Tensor:
    """The gradient of a linear layer's input x, and into `gradients` those of weight and bias, or of some rows of them."""
    flat = grad.flatten(0, -2)
    if rows is None:
        gradients[f"{name}.weight"], gradients[f"{name}.bias"] = product(flat.T, x.flatten(0, -2)), flat.sum(0)
    else:
        product(flat.T, x.flatten(0, -2), out=gradients[f"{name}.weight"][rows])
        torch.sum(flat, 0, out=gradients[f"{name}.bias"][rows])
    return product(flat, c.weights.linear(name, rows or slice(None))[0]).view(x.shape)


def _norm_backward(
    c: Pass, name: str, grad: Tensor, x: Tensor, normed: tuple[Tensor, Tensor, Tensor], gradients: dict[str, Tensor]
) -> Tensor:
    """The gradient of a layer norm's input x, and into `gradients` those of its weight and bias."""
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
