"""The backbone: a multiscale vision transformer with pooled attention.

MViT (Fan et al., ICCV 2021) with three changes of MViTv2 (Li et al., CVPR 2022): the qkv projection widens the channels at
a stage change, queries are pooled in every block, and the pooled query is added to the attention output. Position embeddings are
absolute and separable (space plus time); there is no class token and no relative position embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.block import compute_dtype, run
from multitrain.model.layers import BLOCK_NORM_EPS, BlockLayers, BlockShape, Recompute
from multitrain.model.low_precision import conv3d
from multitrain.model.pooling import Grid
from multitrain.model.random import Mask, draw_keys, drop_path_masks

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


class MViT(nn.Module):
    """The backbone: clips float [B, 3, T, S, S] and keys int64 [B] or None -> clip features [B, width·2**stages].

    Args:
        config: the network.
        activation_checkpointing: what the backward pass recomputes: "none", "mlp", "selective" or "full" (model/block.py).

    Raises:
        ConfigError: (forward) the clips' size is not that of the configuration.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__()
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
        """Pooled clip features [B, C] of normalised clips [B, 3, T, S, S]; the keys int64 [B] determine the dropout masks of training."""
        self._check(clips, keys)
        if keys is None and self.training:
            keys = draw_keys(clips.shape[0], clips.device)
        x = self.patch_embed(clips) + self._positions()
        for block, masks in zip(self.each_block(), self._masks(keys, x)):
            x = block(x, masks)
        return self.norm(x.to(self.norm.weight.dtype)).mean(1)

    def each_block(self) -> list[Block]:
        """The blocks, as a typed list."""
        return list(self.blocks)  # type: ignore[arg-type]

    def _masks(self, keys: Tensor | None, x: Tensor) -> list[tuple[Mask | None, Mask | None]]:
        """Stochastic-depth masks of attention and MLP for every block; all are drawn at once."""
        layers = [layer for block in self.each_block() for layer in (block.drop_path_attn, block.drop_path_mlp)]
        masks = (
            drop_path_masks(layers, keys, compute_dtype(x))
            if self.training and keys is not None
            else [None] * len(layers)
        )
        return list(zip(masks[::2], masks[1::2]))

    def _positions(self) -> Tensor:
        """Position embeddings of all tokens, [1, N, C]: token (t, y, x) gets spatial[y·W + x] + temporal[t]."""
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
