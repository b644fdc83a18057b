"""Options of the engine, of checkpoints and of monitoring."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from multitrain.config.base import Settings


class EngineConfig(Settings):
    """DeepSpeed ZeRO-1 and the process group."""

    zero_stage: Literal[1] = 1
    """ZeRO stage. The others are refused: 2 and 3 give wrong gradients when ranks see different datasets."""
    bucket_elements: int = Field(50_000_000, ge=1000)
    """Elements of one gradient bucket."""
    collective_timeout: int = Field(1800, ge=10)
    """Seconds after which a collective that does not end stops the job, unless `hang_limit` ends its ranks before."""
    hang_limit: int | None = Field(900, ge=2)
    """Seconds that a rank may be without progress (three times that until its first update is done). Then each rank writes
    its stacks to its log and exits, and the run is restarted. `null`: no limit."""
    threads: int = Field(1, ge=1)
    """CPU threads per rank for tensor operations."""
    loss_scale_start: int = Field(16, ge=0, le=32)
    """First dynamic loss scale under fp16, as a power of two."""

    @property
    def collective_limit(self) -> int:
        """Timeout of process groups, in seconds. It is a month if the watchdog ends ranks that hang: the clock of a process group
        includes the time during which a job was suspended, while the watchdog's clock does not.
        """
        watched = self.hang_limit is not None and self.hang_limit <= self.collective_timeout
        return 30 * 24 * 3600 if watched else self.collective_timeout


MEASURE = r"^val/.+/(top1|top5|map)$"
"""Form of `checkpoint.best`."""

MEAN = "mean"
"""Stands for all datasets in `checkpoint.best`."""


def measure_of(text: str) -> tuple[str, str]:
    """The dataset (or :data:`MEAN`) and the name of the measure in ``val/DATASET/NAME``."""
    dataset, _, name = text.removeprefix("val/").rpartition("/")
    return dataset, name


class CheckpointConfig(Settings):
    """When checkpoints are written and which are kept."""

    every: int = Field(500, ge=1)
    """Updates between two periodic checkpoints; a hard kill loses at most these."""
    keep: int = Field(3, ge=2)
    """Number of newest checkpoints to keep; at least 2, so that a damaged newest one has a predecessor."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints whose update is a multiple of this are never deleted."""
    best: str | None = Field(None, pattern=MEASURE)
    """Measure of the validation by which the best checkpoint is kept as well: `val/DATASET/top1`, `top5` or `map`, or `val/mean/top1`
    for the mean over the datasets. `RUN/best` is its name wherever weights are given."""


class MonitorConfig(Settings):
    """Log lines, TensorBoard and Weights & Biases."""

    log_every: int = Field(1, ge=1)
    """Updates between two lines in the log; `metrics.jsonl` has every update."""
    tensorboard: bool = True
    """Write scalars, settings and images for TensorBoard to `RUN/tensorboard`."""
    pictures: bool = True
    """Draw confusion matrices and clips with predictions for TensorBoard at every validation."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the same scalars; default: none. A failure is one line in the log and does not stop the run."""
