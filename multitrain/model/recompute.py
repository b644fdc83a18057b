"""Activation checkpointing of layers whose backward pass autograd makes, by `torch.utils.checkpoint`.

| mode | keeps, in addition to the layer's input | recomputes |
|---|---|---|
| none | what autograd saves | nothing |
| mlp | the results of matrix products, convolutions and attention | norms, activation functions, sums |
| selective | the result of fused attention | everything else |
| full | nothing | everything |
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from multitrain.model.layers import Recompute

_aten = torch.ops.aten
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.linear.default,
    _aten.convolution.default,
}
KEPT: dict[str, set[Any]] = {"mlp": ATTENTION | PRODUCTS, "selective": ATTENTION, "full": set()}


class Recomputed:
    """The forward function of a layer with activation checkpointing; the layer's class and its parameters' names stay as they are."""

    def __init__(self, layer: nn.Module, mode: Recompute) -> None:
        self.layer, self.mode = layer, mode

    @classmethod
    def wrap(cls, layer: nn.Module, mode: Recompute) -> None:
        """Let `layer` recompute in its backward pass what `mode` says."""
        if mode != "none":
            layer.forward = cls(layer, mode)  # type: ignore[method-assign,assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = partial(type(self.layer).forward, self.layer)
        if not (self.layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if self.mode == "full":
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        contexts = partial(create_selective_checkpoint_contexts, _policy(KEPT[self.mode]))
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _policy(kept: set[Any]) -> Any:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
