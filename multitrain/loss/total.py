"""The total loss: L = classification + projection + 0.1 · informative (Liang et al., NeurIPS 2022, §3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from multitrain.config import ConfigError, LossConfig, nearest
from multitrain.loss.classification import clip_losses
from multitrain.loss.gather import all_gather
from multitrain.loss.informative import informative_loss
from multitrain.loss.precision import at_least_fp32
from multitrain.loss.projection import projected_losses


class ModelOutputs(Protocol):
    """The model's outputs that the loss reads."""

    logits: dict[str, Tensor]
    """By dataset: [N, K]."""
    projected: dict[tuple[str, str], Tensor]
    """By (source, target): [N, K_target]."""
    expanded: Tensor | None
    """Embeddings [N, D]."""


@dataclass
class Terms:
    """The loss and its terms, scalar tensors; means over the given clips."""

    total: Tensor
    """classification + projection + informative_weight · informative."""
    classification: Tensor
    """Loss of each clip's own head."""
    projection: Tensor
    """Loss of the other heads' projected logits, times projection_weight."""
    informative: Tensor
    """Unweighted: std_weight · std term + covariance_weight · covariance term."""
    per_dataset: dict[str, Tensor] = field(default_factory=dict)
    """Mean own-head loss over each dataset's clips, detached and without the dataset's weight; 0 if it has no clip here."""
    counts: dict[str, Tensor] = field(default_factory=dict)
    """Number of clips of each dataset, int64 scalars."""


class MultiDatasetLoss:
    """The loss of a micro-batch of clips of several datasets.

    Args:
        datasets: class count by dataset name; a clip's dataset id is its dataset's position in this mapping.
        config: weights of the terms.
        multi_label: datasets whose clips may have several labels; their loss is binary cross-entropy.
        group: ranks over which the informative loss gathers embeddings; the mean of their gradients is the true gradient.
        clips_per_update: clips per update, over all ranks and accumulation steps. When given, a call with
            `scope="update"` that gets fewer clips must pass the `surrogate`.

    Raises:
        ConfigError: `multi_label` names a dataset that is not in `datasets`.
    """

    def __init__(
        self,
        datasets: dict[str, int],
        config: LossConfig,
        multi_label: Collection[str] = (),
        group: dist.ProcessGroup | None = None,
        clips_per_update: int | None = None,
    ) -> None:
        for name in multi_label:
            if name not in datasets:
                raise ConfigError(f"multi_label names {name!r}, which is not a dataset here; {nearest(name, datasets)}")
        self.datasets = dict(datasets)
        self.config = config
        self.multi_label = frozenset(multi_label)
        self.group = group
        self.clips_per_update = clips_per_update

    def __call__(
        self,
        out: ModelOutputs,
        targets: Mapping[str, Tensor] | Tensor,
        dataset_ids: Tensor,
        surrogate: tuple[Tensor, Tensor] | None = None,
    ) -> Terms:
        """Compute the loss terms for N clips.

        Args:
            out: the model's outputs for these clips.
            targets: by dataset, soft labels [N, K] or class indices int64 [N]; or, for single-label datasets only,
                the class index of each clip in its own dataset, int64 [N].
            dataset_ids: position in `datasets` of each clip's dataset, int64 [N].
            surrogate: the informative loss over all clips of the update, and these clips' rows [N, D] of its gradient,
                both from `embedding_gradient`. The informative term then has that value; its gradient, averaged over
                the update's micro-batches, is that of the loss over the whole batch.

        Raises:
            ConfigError: the informative loss gets fewer than two clips, or, with `scope="update"` and no surrogate, not all clips.
            ValueError: the model lacks an output that has a positive weight, or shapes do not match.
        """
        terms = self._labelled(out, targets, dataset_ids)
        if self.config.informative_weight:
            terms.informative = self._informative(out.expanded, surrogate).to(terms.total.dtype)
            terms.total = terms.total + self.config.informative_weight * terms.informative
        return terms

    def _labelled(self, out: ModelOutputs, targets: Mapping[str, Tensor] | Tensor, dataset_ids: Tensor) -> Terms:
        """Classification and projection terms; L_cls = (1/n) Σ_d w_d Σ_i m_d(i) ℓ_d(i)."""
        names = list(self.datasets)
        zero = at_least_fp32(out.logits[names[0]].new_zeros(()))
        terms = Terms(zero, zero, zero, zero)
        n = dataset_ids.shape[0]
        if out.logits[names[0]].shape[0] != n:
            raise ValueError(f"{n} dataset ids do not fit logits of {out.logits[names[0]].shape[0]} clips")
        for position, name in enumerate(names):
            own = dataset_ids == position
            weight = self.config.dataset_weights.get(name, 1.0) / n
            y = targets if isinstance(targets, Tensor) else targets[name]
            several = name in self.multi_label
            losses = clip_losses(out.logits[name], y, own, several)
            terms.classification = terms.classification + weight * losses.sum()
            others = [other for other in names if other != name]
            if self.config.projection_weight and others:
                across = projected_losses(out.projected, name, others, y, own, several).sum()
                terms.projection = terms.projection + weight * self.config.projection_weight * across
            terms.counts[name] = own.sum()
            terms.per_dataset[name] = losses.detach().sum() / terms.counts[name].clamp(min=1)
        terms.total = terms.classification + terms.projection
        return terms

    def _informative(self, expanded: Tensor | None, surrogate: tuple[Tensor, Tensor] | None) -> Tensor:
        if expanded is None:
            raise ValueError("the informative loss has a positive weight, but the model has no expander")
        if surrogate is not None:
            return self._surrogate(expanded, *surrogate)
        gathered = all_gather(at_least_fp32(expanded), self.group)
        if self.config.scope == "update" and self.clips_per_update not in (None, gathered.shape[0]):
            raise ConfigError(
                f"loss.scope=update is the informative loss over all {self.clips_per_update} clips of an update, "
                f"but this call sees {gathered.shape[0]}; pass the surrogate of embedding_gradient, or use loss.scope=micro"
            )
        return informative_loss(gathered, self.config.std_weight, self.config.covariance_weight)[0]

    def _surrogate(self, expanded: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """`value`, whose gradient with respect to `expanded` is (M/n)·`gradient`, for n of the update's M clips."""
        if gradient.shape != expanded.shape:
            raise ValueError(
                f"a gradient of shape {list(gradient.shape)} for embeddings of shape {list(expanded.shape)}"
            )
        e = at_least_fp32(expanded)
        share = (self.clips_per_update or e.shape[0]) / e.shape[0]
        linear = (e * gradient.to(e.dtype)).sum() * share
        return value + (linear - linear.detach())
