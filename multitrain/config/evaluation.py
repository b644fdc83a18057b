"""Options of validation and testing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from multitrain.config.base import Settings


class EvalConfig(Settings):
    """Validation during training, and multi-view testing."""

    every: int | None = Field(None, ge=1)
    """Updates between two validations during training; null for none. If set, there is always a validation after the last update."""
    patience: int | None = Field(None, ge=1)
    """Validations in a row without a better `checkpoint.best` after which the run ends early; null for never."""
    val_stride: int = Field(1, ge=1)
    """Validate on every n-th line of `val.csv` (published: 5)."""
    videos_per_batch: int = Field(4, ge=1)
    """Videos that a rank scores together; batches are padded to one shape, within 16 clips."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Arithmetic of validation and testing; default: the run's own in validation and fp32 in testing, as published."""
    workers: int | None = Field(None, ge=0)
    """Loader processes per rank; default: `data.workers`."""
