"""Options of the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from multitrain.config.base import Settings


class LossConfig(Settings):
    """Classification + cross-dataset projection + informative loss (Liang et al., NeurIPS 2022, §3)."""

    projection_weight: float = Field(1.0, ge=0)
    """Weight λ_p of the projection loss."""
    informative_weight: float = Field(0.1, ge=0)
    """Weight of the informative loss in the total."""
    std_weight: float = Field(25.0, ge=0)
    """Weight of the standard-deviation term inside the informative loss."""
    covariance_weight: float = Field(1.0, ge=0)
    """Weight of the covariance term inside the informative loss."""
    scope: Literal["update", "micro"] = "update"
    """Clips over which the informative loss is computed: the whole effective batch (exact, the same on any world size), or the
    gathered micro-batch, as published."""
    dataset_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a dataset's classification and projection terms; default: 1."""
