"""Cross-entropy of each clip's logits for the classes of its own dataset."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.loss.precision import at_least_fp32


def clip_losses(logits: Tensor, targets: Tensor, own: Tensor, multi_label: bool = False) -> Tensor:
    """The loss of each clip of one dataset, and 0 for clips of other datasets: fp32 (fp64 for fp64 logits) [N].

    Single label: −Σ_k y_k log softmax(z)_k, with y as given (soft labels need not sum to 1). Multi-label: the binary
    cross-entropy of each class, averaged over the classes.

    Args:
        logits: [N, K].
        targets: soft labels [N, K], or class indices int64 [N] (single label only).
        own: bool [N], whether a clip belongs to this dataset; the other rows of `targets` are ignored.
        multi_label: whether a clip may have several labels.

    Raises:
        ValueError: the shapes do not match, or `targets` holds class indices for a multi-label dataset.
    """
    z = at_least_fp32(logits)
    if targets.dim() == 1:
        if multi_label:
            raise ValueError("a multi-label dataset needs multi-hot targets [N, K], not class numbers [N]")
        losses = F.cross_entropy(z, targets.where(own, 0), reduction="none")
    elif targets.shape != z.shape:
        raise ValueError(f"targets of shape {list(targets.shape)} do not fit logits of shape {list(z.shape)}")
    elif multi_label:
        losses = F.binary_cross_entropy_with_logits(z, targets.to(z.dtype), reduction="none").mean(-1)
    else:
        losses = -(targets.to(z.dtype) * F.log_softmax(z, -1)).sum(-1)
    return torch.where(own, losses, 0.0)
