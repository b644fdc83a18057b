"""Options of the augmentation of training clips."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from multitrain.config.base import Settings


class AugmentConfig(Settings):
    """Augmentation of training clips; the defaults are those of the published configuration."""

    copies: int = Field(2, ge=1)
    """Augmented clips per video (repeated augmentation). Videos × copies = clips."""
    randaugment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """RandAugment in the field's notation: magnitude m, number of operations n, magnitude deviation mstd, increasing
    variants inc; null for none."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of a random resized crop's area, as a fraction of the frame's area."""
    crop_aspect: tuple[float, float] = (0.75, 1.3333)
    """Range of the aspect ratio (width ÷ height) of a random resized crop."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip, for datasets that allow it."""
    erase_probability: float = Field(0.25, ge=0, le=1)
    """Probability that one box of the clip is replaced by noise."""
    mix_probability: float = Field(1.0, ge=0, le=1)
    """Probability that the clips of a mix group are mixed."""
    cutmix_probability: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix rather than mixup, when mixed."""
    mixup_alpha: float = Field(0.8, ge=0)
    """Beta parameter of mixup; 0 turns mixup off."""
    cutmix_alpha: float = Field(1.0, ge=0)
    """Beta parameter of CutMix; 0 turns CutMix off."""
    mix_group: int = Field(2, ge=1)
    """Consecutive videos that share one mixing draw and are mixed with each other; divides the micro-batch, so that mixing does not
    depend on it."""
    mix_across_datasets: bool = False
    """Mix clips of different datasets, which loses the partner's label, as published; otherwise partners share the dataset."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Probability mass of the label that is spread over all classes."""
    smoothing_classes: int | None = Field(None, ge=1)
    """Number of classes in label smoothing for every dataset (published: 700); default: each dataset's own."""
    backend: Literal["opencv", "pil"] = "opencv"
    """Image operations: `opencv` is fast, `pil` is bit-exact with the published ones."""

    @field_validator("randaugment")
    @classmethod
    def _known_notation(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"rand(-(m\d+(\.\d+)?|n\d+|mstd\d+(\.\d+)?|inc[01]))*", value):
            raise ValueError(f"{value!r} is not RandAugment notation; e.g. rand-m7-n4-mstd0.5-inc1, or null for none")
        return value

    @field_validator("crop_area", "crop_aspect")
    @classmethod
    def _is_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"{list(value)} is not a range of positive numbers, smaller first")
        return value
