"""Device check that selects between CUDA's and the CPU's code paths."""

from __future__ import annotations

from torch import Tensor


def is_cuda(x: Tensor) -> bool:
    """Whether operations on `x` take CUDA's code paths. `benchmarks/counting.py` patches this to count without a GPU."""
    return x.device.type == "cuda"
