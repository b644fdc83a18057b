"""Every intermediate of a block, by one line each, which the forward and the backward pass both ask for (model/block.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.attention import attend
from multitrain.model.device import is_cuda
from multitrain.model.layers import BlockLayers
from multitrain.model.low_precision import linear
from multitrain.model.pooling import (
    Chosen,
    Grid,
    head_pool,
    read_positions,
    skip_pool,
)
from multitrain.model.random import Mask

_aten = torch.ops.aten


class Weights:
    """A block's parameters in the type of the arithmetic, converted by one multi-tensor copy; filters repeated for all heads."""

    def __init__(self, block: BlockLayers, dtype: torch.dtype) -> None:
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
        block: BlockLayers,
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
        """The shortcut of a stage change, and the choices of its max pool.

        As under autocast, whose max pools stay in half precision on CUDA only: on the CPU the stream keeps its type.
        """
        out, chosen = skip_pool(linear(self.x_cast, *self.weights.linear("proj_max_pool")), self.shape.grid)
        return out if is_cuda(self.x) else out.to(self.x.dtype), *chosen

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

    def out(self, into: Tensor | None = None) -> Tensor:
        """The block's output, [B, N', C']."""
        return _add(self.middle, linear(self.activated, *self.weights.linear("mlp.fc2")), self.masks[1], into)


def _add(shortcut: Tensor, branch: Tensor, mask: Mask | None, into: Tensor | None = None) -> Tensor:
    """The shortcut plus the branch of the clips that stochastic depth keeps, rounded once."""
    if mask is None:
        return torch.add(shortcut, branch, out=into)
    return torch.addcmul(shortcut, branch, mask.ones, value=mask.factor, out=into)
