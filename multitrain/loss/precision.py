"""Precision of the losses: fp32 or fp64, whatever the precision of training."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert bf16 and fp16 to fp32; return fp32 and fp64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context that disables autocast on x's device."""
    return torch.autocast(x.device.type, enabled=False)
