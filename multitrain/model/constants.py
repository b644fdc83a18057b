"""Cache of small constant tensors that depend on shapes only: one copy per device, because each copy to a GPU synchronises."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

CACHE: dict[Hashable, Tensor] = {}
"""Tensors by the values that determine them, the device included. `benchmarks/counting.py`, whose tensors hold no data, starts with an
empty cache."""


def cached(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """The tensor cached under `key`; calls `make` on first use."""
    found = CACHE.get(key)
    if found is None:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training later
            found = make()
        if type(found) is Tensor:  # not a FakeTensor, which has no data
            CACHE[key] = found
    return found
