"""Cost of a model: parameters, and multiply-accumulates per clip."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from multitrain.config import ConfigError, ModelConfig
from multitrain.model.layers import BlockLayers
from multitrain.model.low_precision import emulated_dtype
from multitrain.model.multitrain import MultiTrain
from multitrain.model.mvitv2 import RelativeAttention


def flops(config: ModelConfig, datasets: dict[str, int]) -> tuple[int, float]:
    """(parameters, multiply-accumulates per clip) in eval mode, with all heads and the expander.

    Counts what the published figures count: convolutions, matrix products (both of attention included), and 5 operations per element of
    a layer norm.

    Raises:
        ConfigError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        raise ConfigError("counting operations needs fvcore: pip install 'multitrain[flops]'") from None
    with torch.device("meta"):
        model = MultiTrain(config, datasets).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    for layer in model.modules():
        if isinstance(layer, (BlockLayers, RelativeAttention)):
            layer.compact = (
                False  # the published figures project keys and values at every token; skipping unread ones saves 1.5 %
            )
    clips = torch.zeros(1, 3, config.frames, config.crop, config.crop)
    emulated_dtype(clips)  # caches the CPU's capabilities, which cannot be queried while tracing
    with torch.no_grad():
        analysis = FlopCountAnalysis(_Outputs(model), clips).set_op_handle(
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            _attention,
            "aten::scaled_dot_product_attention",
            _attention,
            "aten::native_layer_norm",
            _norm,
        )
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        logging.getLogger("fvcore").setLevel(logging.ERROR)
        total = float(analysis.total())
    total -= sum(layer.added_products() for layer in model.modules() if isinstance(layer, RelativeAttention))
    return sum(p.numel() for p in model.parameters()), total


class _Outputs(torch.nn.Module):
    """The outputs to count, as a tuple, which torch can trace."""

    def __init__(self, model: MultiTrain) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model.outputs(clips)
        return (*out.logits.values(), *out.projected.values(), *([] if out.expanded is None else [out.expanded]))


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-accumulates of q·kᵀ and a·v: B·h·N·M·d each."""
    q, k, v = (x.type().sizes() for x in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _norm(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    return 5 * math.prod(inputs[0].type().sizes())
