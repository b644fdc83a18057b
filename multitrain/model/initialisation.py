"""The published initialisation; every parameter is a pure function of its name and the seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from multitrain.model.random import stream_of, uniform53

STD = 0.02
"""Standard deviation of linear layers and position tables."""

DRAW_CHUNK = 1 << 16
"""Elements drawn at a time, few enough that their intermediate integers stay in the cache."""


def initialise(model: nn.Module, seed: int) -> None:
    """Reset all parameters of `model` in place, except those without data (on the meta device, fake) and those below `backbone.`, a
    module of the user.

    Linear weights and position tables: normal with standard deviation 0.02, truncated at ±2 (100 standard deviations). Linear biases: 0.
    Layer norms: weight 1, bias 0. Convolutions and poolings: weights and biases uniform in ±1/√fan_in.
    """
    for path, module in model.named_modules():
        if path.partition(".")[0] == "backbone":
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter.data) is Tensor and not parameter.is_meta:
                _fill(module, name, parameter.data, stream_of(f"initialise.{path}.{name}"), seed)


def _fill(module: nn.Module, name: str, data: Tensor, stream: int, seed: int) -> None:
    if isinstance(module, nn.LayerNorm):
        data.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Linear) and name == "bias":
        data.zero_()
    elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 5:
        bound = 1 / math.sqrt(weight[0].numel())
        _draw(data, stream, seed, lambda u: (2 * u - 1) * bound)
    else:
        _draw(data, stream, seed, lambda u: torch.erfinv(2 * u - 1) * (math.sqrt(2) * STD))


def _draw(data: Tensor, stream: int, seed: int, transform: Callable[[Tensor], Tensor]) -> None:
    """Fill `data` with `transform` of uniform numbers, which are drawn on the CPU and so are equal for every device."""
    key = torch.tensor([seed], dtype=torch.int64)
    flat = data.view(-1)
    for start in range(0, flat.numel(), DRAW_CHUNK):
        part = flat[start : start + DRAW_CHUNK]
        part.copy_(transform(uniform53(key, stream, part.numel(), start)[0]))
