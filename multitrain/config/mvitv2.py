"""Options of the official MViT and MViTv2 networks, beside those that they share with the published one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from multitrain.config.base import Settings

MVITV2 = "mvitv2"
"""The value of `model.backbone` for the networks of the official releases."""


class MViTv2Config(Settings):
    """`model.backbone_args` of `model.backbone=mvitv2`; the defaults are those of MViTv2-S and MViTv2-B (Li et al., CVPR 2022).

    `model.depth`, `width`, `heads`, `stages`, `kv_stride`, `mlp_ratio`, `pool_q_everywhere`, `residual_q` and `drop_path` mean what they
    mean for the published network.
    """

    class_token: bool = True
    """Add a token whose output is the clip's feature; without it, the feature is the mean over all tokens."""
    mean_pooling: bool = False
    """With a class token: the feature is the norm of the mean over the other tokens."""
    relative_space: bool = True
    """Relative position embeddings of rows and columns, added to the attention scores."""
    relative_time: bool = True
    """Relative position embeddings of frames, added to the attention scores."""
    absolute: Literal["none", "separate", "joint"] = "none"
    """Absolute position embeddings: none, a table for space and one for time, or one table for all tokens."""
    separate_qkv: bool = False
    """Three linear layers for queries, keys and values instead of one; the same function with other names."""
    qkv_bias: bool = True
    """Biases of these layers."""
    widen: Literal["attention", "mlp"] = "attention"
    """Where channels are doubled: in the attention of a stage's first block (MViTv2), or in the MLP of the block before (MViT)."""
    norm_stem: bool = False
    """A layer norm after the patch embedding."""
    norm_eps: float = Field(1e-6, gt=0, lt=1)
    """eps of all layer norms."""


__all__ = ["MVITV2", "MViTv2Config"]
