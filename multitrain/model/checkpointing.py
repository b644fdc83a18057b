"""Activation checkpointing of blocks: what the backward pass recomputes instead of keeping.

Masks are keyed (model/random.py), so recomputing needs no saved random state and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from multitrain.model.attention import CHUNKED

Recompute = Literal["none", "selective", "full"]
Runner = Callable[[nn.Module, Tensor, "Tensor | None"], Tensor]

KEPT = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    CHUNKED,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}
"""Operations whose outputs "selective" keeps: attention and matrix products. Norms, GELU and convolutions are recomputed."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _plain(block: nn.Module, x: Tensor, keys: Tensor | None) -> Tensor:
    out: Tensor = block(x, keys)
    return out


def _recompute(block: nn.Module, x: Tensor, keys: Tensor | None, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return _plain(block, x, keys)
    out: Tensor = checkpoint(block, x, keys, use_reentrant=False, preserve_rng_state=False, **options)
    return out


def block_runner(recompute: Recompute) -> Runner:
    """A function that runs (block, tokens, keys) and recomputes in the backward pass what `recompute` says.

    "none" keeps everything; "selective" keeps a block's input and the outputs of `KEPT`; "full" keeps a block's input only.
    """
    if recompute == "none":
        return _plain
    if recompute == "full":
        return _recompute
    return partial(_recompute, context_fn=partial(create_selective_checkpoint_contexts, _policy))
