"""Activation checkpointing: what the backward pass recomputes instead of keeping.

"none": nothing. "full": every block, from its input. "selective": each branch of a block, from its input, except its
attention and its last matrix product: less arithmetic than "full", and a lower peak, as one branch at a time is in memory.

Masks are keyed (model/random.py), so recomputing needs no saved random state and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from multitrain.model.attention import CHUNKED

Recompute = Literal["none", "selective", "full"]

KEPT = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    CHUNKED,
}
"""Operations whose outputs "selective" keeps: attention is a third of the arithmetic and a twentieth of the memory."""


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_recomputed_but_attention = partial(_recomputed, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def run_block(recompute: Recompute, block: Callable[..., Tensor], x: Tensor, keys: Tensor | None) -> Tensor:
    """`block(x, keys)`, of which "full" keeps only x and keys."""
    if recompute != "full" or not torch.is_grad_enabled():
        return block(x, keys)
    out: Tensor = _recomputed(block, x, keys)
    return out


def run_branch(recompute: Recompute, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`branch(x)`, of which "selective" keeps only x and the outputs of `KEPT`."""
    if recompute != "selective" or not torch.is_grad_enabled():
        return branch(x)
    out: Tensor = _recomputed_but_attention(branch, x)
    return out
