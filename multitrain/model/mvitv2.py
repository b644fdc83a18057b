"""The official MViTv2 (Li et al., CVPR 2022) and MViT (Fan et al., ICCV 2021), with the parameters' official names.

It differs from the published network of this method (model/mvit.py) by relative positions, a class token, the projection of the normed
tokens in the shortcut, and the options of `MViTv2Config`. Autograd makes its backward pass; poolings and their gradients are shared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multitrain.config import ModelConfig
from multitrain.model.backbone import Backbone, masks_of_blocks
from multitrain.model.block import compute_dtype
from multitrain.model.layers import BlockShape, HeadPool, Mlp, Recompute
from multitrain.model.low_precision import Linear, linear
from multitrain.model.mvit import PatchEmbed, patch_grid
from multitrain.model.pooling import read_positions
from multitrain.model.pooling_autograd import pool_heads, pool_shortcut
from multitrain.model.random import KeyedDropPath, Mask, stream_of
from multitrain.model.recompute import Recomputed
from multitrain.model.relative import attend_with_positions, further_channels


@dataclass(frozen=True)
class Geometry(BlockShape):
    """The geometry of one block, whose grids are without the class token."""

    dim_attn: int
    """Channels of the attention."""
    table_sides: int
    """Rows (and columns) for which the tables of relative positions are made; smaller than the grids where a stage's grid is odd."""


