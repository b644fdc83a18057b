"""The one question that routes depend on."""

from __future__ import annotations

from torch import Tensor


def is_cuda(x: Tensor) -> bool:
    """Whether `x` is computed by CUDA's routes. Counts on a machine without GPU replace this."""
    return x.device.type == "cuda"
