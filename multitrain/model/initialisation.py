"""The published initialisation, with every parameter a pure function of its name and the seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from multitrain.model.random import _shift, hashed, stream_of

STD = 0.02
"""Standard deviation of linear layers and position tables."""


def initialise(model: nn.Module, seed: int) -> None:
    """Resets all parameters of `model` in place; those on the meta device are left alone.

    Linear weights and position tables: normal, std 0.02, truncated at ±2 (100 deviations). Linear biases 0. Layer norms 1 and 0. Convolutions:
    uniform in ±1/√fan_in, weights and biases.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        fan_in = weight[0].numel() if isinstance(weight, Tensor) else 0
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                _fill(module, name, parameter.data, f"{path}.{name}" if path else name, seed, fan_in)


def _fill(module: nn.Module, name: str, data: Tensor, full_name: str, seed: int, fan_in: int) -> None:
    if isinstance(module, nn.LayerNorm):
        data.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Linear) and name == "bias":
        data.zero_()
    elif data.dim() == 5 or isinstance(module, nn.Conv3d):
        data.copy_((2 * _uniforms(full_name, seed, data) - 1) / math.sqrt(fan_in))
    else:
        data.copy_(torch.erfinv(2 * _uniforms(full_name, seed, data) - 1) * (math.sqrt(2) * STD))


def _uniforms(name: str, seed: int, like: Tensor) -> Tensor:
    """float64 uniforms strictly inside (0, 1), of the shape of `like`; the same on every device."""
    key = torch.tensor([seed], dtype=torch.int64)
    bits = _shift(hashed(key, stream_of(f"initialise.{name}"), like.numel()), 12)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-52).view(like.shape)
