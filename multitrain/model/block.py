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

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.attention import attend, attend_backward
from multitrain.model.device import is_cuda
from multitrain.model.pooling import (
    Chosen,
    Grid,
    head_pool,
    head_pool_backward,
    read_positions,
    skip_pool,
    skip_pool_backward,
)
from multitrain.model.products import linear, product
from multitrain.model.random import Mask

if TYPE_CHECKING:
    from multitrain.model.mvit import Block

Recompute = Literal["none", "mlp", "selective", "full"]
KEPT: dict[str, tuple[str, ...]] = {
    "none": ("q_raw", "kv_raw", "attended", "middle", "hidden", "chosen"),
    "mlp": ("q_raw", "kv_raw", "attended", "middle", "chosen"),
    "selective": ("attended",),
    "full": (),
}
_aten = torch.ops.aten


def run(block: Block, mode: Recompute, x: Tensor, masks: tuple[Mask | None, Mask | None]) -> Tensor:
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
        ctx: Any, block: Block, mode: Recompute, dtype: torch.dtype, masks: Any, x: Tensor, *_: Tensor
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


def _in_dtype_of(block: Block, gradients: dict[str, Tensor]) -> list[Tensor]:
    """Gradients in the order and types of the block's parameters; one multi-tensor copy converts those of another type."""
    named = list(block.named_parameters())
    other = [(name, torch.empty_like(p)) for name, p in named if gradients[name].dtype != p.dtype]
    if other:
        torch._foreach_copy_([t for _, t in other], [gradients[name] for name, _ in other])
        gradients |= dict(other)
    return [gradients[name].view(p.shape) for name, p in named]


