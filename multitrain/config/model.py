"""Options of the network."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from multitrain.config.base import Settings
from multitrain.config.mvitv2 import MVITV2, MViTv2Config

OWN_BACKBONE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""How `model.backbone` names a function of the user: ``package.module:function``."""


class ModelConfig(Settings):
    """A video network with one head per dataset (Liang et al., NeurIPS 2022)."""

    backbone: str | None = None
    """The network from clips to features: unset for the published MViT, ``mvitv2`` for the official MViT and MViTv2, or a function of your
    own, ``package.module:function`` (docs/backbones.md)."""
    backbone_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of your function, or options of ``mvitv2`` (class_token, relative_space, …: docs/backbones.md)."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of a clip's colour channels; the official releases for Something-Something read BGR."""
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    """Mean of red, green and blue, from 0 to 1, that normalising subtracts."""
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    """Standard deviation of red, green and blue by which normalising divides."""
    frames: int = Field(32, ge=2, le=4096, multiple_of=2)
    """Frames per clip (T)."""
    crop: int = Field(224, ge=32, le=8192, multiple_of=4)
    """Height and width of a clip in pixels (S). A grid of S/4 that cannot be halved at a stage change is rounded up."""
    depth: int = Field(24, ge=1, le=1000)
    """Number of transformer blocks."""
    width: int = Field(96, ge=8, le=65536)
    """Channels of the first stage; doubled at every stage change."""
    heads: int = Field(1, ge=1, le=4096)
    """Attention heads of the first stage; doubled at every stage change."""
    stages: tuple[int, ...] = (2, 5, 21)
    """Blocks (from 0) that halve the grid and double channels and heads."""
    kv_stride: int = Field(8, ge=1, le=8192)
    """Spatial stride of keys and values in the first stage; halved at every stage change."""
    mlp_ratio: float = Field(4.0, gt=0, le=1000)
    """Hidden width of a block's MLP ÷ its channels."""
    pool_q_everywhere: bool = True
    """Pool queries in every block, not only at stage changes."""
    residual_q: bool = True
    """Add the pooled query to the attention output."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic-depth rate of the last block; grows linearly from 0."""
    head: Literal["mlp", "linear"] = "mlp"
    """Heads of two layers, or of one."""
    head_hidden: int = Field(2048, ge=1, le=1_000_000)
    """Hidden width of an MLP head."""
    head_dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout before the last layer of a head."""
    dropout_logits: bool = False
    """Apply dropout to the logits as well, as the published code does (defect 14)."""
    projections: bool = True
    """Cross-dataset projections, one matrix for each ordered pair of datasets."""
    expander: bool = True
    """Whether the network has the expander, whose output the informative loss uses."""
    expander_hidden: int = Field(4096, ge=1, le=1_000_000)
    """Hidden width of the expander."""

    @model_validator(mode="after")
    def _can_be_built(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}; change one of them")
        if list(self.stages) != sorted(set(self.stages)) or any(not 0 < s < self.depth for s in self.stages):
            raise ValueError(f"stages={list(self.stages)} must increase and lie between 1 and depth-1={self.depth - 1}")
        if min(self.std) <= 0:
            raise ValueError(f"std={list(self.std)} must be above 0")
        if self.backbone is None and self.backbone_args:
            raise ValueError(
                f"backbone_args={self.backbone_args} without model.backbone; set model.backbone, or leave it out"
            )
        if self.backbone == MVITV2:
            _ = self.mvitv2
        elif self.backbone is not None and not OWN_BACKBONE.fullmatch(self.backbone):
            raise ValueError(f"backbone={self.backbone!r}: write mvitv2, or package.module:function of your own")
        return self

    @property
    def mvitv2(self) -> MViTv2Config:
        """`backbone_args` as the options of ``mvitv2``. Raises ValueError."""
        try:
            return MViTv2Config.model_validate(self.backbone_args)
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(MViTv2Config.model_fields)
            raise ValueError(
                f"backbone_args.{'.'.join(map(str, first['loc']))}: {first['msg']}; backbone=mvitv2 has {known}"
            ) from None

    @property
    def own_backbone(self) -> bool:
        """Whether the backbone is a function of the user."""
        return self.backbone not in (None, MVITV2)
