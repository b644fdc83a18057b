"""The order of the samples, and their rank: stateless integer arithmetic with numpy, no torch."""

from __future__ import annotations

from multitrain.order.batch import BatchShape, BatchShapeError, solve
from multitrain.order.permutation import key, permute
from multitrain.order.plan import ORDER_VERSION, SAMPLE_DTYPE, TICKET, Plan, Source

__all__ = [
    "ORDER_VERSION",
    "SAMPLE_DTYPE",
    "TICKET",
    "BatchShape",
    "BatchShapeError",
    "Plan",
    "Source",
    "key",
    "permute",
    "solve",
]
