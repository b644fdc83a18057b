"""The backbone: a multiscale vision transformer with pooled attention.

MViT (Fan et al., ICCV 2021) with three changes of MViTv2 (Li et al., CVPR 2022): channels grow inside the attention's
first projection, queries are pooled in every block, and the pooled query is added to the attention's output. Positions are separable
absolute tables; there is no class token and no relative position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.block import Recompute, compute_dtype, run
from multitrain.model.pooling import Grid, pooled
from multitrain.model.products import Linear, conv3d
from multitrain.model.random import KeyedDropPath, Mask, draw_keys, kept_masks, stream_of

PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING = (3, 7, 7), (2, 4, 4), (1, 3, 3)
BLOCK_NORM_EPS = 1e-6
POOL_NORM_EPS = 1e-5
"""The published blocks hand plain layer norms, with torch's default, to their poolings."""


@dataclass(frozen=True)
class BlockShape:
    """The geometry of one block, which follows from the configuration alone."""

    dim_in: int
    dim_out: int
    heads: int
    grid: Grid
    """Token grid of the input."""
    q_stride: int
    """Spatial stride of the queries: 2 at a stage change, else 1."""
    kv_stride: int
    """Spatial stride of keys and values relative to the input grid."""
    pool_q: bool
    drop_path: float

    @property
    def q_grid(self) -> Grid:
        """Token grid of the output."""
        return pooled(self.grid, self.q_stride)

    @property
    def kv_grid(self) -> Grid:
        """Token grid of keys and values."""
        return pooled(self.grid, self.kv_stride)


def patch_grid(config: ModelConfig) -> Grid:
    """Token grid (T/2, S/4, S/4) after the patch embedding."""
    return config.frames // 2, config.crop // 4, config.crop // 4


