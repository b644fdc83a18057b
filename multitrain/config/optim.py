"""How weights follow gradients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from multitrain.config.base import Settings


class OptimConfig(Settings):
    """AdamW with linear warm-up and cosine decay, counted in updates."""

    lr: float = Field(4e-4, gt=0)
    """Peak learning rate, for the effective batch; never scaled by the number of machines."""
    start_lr: float = Field(4e-6, ge=0)
    """Learning rate of the first update, where warm-up starts."""
    end_lr: float = Field(4e-6, ge=0)
    """Learning rate that the cosine ends at."""
    warmup_epochs: float = Field(10.0, ge=0)
    """Length of the warm-up in passes over the union; ignored when `warmup_updates` is given."""
    warmup_updates: int | None = Field(None, ge=0)
    """Length of the warm-up in updates."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay on tensors of two and more dimensions; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Global L2 norm that the gradient of the effective batch is clipped to; null for no clipping."""
    schedule: Literal["cosine"] = "cosine"
    """Shape of the decay after warm-up."""

    @field_validator("betas")
    @classmethod
    def _are_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(
                f"{list(value)} are no decay rates; both lie from 0 up to, but not at, 1, e.g. [0.9,0.999]"
            )
        return value
