"""The network that the benchmarks train, and what they train it on: no labels, for neither time nor memory depends on them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from multitrain.model import MultiTrain

DATASETS = {"kinetics": 400, "mit": 305, "ssv2": 174}
"""Classes of the published datasets."""


def loss_of(values: Iterable[Tensor]) -> Tensor:
    """The sum of the mean squares, which gives every output a gradient."""
    return sum(v.float().square().mean() for v in values)  # type: ignore[return-value]


def trained_outputs(model: MultiTrain, clips: Tensor, keys: Tensor) -> list[Tensor]:
    """All that a loss is made of: logits, projections and, where there is one, the expander's output."""
    out = model.outputs(clips, keys)
    values = [*out.logits.values(), *out.projected.values(), out.expanded]
    return [v for v in values if v is not None]
