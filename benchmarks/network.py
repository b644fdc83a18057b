"""The network and the scalar that the benchmarks train; without labels, on which neither time nor memory depends."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from multitrain.model import MultiTrain

DATASETS = {"kinetics": 400, "mit": 305, "ssv2": 174}
"""Classes of the published datasets."""


def loss_of(values: Iterable[Tensor]) -> Tensor:
    """Sum of the mean squares of all outputs, so that each has a gradient."""
    return sum(v.float().square().mean() for v in values)  # type: ignore[return-value]


def trained_outputs(model: MultiTrain, clips: Tensor, keys: Tensor) -> list[Tensor]:
    """The inputs of a loss: logits, projections and, if there is one, the expander's output."""
    out = model.outputs(clips, keys)
    values = [*out.logits.values(), *out.projected.values(), out.expanded]
    return [v for v in values if v is not None]
