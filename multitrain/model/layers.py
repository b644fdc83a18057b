"""The geometry and the parameters of a block; parameters have their published names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multitrain.config import ModelConfig
from multitrain.model.low_precision import Linear
from multitrain.model.pooling import Grid, pooled_grid
from multitrain.model.random import KeyedDropPath, stream_of

Recompute = Literal["none", "mlp", "selective", "full"]
"""Activation checkpointing: what the backward pass recomputes; see model/block.py."""

BLOCK_NORM_EPS = 1e-6
POOL_NORM_EPS = 1e-5
"""torch's default: the published blocks use plain layer norms after their poolings."""


@dataclass(frozen=True)
class BlockShape:
    """The geometry of one block; it depends on the configuration alone."""

    dim_in: int
    dim_out: int
    heads: int
    grid: Grid
    """Token grid of the input."""
    q_stride: int
    """Spatial stride of the queries: 2 at a stage change, else 1."""
    kv_stride: int
    """Spatial stride of the pooling of keys and values, on the input grid."""
    pool_q: bool
    drop_path: float

    @property
    def q_grid(self) -> Grid:
        """Token grid of the output."""
        return pooled_grid(self.grid, self.q_stride)

    @property
    def kv_grid(self) -> Grid:
        """Token grid of keys and values."""
        return pooled_grid(self.grid, self.kv_stride)


class HeadPool(nn.Module):
    """The filters of one depth-wise pooling convolution, shared by all heads: weight [head size, 1, 3, 3, 3]."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_size, 1, 3, 3, 3))


class Attention(nn.Module):
    """The parameters of pooled multi-head attention; model/block.py computes with them."""

    def __init__(self, shape: BlockShape, residual_q: bool) -> None:
        super().__init__()
        self.residual_q = residual_q
        head_size = shape.dim_out // shape.heads
        self.qkv = Linear(shape.dim_in, 3 * shape.dim_out)
        self.proj = Linear(shape.dim_out, shape.dim_out)
        self.pool_q = HeadPool(head_size) if shape.pool_q else None
        self.norm_q = nn.LayerNorm(head_size, eps=POOL_NORM_EPS) if shape.pool_q else None
        self.pool_k = HeadPool(head_size)
        self.norm_k = nn.LayerNorm(head_size, eps=POOL_NORM_EPS)
        self.pool_v = HeadPool(head_size)
        self.norm_v = nn.LayerNorm(head_size, eps=POOL_NORM_EPS)


class Mlp(nn.Module):
    """Linear → GELU (erf) → linear on the last axis."""

    def __init__(self, dim: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class BlockLayers(nn.Module):
    """The parameters and the geometry of one block; model/block.py computes with them."""

    def __init__(self, shape: BlockShape, config: ModelConfig, name: str, recompute: Recompute) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = recompute
        self.compact = True
        """Whether keys and values are projected only at the tokens that their pooling reads: same results, fewer operations."""
        self.norm1 = nn.LayerNorm(shape.dim_in, eps=BLOCK_NORM_EPS)
        self.attn = Attention(shape, config.residual_q)
        self.norm2 = nn.LayerNorm(shape.dim_out, eps=BLOCK_NORM_EPS)
        self.mlp = Mlp(shape.dim_out, int(shape.dim_out * config.mlp_ratio), shape.dim_out)
        self.proj_max_pool = Linear(shape.dim_in, shape.dim_out) if shape.dim_in != shape.dim_out else None
        self.drop_path_attn = KeyedDropPath(shape.drop_path, stream_of(f"{name}.attn"))
        self.drop_path_mlp = KeyedDropPath(shape.drop_path, stream_of(f"{name}.mlp"))