class Weights:
    """A block's parameters in the type of the arithmetic, converted by one multi-tensor copy; filters repeated for all heads."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.full = dict(block.named_parameters())
        self.cast = {name: p.detach() for name, p in self.full.items()}
        self.dtype = dtype
        other = [name for name, p in self.full.items() if p.dtype != dtype]
        if other:
            converted = [torch.empty_like(self.cast[name], dtype=dtype) for name in other]
            torch._foreach_copy_(converted, [self.cast[name] for name in other])
            self.cast |= zip(other, converted)
        heads = block.shape.heads
        pools = {which: self.cast.get(f"attn.pool_{which}.weight") for which in "qkv"}
        q, k, v = pools["q"], pools["k"], pools["v"]
        assert k is not None
        assert v is not None
        pools_of_a_head = torch.stack([k, v] if q is None else [k, v, q])[:, None]
        filters = pools_of_a_head.expand(-1, heads, *[-1] * k.dim()).flatten(0, 2)
        self.filters_kv, self.filters_q = (
            filters[: 2 * heads * len(k)],
            None if q is None else filters[-heads * len(q) :],
        )

    def linear(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer, or those of some outputs."""
        return self.cast[f"{name}.weight"][rows], self.cast[f"{name}.bias"][rows]

    def norm(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm: CUDA's kernel takes only x's own type; the CPU's also takes fp32 ones with any x."""
        source = self.cast if x.dtype == self.dtype and is_cuda(x) else self.full
        return source[f"{name}.weight"].detach(), source[f"{name}.bias"].detach()


def _value(compute: Callable[[Pass], Any]) -> Any:
    """An intermediate: computed when asked for, held until released."""
    name = compute.__name__

    def get(self: Pass) -> Any:
        if name not in self.values:
            self.values[name] = compute(self)
        return self.values[name]

    return property(get, doc=compute.__doc__)


class Pass:
    """The intermediates of one block on one batch."""

    def __init__(
        self,
        block: Block,
        weights: Weights,
        x: Tensor,
        masks: tuple[Mask | None, Mask | None],
        values: dict[str, Any] | None = None,
        graph: bool = True,
    ) -> None:
        self.block, self.shape, self.weights, self.x, self.masks = block, block.shape, weights, x, masks
        self.values: dict[str, Any] = values or {}
        self.graph = graph
        self.read = read_positions(self.shape.grid, self.shape.kv_stride, x.device) if block.compact else None

    def release(self, *names: str) -> None:
        """Let go of intermediates."""
        for name in names:
            self.values.pop(name, None)

    @property
    def kv_grid(self) -> tuple[Grid, int]:
        """The grid that keys and values are projected on, and the stride of their pooling there."""
        return (self.shape.grid, self.shape.kv_stride) if self.read is None else (self.read[1], 3)

    def eps(self, name: str) -> float:
        """What the norm called `name` adds to the variance."""
        return float(self.block.get_submodule(name).eps)  # type: ignore[arg-type]

    def _norm(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normed in the type of the arithmetic, mean, 1/deviation)."""
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], *self.weights.norm(name, x), self.eps(name))
        return out.to(self.weights.dtype), mean, scale

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, -1))

    @_value
    def normed(self) -> Any:
        return self._norm("norm1", self.x)

    @_value
    def seen(self) -> Tensor:
        """The normed tokens that keys and values are made of."""
        u: Tensor = self.normed[0]
        return u if self.read is None else u.index_select(1, self.read[0])

    @_value
    def q_raw(self) -> Tensor:
        return linear(self.normed[0], *self.weights.linear("attn.qkv", slice(self.shape.dim_out)))

    @_value
    def kv_raw(self) -> Tensor:
        return linear(self.seen, *self.weights.linear("attn.qkv", slice(self.shape.dim_out, None)))

    @_value
    def q_pooled(self) -> Tensor:
        """[B, N', h, d]."""
        filters = self.weights.filters_q
        assert filters is not None
        return self._split(head_pool(self.q_raw, filters, self.shape.grid, self.shape.q_stride))

    @_value
    def kv_pooled(self) -> Tensor:
        """[2, B, M, h, d]: keys and values share a stride, so one convolution pools both."""
        both = head_pool(self.kv_raw, self.weights.filters_kv, *self.kv_grid)
        return both.unflatten(-1, (2, self.shape.heads, -1)).movedim(2, 0).contiguous()

    @_value
    def q_normed(self) -> Any:
        return self._norm("attn.norm_q", self.q_pooled)

    @_value
    def k_normed(self) -> Any:
        return self._norm("attn.norm_k", self.kv_pooled[0])

    @_value
    def v_normed(self) -> Any:
        return self._norm("attn.norm_v", self.kv_pooled[1])

    @property
    def q(self) -> Tensor:
        """[B, N', h, d]."""
        q: Tensor = self._split(self.q_raw) if self.weights.filters_q is None else self.q_normed[0]
        return q

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, h, ·, d]."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k_normed[0], self.v_normed[0]))
        return q, k, v

    @_value
    def attended(self) -> tuple[Tensor, ...]:
        """Output [B, h, N', d], and the state of its route."""
        out, state = attend(*self.qkv, graph=self.graph)
        return out, *state  # type: ignore[arg-type]

    @_value
    def mixed(self) -> Tensor:
        """[B, N', C']."""
        out = self.attended[0].transpose(1, 2)
        return (out + self.q if self.block.attn.residual_q else out).flatten(2)

    @_value
    def projected(self) -> tuple[Tensor, ...]:
        """The shortcut of a stage change, and the choices of its max pool."""
        out, chosen = skip_pool(linear(self.x_cast, *self.weights.linear("proj_max_pool")), self.shape.grid)
        return out, *chosen

    @property
    def x_cast(self) -> Tensor:
        return self.x.to(self.weights.dtype)

    @_value
    def chosen(self) -> Chosen:
        return self.projected[1:]

    @_value
    def middle(self) -> Tensor:
        """The stream after the attention's half."""
        shortcut = self.x
        if self.block.proj_max_pool is not None:
            shortcut = self.projected[0]
        return _add(shortcut, linear(self.mixed, *self.weights.linear("attn.proj")), self.masks[0])

    @_value
    def middle_normed(self) -> Any:
        return self._norm("norm2", self.middle)

    @_value
    def hidden(self) -> Tensor:
        return linear(self.middle_normed[0], *self.weights.linear("mlp.fc1"))

    @_value
    def activated(self) -> Tensor:
        return F.gelu(self.hidden)

    @property
    def out(self) -> Tensor:
        return _add(self.middle, linear(self.activated, *self.weights.linear("mlp.fc2")), self.masks[1])


def _add(shortcut: Tensor, branch: Tensor, mask: Mask | None) -> Tensor:
    """The shortcut plus the branch of the clips that stochastic depth keeps, rounded once."""
    return shortcut + branch if mask is None else torch.addcmul(shortcut, branch, mask.ones, value=mask.factor)


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
    _ = c.activated
    done("middle_normed", "hidden")
    out = c.out
    done("activated", "middle")
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
    branch = _aten.gelu_backward(branch, c.hidden)
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
