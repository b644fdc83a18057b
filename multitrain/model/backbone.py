"""The interface of every backbone: normalised clips and their keys to clip features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.layers import Recompute
from multitrain.model.random import KeyedDropPath, Mask, draw_keys, drop_path_masks


class Backbone(nn.Module):
    """Base class: clips float [B, 3, T, S, S] and keys int64 [B] or None -> clip features [B, dim].

    Args:
        config: the network.
        activation_checkpointing: what the backward pass recomputes: "none", "mlp", "selective" or "full".

    Raises:
        ConfigError: (forward) the clips' size is not that of the configuration.
    """

    dim: int
    """Channels of the features."""

    def __init__(self, config: ModelConfig, activation_checkpointing: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing

    @property
    def layers(self) -> Sequence[nn.Module] | None:
        """The layers, first to last, which `optim.layer_decay` counts; None where they are not known."""
        blocks: nn.ModuleList = self.get_submodule("blocks")  # type: ignore[assignment]
        return list(blocks)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def untrainable(self) -> str | None:
        """Why this backbone cannot be trained exactly, in one line; None if it can."""
        return None

    def reset_backbone(self, seed: int) -> None:
        """Reset the parameters that `initialise` leaves as they are: those below `backbone.`, which only a backbone of the user has."""

    def forward(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.features(clips, keys)

    def features(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        """Pooled clip features [B, C] of normalised clips [B, 3, T, S, S]; the keys int64 [B] determine the dropout masks of training."""
        self._check(clips, keys)
        if keys is None and self.training:
            keys = draw_keys(clips.shape[0], clips.device)
        return self._features(clips, keys)

    def _features(self, clips: Tensor, keys: Tensor | None) -> Tensor:
        """`features` of clips of the right shape, with keys in training."""
        raise NotImplementedError

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


DropPaths = list[tuple[Mask | None, Mask | None]]


def masks_of_blocks(blocks: nn.ModuleList, training: bool, keys: Tensor | None, dtype: torch.dtype) -> DropPaths:
    """Stochastic-depth masks of attention and MLP for every block; all are drawn at once."""
    layers: list[KeyedDropPath] = [at for block in blocks for at in (block.drop_path_attn, block.drop_path_mlp)]  # type: ignore[misc]
    masks = drop_path_masks(layers, keys, dtype) if training and keys is not None else [None] * len(layers)
    return list(zip(masks[::2], masks[1::2]))