def block_shapes(config: ModelConfig) -> list[BlockShape]:
    """The geometry of every block (Table 1 of MViTv2, with the published code's rule for the stride of keys and values)."""
    shapes: list[BlockShape] = []
    dim, heads, grid, kv_stride = config.width, config.heads, patch_grid(config), config.kv_stride
    for i in range(config.depth):
        change = i in config.stages
        dim_in = dim
        if change:
            dim, heads, kv_stride = dim * 2, heads * 2, max(kv_stride // 2, 1)
        rate = config.drop_path * i / max(config.depth - 1, 1)
        pool_q = change or config.pool_q_everywhere
        shapes.append(BlockShape(dim_in, dim, heads, grid, 2 if change else 1, kv_stride, pool_q, rate))
        grid = shapes[-1].q_grid
    return shapes


class PatchEmbed(nn.Module):
    """Cuts clips [B, 3, T, H, W] into overlapping patches: tokens [B, T/2·H/4·W/4, C], time slowest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING)

    def forward(self, clips: Tensor) -> Tensor:
        conv = self.proj
        out = conv3d(clips, conv.weight, conv.bias, stride=PATCH_STRIDE, padding=PATCH_PADDING)
        return out.flatten(2).transpose(1, 2).contiguous()


class HeadPool(nn.Module):
    """The filters of one depth-wise pooling, shared by all heads: weight [head size, 1, 3, 3, 3]."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_size, 1, 3, 3, 3))


class Attention(nn.Module):
    """The parameters of pooled multi-head attention; what is done with them is in model/block.py."""

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
    """lin → GELU (erf) → lin on the last axis."""

    def __init__(self, dim: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each with a shortcut: tokens [B, N, dim_in] -> tokens [B, N', dim_out].

    At a stage change the shortcut is projected (from the un-normalised tokens, unlike MViTv2) and then max-pooled.
    """

    def __init__(self, shape: BlockShape, config: ModelConfig, name: str, recompute: Recompute) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = recompute
        self.compact = True
        """Project keys and values only where their pooling reads: the same numbers from fewer operations."""
        self.norm1 = nn.LayerNorm(shape.dim_in, eps=BLOCK_NORM_EPS)
        self.attn = Attention(shape, config.residual_q)
        self.norm2 = nn.LayerNorm(shape.dim_out, eps=BLOCK_NORM_EPS)
        self.mlp = Mlp(shape.dim_out, int(shape.dim_out * config.mlp_ratio), shape.dim_out)
        self.proj_max_pool = Linear(shape.dim_in, shape.dim_out) if shape.dim_in != shape.dim_out else None
        self.drop_path_attn = KeyedDropPath(shape.drop_path, stream_of(f"{name}.attn"))
        self.drop_path_mlp = KeyedDropPath(shape.drop_path, stream_of(f"{name}.mlp"))

    def forward(self, x: Tensor, masks: tuple[Mask | None, Mask | None] = (None, None)) -> Tensor:
        return run(self, self.recompute, x, masks)


class MViT(nn.Module):
    """The backbone: clips float [B, 3, T, S, S] and keys int64 [B] or None -> clip features [B, width·2**stages].

    Args:
        config: the network.
        activation_checkpointing: what the backward pass recomputes: "none", "mlp", "selective" or "full" (model/block.py).

    Raises:
        ConfigError: `width` is not a multiple of `heads`; a clip's size is not that of the configuration.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__()
        if config.width % config.heads:
            raise ConfigError(
                f"model.width={config.width} is not a multiple of model.heads={config.heads}; change one of them"
            )
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        time, height, width = patch_grid(config)
        self.patch_embed = PatchEmbed(config.width)
        self.pos_embed_spatial = nn.Parameter(torch.empty(1, height * width, config.width))
        self.pos_embed_temporal = nn.Parameter(torch.empty(1, time, config.width))
        shapes = block_shapes(config)
        self.blocks = nn.ModuleList(
            Block(shape, config, f"blocks.{i}", activation_checkpointing) for i, shape in enumerate(shapes)
        )
        self.dim = shapes[-1].dim_out
        self.norm = nn.LayerNorm(self.dim, eps=BLOCK_NORM_EPS)

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.features(clips, keys)

    def features(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        """Pooled clip features [B, C] of normalised clips [B, 3, T, S, S]; keys int64 [B] choose the masks of training."""
        self._check(clips, keys)
        if keys is None and self.training:
            keys = draw_keys(clips.shape[0], clips.device)
        x = self.patch_embed(clips) + self._positions()
        for block, masks in zip(self.blocks, self._masks(keys, x)):
            x = block(x, masks)
        return self.norm(x.to(self.norm.weight.dtype)).mean(1)

    def _masks(self, keys: Tensor | None, x: Tensor) -> list[tuple[Mask | None, Mask | None]]:
        """What stochastic depth keeps, of both halves of every block; all masks are drawn at once."""
        layers = [layer for block in self.blocks for layer in (block.drop_path_attn, block.drop_path_mlp)]
        masks = kept_masks(layers, keys, compute_dtype(x)) if self.training and keys is not None else [None] * len(layers)
        return list(zip(masks[::2], masks[1::2]))

    def _positions(self) -> Tensor:
        """The table of all tokens, [1, N, C]: token (t, y, x) gets spatial[y·W + x] + temporal[t]."""
        return (self.pos_embed_spatial[:, None] + self.pos_embed_temporal[:, :, None]).flatten(1, 2)

    def _check(self, clips: Tensor, keys: Tensor | None) -> None:
        c = self.config
        if clips.dim() != 5 or clips.shape[1:] != (3, c.frames, c.crop, c.crop):
            raise ConfigError(
                f"clips of shape {list(clips.shape)} do not fit this network, which takes "
                f"[B, 3, {c.frames}, {c.crop}, {c.crop}] (model.frames={c.frames}, model.crop={c.crop})"
            )
        if keys is not None and keys.shape != clips.shape[:1]:
            raise ConfigError(
                f"{list(keys.shape)} keys do not fit {clips.shape[0]} clips; give one key, int64, for each clip"
            )
