"""Losses are computed in fp32 or better, whatever the precision of training."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16 and fp16 become fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast does not lower the precision of operations on x's device."""
    return torch.autocast(x.device.type, enabled=False)
