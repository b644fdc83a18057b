"""The backbone: a multiscale vision transformer with pooled attention.

MViT (Fan et al., ICCV 2021) with three changes of MViTv2 (Li et al., CVPR 2022): the qkv projection widens the channels at
a stage change, queries are pooled in every block, and the pooled query is added to the attention output. Position embeddings are
absolute and separable (space plus time); there is no class token and no relative position embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multitrain.config import ModelConfig
from multitrain.model.backbone import Backbone, masks_of_blocks
from multitrain.model.block import compute_dtype, run
from multitrain.model.layers import BLOCK_NORM_EPS, BlockLayers, BlockShape, Recompute
from multitrain.model.low_precision import conv3d
from multitrain.model.pooling import Grid
from multitrain.model.random import Mask

PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING = (3, 7, 7), (2, 4, 4), (1, 3, 3)


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
    """Overlapping patches as tokens: clips [B, 3, T, H, W] -> [B, T/2·H/4·W/4, C]; time varies slowest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, PATCH_KERNEL, PATCH_STRIDE, PATCH_PADDING)

    def forward(self, clips: Tensor) -> Tensor:
        conv = self.proj
        out = conv3d(clips, conv.weight, conv.bias, stride=PATCH_STRIDE, padding=PATCH_PADDING)
        return out.flatten(2).transpose(1, 2).contiguous()


class Block(BlockLayers):
    """Attention and MLP, each with a residual connection: tokens [B, N, dim_in] -> tokens [B, N', dim_out].

    At a stage change the shortcut is a projection of the tokens (before the norm, unlike MViTv2), then max-pooled.
    """

    def forward(self, x: Tensor, masks: tuple[Mask | None, Mask | None] = (None, None)) -> Tensor:
        return run(self, self.recompute, x, masks)


class MViT(Backbone):
    """The published backbone: clips float [B, 3, T, S, S] and keys int64 [B] or None -> clip features [B, width·2**stages].

    Arguments and errors are those of :class:`~multitrain.model.backbone.Backbone`; model/block.py says what the backward pass recomputes.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__(config, activation_checkpointing)
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

    def _features(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        x = self.patch_embed(clips) + self._positions()
        masks = masks_of_blocks(self.blocks, self.training, keys, compute_dtype(x))
        for block, drawn in zip(self.blocks, masks):
            x = block(x, drawn)
        return self.norm(x.to(self.norm.weight.dtype)).mean(1)

    def _positions(self) -> Tensor:
        """Position embeddings of all tokens, [1, N, C]: token (t, y, x) gets spatial[y·W + x] + temporal[t]."""
        return (self.pos_embed_spatial[:, None] + self.pos_embed_temporal[:, :, None]).flatten(1, 2)
