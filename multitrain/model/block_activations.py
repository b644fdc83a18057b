"""The intermediate results of a block, one line each, shared by its forward and backward pass (model/block.py)."""

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
    Grid,
    PoolArgmax,
    head_pool,
    read_positions,
    skip_pool,
)
from multitrain.model.random import Mask

_aten = torch.ops.aten


class CastParams:
    """A block's parameters cast to the compute dtype by one multi-tensor copy; pooling filters are repeated for all heads."""

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
        """Weight and bias of a linear layer, or of the given rows (outputs) only."""
        return self.cast[f"{name}.weight"][rows], self.cast[f"{name}.bias"][rows]

    def norm(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of a norm. CUDA's kernel needs them in the dtype of x; the CPU's kernel takes fp32 with any x."""
        source = self.cast if x.dtype == self.dtype and is_cuda(x) else self.full
        return source[f"{name}.weight"].detach(), source[f"{name}.bias"].detach()


def _lazy(compute: Callable[[BlockActivations], Any]) -> Any:
    """A property that is computed on first use and cached until `BlockActivations.release`."""
    name = compute.__name__

    def get(self: BlockActivations) -> Any:
        if name not in self.values:
            self.values[name] = compute(self)
        return self.values[name]

    return property(get, doc=compute.__doc__)


class BlockActivations:
    """The intermediate results of one block for one batch.

    Shapes: B clips, N tokens of the input, N' of the output, M keys and values, h heads of size d, C' output channels.
    """

    def __init__(
        self,
        block: BlockLayers,
        weights: CastParams,
        x: Tensor,
        masks: tuple[Mask | None, Mask | None],
        values: dict[str, Any] | None = None,
        graph: bool = True,
    ) -> None:
        self.block, self.shape, self.weights, self.x, self.masks = block, block.shape, weights, x, masks
        self.values: dict[str, Any] = values or {}
        self.graph = graph
        self.kv_positions = read_positions(self.shape.grid, self.shape.kv_stride, x.device) if block.compact else None

    def release(self, *names: str) -> None:
        """Drop cached intermediates; the next use recomputes them."""
        for name in names:
            self.values.pop(name, None)

    @property
    def kv_grid(self) -> tuple[Grid, int]:
        """The token grid on which keys and values are projected, and the stride of their pooling on it."""
        return (self.shape.grid, self.shape.kv_stride) if self.kv_positions is None else (self.kv_positions[1], 3)

    def eps(self, name: str) -> float:
        """The eps of the layer norm called `name`."""
        return float(self.block.get_submodule(name).eps)  # type: ignore[arg-type]

    def _norm(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(normalised x in the compute dtype, mean, 1 / standard deviation)."""
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], *self.weights.norm(name, x), self.eps(name))
        return out.to(self.weights.dtype), mean, scale

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, -1))

    @_lazy
    def normed(self) -> Any:
        return self._norm("norm1", self.x)

    @_lazy
    def kv_tokens(self) -> Tensor:
        """The normed tokens that are projected to keys and values."""
        u: Tensor = self.normed[0]
        return u if self.kv_positions is None else u.index_select(1, self.kv_positions[0])

    @_lazy
    def q_raw(self) -> Tensor:
        return linear(self.normed[0], *self.weights.linear("attn.qkv", slice(self.shape.dim_out)))

    @_lazy
    def kv_raw(self) -> Tensor:
        return linear(self.kv_tokens, *self.weights.linear("attn.qkv", slice(self.shape.dim_out, None)))

    @_lazy
    def q_pooled(self) -> Tensor:
        """[B, N', h, d]."""
        filters = self.weights.filters_q
        assert filters is not None
        return self._split(head_pool(self.q_raw, filters, self.shape.grid, self.shape.q_stride))

    @_lazy
    def kv_pooled(self) -> Tensor:
        """[2, B, M, h, d]: keys and values share a stride, so one convolution pools both."""
        both = head_pool(self.kv_raw, self.weights.filters_kv, *self.kv_grid)
        return both.unflatten(-1, (2, self.shape.heads, -1)).movedim(2, 0).contiguous()

    @_lazy
    def q_normed(self) -> Any:
        return self._norm("attn.norm_q", self.q_pooled)

    @_lazy
    def k_normed(self) -> Any:
        return self._norm("attn.norm_k", self.kv_pooled[0])

    @_lazy
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

    @_lazy
    def attention(self) -> tuple[Tensor, ...]:
        """Output [B, h, N', d], and the backend's state for the backward pass."""
        out, state = attend(*self.qkv, graph=self.graph)
        return out, *state  # type: ignore[arg-type]

    @_lazy
    def attn_out(self) -> Tensor:
        """Attention output of all heads, plus the pooled query where `residual_q` is set: [B, N', C']."""
        out = self.attention[0].transpose(1, 2)
        return (out + self.q if self.block.attn.residual_q else out).flatten(2)

    @_lazy
    def pooled_shortcut(self) -> tuple[Tensor, ...]:
        """The max-pooled shortcut of a stage change, and where each maximum was.

        The dtype is that of autocast: on CUDA its max pools stay in half precision; on the CPU the residual stream keeps its dtype.
        """
        out, pool_argmax = skip_pool(linear(self.x_cast, *self.weights.linear("proj_max_pool")), self.shape.grid)
        return out if is_cuda(self.x) else out.to(self.x.dtype), *pool_argmax

    @property
    def x_cast(self) -> Tensor:
        return self.x.to(self.weights.dtype)

    @_lazy
    def pool_argmax(self) -> PoolArgmax:
        return self.pooled_shortcut[1:]

    @_lazy
    def residual_mid(self) -> Tensor:
        """The residual stream after attention and before the MLP: [B, N', C']."""
        shortcut = self.x
        if self.block.proj_max_pool is not None:
            shortcut = self.pooled_shortcut[0]
        return _add(shortcut, linear(self.attn_out, *self.weights.linear("attn.proj")), self.masks[0])

    @_lazy
    def residual_mid_normed(self) -> Any:
        return self._norm("norm2", self.residual_mid)

    @_lazy
    def mlp_hidden(self) -> Tensor:
        return linear(self.residual_mid_normed[0], *self.weights.linear("mlp.fc1"))

    @_lazy
    def mlp_activated(self) -> Tensor:
        return F.gelu(self.mlp_hidden)

    def out(self, into: Tensor | None = None) -> Tensor:
        """The block's output, [B, N', C']."""
        return _add(self.residual_mid, linear(self.mlp_activated, *self.weights.linear("mlp.fc2")), self.masks[1], into)


def _add(shortcut: Tensor, branch: Tensor, mask: Mask | None, into: Tensor | None = None) -> Tensor:
    """The shortcut plus the branch, for the clips that stochastic depth keeps; rounded once."""
    if mask is None:
        return torch.add(shortcut, branch, out=into)
    return torch.addcmul(shortcut, branch, mask.keep, value=mask.scale, out=into)
