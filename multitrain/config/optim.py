"""Options of the optimizer and its schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from multitrain.config.base import Settings


class OptimConfig(Settings):
    """AdamW with linear warm-up and a decay, counted in updates."""

    lr: float = Field(4e-4, gt=0)
    """Peak learning rate, for the effective batch; never scaled by the number of machines."""
    start_lr: float = Field(4e-6, ge=0)
    """Learning rate of the first update, at the start of the warm-up."""
    end_lr: float = Field(4e-6, ge=0)
    """Learning rate at the end of the decay, of `cosine` and `wsd`."""
    warmup_epochs: float = Field(10.0, ge=0)
    """Length of the warm-up in passes over the union of the datasets; ignored if `warmup_updates` is given."""
    warmup_updates: int | None = Field(None, ge=0)
    """Length of the warm-up in updates."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay of tensors with two or more dimensions; biases and norms have none."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Layer-wise learning rates: that of a tensor is the schedule's × this to the power L - layer, where the patch embedding is layer 0,
    block i layer i + 1, and the heads layer L (docs/weights.md). 1 for equal learning rates."""
    freeze: tuple[str, ...] = ()
    """Tensors that are not trained: patterns of their names, where ``*`` stands for any text, e.g. ``[patch_embed.*,pos_embed*,blocks.*]``.
    `dry_run=true` prints a table of what is frozen."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Limit of the global L2 norm to which the gradient of the effective batch is clipped; null for no clipping."""
    schedule: Literal["cosine", "constant", "wsd", "step"] = "cosine"
    """Shape after the warm-up: half a cosine down to `end_lr`; constant; warm-up, stable, decay: constant, and a straight line down to
    `end_lr` over the last `decay_fraction` of the run; or steps by `gamma` at the `milestones`."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """Share of the run in which `wsd` decays, at its end."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the run, ascending, at which `step` multiplies the learning rate by `gamma`."""
    gamma: float = Field(0.1, gt=0, le=1)
    """Factor of a step."""

    @field_validator("milestones")
    @classmethod
    def _ascend(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or list(value) != sorted(set(value)) or not all(0 < share < 1 for share in value):
            raise ValueError(f"{list(value)} are not ascending shares of the run, above 0 and below 1, e.g. [0.5,0.75]")
        return value

    @field_validator("freeze", mode="before")
    @classmethod
    def _may_be_one(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("freeze")
    @classmethod
    def _are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError(
                f"{list(value)} has an empty pattern; write names of tensors, e.g. [patch_embed.*,blocks.*]"
            )
        return value

    @property
    def equal(self) -> bool:
        """Whether all tensors are trained, with the same learning rate."""
        return self.layer_decay == 1 and not self.freeze

    @field_validator("betas")
    @classmethod
    def _are_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(
                f"{list(value)} are not decay rates; both must be at least 0 and below 1, e.g. [0.9,0.999]"
            )
        return value


class EmaConfig(Settings):
    """An exponential moving average of the weights, beside them."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the average at each update, e.g. 0.9999; null for none. Early in a run it is (1 + n) / (10 + n) after n updates, if that is
    smaller. Validation then scores the average, and `RUN/ema` is its name wherever weights are given."""
