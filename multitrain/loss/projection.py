"""Cross-entropy of the other datasets' logits, projected to the classes of the clip's own dataset (Liang et al., §3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multitrain.loss.classification import clip_losses


def projected_losses(
    projected: Mapping[tuple[str, str], Tensor],
    target: str,
    sources: Sequence[str],
    targets: Tensor,
    own: Tensor,
    multi_label: bool = False,
) -> Tensor:
    """(1/(D−1)) Σ_{a≠d} CE(ẑ_ad(i), y_d(i)) for every clip i of dataset d = `target`, and 0 for other clips: [N].

    Args:
        projected: projected logits by (source, target), [N, K_target].
        target: the dataset.
        sources: the D−1 other datasets.
        targets, own, multi_label: as in `clip_losses`.

    Raises:
        ValueError: a pair is missing from `projected`.
    """
    missing = [source for source in sources if (source, target) not in projected]
    if missing:
        raise ValueError(f"the projection from {missing[0]!r} to {target!r} is missing from the model's outputs")
    losses = [clip_losses(projected[source, target], targets, own, multi_label) for source in sources]
    return torch.stack(losses).mean(0)
