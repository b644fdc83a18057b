"""The gradient of one update: the exact mean over the effective batch, for every micro-batch size.

With ``loss.scope=update`` the informative loss takes its statistics over all clips of the update. Its gradient with
respect to the embeddings, G = ∂L/∂E, needs all embeddings at once, and a rank holds one micro-batch. So a first pass computes the
embeddings without a graph and gathers them, G follows in closed form from E, and a second pass with the graph adds ⟨e, G⟩
for its own clips: the chain rule, exactly. With a single micro-batch per rank one pass is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multitrain.config import RunConfig
from multitrain.data.loader import Batch
from multitrain.data.mix import DeviceBatch, finalize_batch
from multitrain.engine.deepspeed import Engine
from multitrain.engine.distributed import World
from multitrain.engine.profile import phase
from multitrain.engine.stopwatch import Stopwatch
from multitrain.loss import MultiDatasetLoss, Terms, embedding_gradient
from multitrain.model.multitrain import MultiTrain
from multitrain.order import BatchShape

Surrogate = tuple[Tensor, Tensor]
"""The informative loss of the update, and the rows [N, C] of its gradient that belong to one micro-batch."""


@dataclass
class Losses:
    """Sums over this rank's micro-batches of an update, on the device, for the log.

    `terms`: classification, projection and informative loss, [3]. `per_dataset`: summed own-head loss and number of
    clips of each dataset, [D, 2]. `forward`: time of the forward passes. `skipped`: unreadable videos and their fallback samples.
    """

    terms: Tensor
    per_dataset: Tensor
    forward: Stopwatch
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def none(cls, datasets: int, device: torch.device) -> Losses:
        """Zero sums."""
        return cls(torch.zeros(3, device=device), torch.zeros(datasets, 2, device=device), Stopwatch(device))

    def add(self, terms: Terms, skipped: list[dict[str, Any]]) -> None:
        """Add one micro-batch."""
        self.terms += torch.stack([terms.classification, terms.projection, terms.informative]).detach()
        rows = [torch.stack([terms.per_dataset[n] * c, c.to(self.per_dataset.dtype)]) for n, c in terms.counts.items()]
        self.per_dataset += torch.stack(rows)
        self.skipped.extend(skipped)


class Gradient:
    """Computes this rank's part of the gradient of one update."""

    def __init__(self, config: RunConfig, model: MultiTrain, engine: Engine, shape: BatchShape, world: World) -> None:
        self._config = config
        self._model = model
        self._engine = engine
        self._shape = shape
        self._world = world
        self._whole_update = config.loss.scope == "update" and config.loss.informative_weight > 0
        self._loss = MultiDatasetLoss(
            model.datasets,
            config.loss,
            multi_label=model.multi_label,
            group=dist.group.WORLD,
            clips_per_update=shape.effective_batch * config.augment.copies,
        )

    def accumulate(self, micro_batches: Iterator[Batch]) -> Losses:
        """Add the gradient of this rank's `micro_batches` (all of the update) to the engine's accumulated gradient.

        Exceptions of the iterator pass through; the accumulated gradient must then be discarded.
        """
        losses = Losses.none(len(self._model.datasets), self._engine.device)
        pairs: Iterable[tuple[Batch, Surrogate | None]] = ((batch, None) for batch in micro_batches)
        if self._whole_update and self._shape.accumulation > 1:
            batches, embeddings = [], []
            for batch in micro_batches:
                batches.append(batch)
                with phase("forward"), losses.forward.running():
                    embeddings.append(self._embed(batch))
            pairs = zip(batches, self._surrogates(embeddings))
        for batch, surrogate in pairs:
            self._micro_batch(batch, surrogate, losses)
        return losses

    def _micro_batch(self, batch: Batch, surrogate: Surrogate | None, losses: Losses) -> None:
        """Forward and backward pass of one micro-batch; its losses are added to `losses`."""
        with phase("forward"), losses.forward.running():
            given = self._prepare(batch)
            with self._engine.autocast():
                out = self._model.outputs(given.clips, given.keys)
        with phase("loss"):
            if self._whole_update and surrogate is None and out.expanded is not None:
                (surrogate,) = self._surrogates([out.expanded.detach()])
            terms = self._loss(out, given.targets, given.dataset, surrogate)
        with phase("backward"):
            self._engine.backward(terms.total / self._shape.accumulation)
        losses.add(terms, batch.skipped)

    @torch.no_grad()
    def _embed(self, batch: Batch) -> Tensor:
        """Expanded embeddings [N, C] of a micro-batch, without a graph, with the same dropout masks as the pass with a graph."""
        given = self._prepare(batch)
        with self._engine.autocast():
            return self._model.embeddings(given.clips, given.keys)

    def _surrogates(self, embeddings: list[Tensor]) -> list[Surrogate]:
        """For each micro-batch of this rank: the informative loss of the update, and its gradient for the micro-batch.

        Rows are gathered in the order of the samples, whatever the world size.
        """
        own = torch.cat(embeddings).float().contiguous()
        rows = [torch.empty_like(own) for _ in range(self._world.size)]
        dist.all_gather(rows, own)
        loss = self._config.loss
        value, gradient = embedding_gradient(torch.cat(rows), loss.std_weight, loss.covariance_weight)
        own_gradient = gradient[self._world.rank * len(own) :][: len(own)]
        return [(value, g) for g in own_gradient.split([len(e) for e in embeddings])]

    def _prepare(self, batch: Batch) -> DeviceBatch:
        """Clips [N, 3, T, S, S], targets and keys [N] on the device."""
        config = self._config
        return finalize_batch(
            batch,
            config.data,
            self._model.datasets,
            config.augment,
            self._engine.device,
            config.seed,
            model=config.model,
        )