def geometries(config: ModelConfig) -> list[Geometry]:
    """The geometry of every block."""
    found: list[Geometry] = []
    widen = config.mvitv2.widen
    dim, heads, grid, kv_stride = config.width, config.heads, patch_grid(config), config.kv_stride
    side = grid[1]
    for i in range(config.depth):
        change = i in config.stages
        stride = 2 if change else 1
        if change:
            heads, kv_stride = heads * 2, max(kv_stride // 2, 1)
        dim_out = dim * 2 if (i if widen == "attention" else i + 1) in config.stages else dim
        found.append(
            Geometry(
                dim_in=dim,
                dim_attn=dim_out if widen == "attention" else dim,
                dim_out=dim_out,
                heads=heads,
                grid=grid,
                q_stride=stride,
                kv_stride=kv_stride,
                pool_q=change or config.pool_q_everywhere,
                table_sides=max(side // stride, side // kv_stride),
                drop_path=config.drop_path * i / max(config.depth - 1, 1),
            )
        )
        dim, grid, side = dim_out, found[-1].q_grid, side // stride
    return found


class RelativeAttention(nn.Module):
    """Pooled attention with relative positions: normed tokens [B, 1 + N, dim_in] -> tokens [B, 1 + N', dim_attn] before the projection.

    The 1 stands for the class token, which is not pooled, and is absent without one.
    """

    def __init__(self, shape: Geometry, config: ModelConfig) -> None:
        super().__init__()
        options, size = config.mvitv2, shape.dim_attn // shape.heads
        self.shape = shape
        self.residual_q = config.residual_q
        self.first = int(options.class_token)
        """Tokens before those of the grid."""
        self.compact = True
        """Whether keys and values are projected only at the tokens that their pooling reads: same results, fewer operations."""
        if options.relative_space:
            self.rel_pos_h = nn.Parameter(torch.empty(2 * shape.table_sides - 1, size))
            self.rel_pos_w = nn.Parameter(torch.empty(2 * shape.table_sides - 1, size))
        if options.relative_time:
            self.rel_pos_t = nn.Parameter(torch.empty(2 * shape.grid[0] - 1, size))
        if options.separate_qkv:
            for name in "qkv":
                self.add_module(name, Linear(shape.dim_in, shape.dim_attn, bias=options.qkv_bias))
        else:
            self.qkv = Linear(shape.dim_in, 3 * shape.dim_attn, bias=options.qkv_bias)
        self.proj = Linear(shape.dim_attn, shape.dim_attn)
        for name in "qkv" if shape.pool_q else "kv":
            self.add_module(f"pool_{name}", HeadPool(size))
            self.add_module(f"norm_{name}", nn.LayerNorm(size, eps=options.norm_eps))

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        q = self._pooled_queries(linear(x, *self._layers("q")))
        k, v = self._pooled_keys_values(x)
        tables = tuple(getattr(self, f"rel_pos_{axis}", None) for axis in ("t", "h", "w"))
        out = attend_with_positions(q, k, v, shape.q_grid, shape.kv_grid, tables)  # type: ignore[arg-type]
        if self.residual_q:
            out = torch.cat([out[:, : self.first], out[:, self.first :] + q[:, self.first :]], 1)
        return linear(out.flatten(2), self.proj.weight, self.proj.bias)

    def added_products(self) -> int:
        """Multiply-accumulates of a clip by the further channels that relative positions take in attention (model/relative.py)."""
        shape = self.shape
        used = (hasattr(self, "rel_pos_t"), hasattr(self, "rel_pos_h"), hasattr(self, "rel_pos_w"))
        added = further_channels(shape.dim_attn // shape.heads, sum(n for n, has in zip(shape.kv_grid, used) if has))
        n, m = (self.first + math.prod(grid) for grid in (shape.q_grid, shape.kv_grid))
        return 2 * shape.heads * n * m * added

    def _layers(self, names: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the layers of queries, or of keys and values, as one."""
        if hasattr(self, "qkv"):
            rows = slice(self.shape.dim_attn) if names == "q" else slice(self.shape.dim_attn, None)
            return self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows]
        weight = torch.cat([self.get_parameter(f"{name}.weight") for name in names])
        biased = self.get_submodule(names[0]).bias is not None
        return weight, torch.cat([self.get_parameter(f"{name}.bias") for name in names]) if biased else None

    def _filters(self, names: str, dtype: torch.dtype) -> Tensor:
        """The filters of these poolings, one for each channel of all heads."""
        filters: list[Tensor] = [self.get_parameter(f"pool_{name}.weight") for name in names]
        repeated = torch.stack(filters)[:, None].expand(-1, self.shape.heads, *[-1] * filters[0].dim())
        return repeated.flatten(0, 2).to(dtype)

    def _pooled_queries(self, q: Tensor) -> Tensor:
        """[B, 1 + N, dim_attn] -> [B, 1 + N', h, d]."""
        shape = self.shape
        if not shape.pool_q:
            return q.unflatten(-1, (shape.heads, -1))
        pooled = pool_heads(q[:, self.first :], self._filters("q", q.dtype), shape.grid, shape.q_stride)
        return self._normed("q", torch.cat([q[:, : self.first], pooled], 1)).to(q.dtype)

    def _pooled_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B, 1 + M, h, d], of normed tokens x; they share a stride, so one convolution pools both."""
        grid, stride = self.shape.grid, self.shape.kv_stride
        read = read_positions(grid, stride, x.device) if self.compact else None
        if read is not None:
            (positions, grid), stride = read, 3
            x = torch.cat([x[:, : self.first], x[:, self.first :].index_select(1, positions)], 1)
        both = linear(x, *self._layers("kv"))
        pooled = pool_heads(both[:, self.first :], self._filters("kv", both.dtype), grid, stride)
        k, v = torch.cat([both[:, : self.first], pooled], 1).chunk(2, -1)
        return self._normed("k", k).to(both.dtype), self._normed("v", v).to(both.dtype)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm: nn.LayerNorm = self.get_submodule(f"norm_{name}")  # type: ignore[assignment]
        return normed(norm, x.unflatten(-1, (self.shape.heads, -1)))


class RelativeBlock(nn.Module):
    """Attention and MLP, each with a residual connection: tokens [B, 1 + N, dim_in] -> tokens [B, 1 + N', dim_out]."""

    def __init__(self, shape: Geometry, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.shape = shape
        eps = config.mvitv2.norm_eps
        self.norm1 = nn.LayerNorm(shape.dim_in, eps=eps)
        self.attn = RelativeAttention(shape, config)
        self.norm2 = nn.LayerNorm(shape.dim_attn, eps=eps)
        self.mlp = Mlp(shape.dim_attn, int(shape.dim_attn * config.mlp_ratio), shape.dim_out)
        self.proj = Linear(shape.dim_in, shape.dim_out) if shape.dim_in != shape.dim_out else None
        self.drop_path_attn = KeyedDropPath(shape.drop_path, stream_of(f"{name}.attn"))
        self.drop_path_mlp = KeyedDropPath(shape.drop_path, stream_of(f"{name}.mlp"))

    def forward(self, x: Tensor, masks: tuple[Mask | None, Mask | None] = (None, None)) -> Tensor:
        u = normed(self.norm1, x)
        widens = self.proj is not None and self.shape.dim_attn == self.shape.dim_out
        shortcut = x if self.proj is None or not widens else self.proj(u)
        x = _add(self._pooled(shortcut), self.attn(u), masks[0])
        u = normed(self.norm2, x)
        shortcut = x if self.proj is None or widens else self.proj(u)
        return _add(shortcut, self.mlp(u), masks[1])

    def _pooled(self, x: Tensor) -> Tensor:
        """The shortcut, max-pooled at a stage change."""
        if self.shape.q_stride == 1:
            return x
        first = self.attn.first
        return torch.cat([x[:, :first], pool_shortcut(x[:, first:].contiguous(), self.shape.grid)], 1)


def normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A layer norm in the precision of its weights, which is fp32 in training."""
    out: Tensor = layer(x.to(layer.weight.dtype))
    return out


def _add(shortcut: Tensor, branch: Tensor, mask: Mask | None) -> Tensor:
    """The shortcut plus the branch, for the clips that stochastic depth keeps."""
    if mask is None:
        return shortcut + branch
    return torch.addcmul(shortcut, branch, mask.keep.to(branch.dtype), value=mask.scale)


class MViTv2(Backbone):
    """The official backbone; arguments and errors are those of :class:`~multitrain.model.backbone.Backbone`."""

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__(config, activation_checkpointing)
        self.options = config.mvitv2
        time, height, width = patch_grid(config)
        self.patch_embed = PatchEmbed(config.width)
        if self.options.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        for name, tokens in self._tables(time, height * width).items():
            self.register_parameter(name, nn.Parameter(torch.empty(1, tokens, config.width)))
        eps = self.options.norm_eps
        self.norm_stem = nn.LayerNorm(config.width, eps=eps) if self.options.norm_stem else None
        shapes = geometries(config)
        self.blocks = nn.ModuleList(RelativeBlock(shape, config, f"blocks.{i}") for i, shape in enumerate(shapes))
        self.dim = shapes[-1].dim_out
        self.norm = nn.LayerNorm(self.dim, eps=eps)
        for block in self.blocks:
            Recomputed.wrap(block, activation_checkpointing)

    def _tables(self, time: int, space: int) -> dict[str, int]:
        """Rows of the tables of absolute positions by name."""
        token = int(self.options.class_token)
        if self.options.absolute == "joint":
            return {"pos_embed": time * space + token}
        if self.options.absolute == "separate":
            tables = {"pos_embed_spatial": space, "pos_embed_temporal": time}
            return tables | ({"pos_embed_class": 1} if token else {})
        return {}

    def _features(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        x = self._tokens(clips)
        masks = masks_of_blocks(self.blocks, self.training, keys, compute_dtype(x))
        for block, drawn in zip(self.blocks, masks):
            x = block(x, drawn)
        if self.options.mean_pooling:
            return normed(self.norm, x[:, int(self.options.class_token) :].mean(1))
        if self.options.class_token:
            return normed(self.norm, x[:, 0])
        return normed(self.norm, x).mean(1)

    def _tokens(self, clips: Tensor) -> Tensor:
        """Tokens with their absolute positions, in the precision of the parameters."""
        x = self.patch_embed(clips).to(self.norm.weight.dtype)
        if self.options.class_token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.options.absolute == "joint":
            x = x + self.pos_embed
        elif self.options.absolute == "separate":
            space, time = self.get_parameter("pos_embed_spatial"), self.get_parameter("pos_embed_temporal")
            table = (space[:, None] + time[:, :, None]).flatten(1, 2)
            x = x + (
                torch.cat([self.get_parameter("pos_embed_class"), table], 1) if self.options.class_token else table
            )
        return x if self.norm_stem is None else normed(self.norm_stem, x)
