"""The device's code path, and the arithmetic of operations on a device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_cuda(x: Tensor) -> bool:
    """Whether operations on `x` take CUDA's code paths. `benchmarks/counting.py` patches this to count without a GPU."""
    return x.device.type == "cuda"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The arithmetic of `precision` (fp32, bf16, fp16) for operations on `device`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])
