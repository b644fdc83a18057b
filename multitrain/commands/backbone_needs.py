"""What a run's network needs, counted without its data or its memory: ``python -m multitrain.commands.backbone_needs CONFIG.yaml``.

A submission runs this in a separate process for networks that it has no table of, and where `optim.freeze` or `optim.layer_decay` treats
tensors differently, because it does not import torch itself. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multitrain.config import ConfigError, RunConfig, load
from multitrain.config.arguments import MISTAKE
from multitrain.data.catalog import resolve_classes
from multitrain.engine.parameters import freeze, summary_table, treatments
from multitrain.model.device import autocast
from multitrain.model.multitrain import MultiTrain


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                size = storage.nbytes()
                self._known[storage] = size
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


def needs(config: RunConfig) -> dict[str, Any]:
    """What a submission has to know of a network.

    ``parameters`` and ``trained``: their numbers. ``clip_bytes``: what a second clip adds to the peak of a training step; None for the
    published network, which launch/memory_estimate.py has a table of. ``frozen_blocks``: blocks before the first tensor that is trained.
    ``tensors``: a table of how tensors are trained, as lines; empty if all are trained alike.

    Raises:
        ConfigError: the network cannot be built or trained.
    """
    datasets = {name: resolve_classes(dataset) for name, dataset in config.data.datasets.items()}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model = MultiTrain(config.model, datasets, activation_checkpointing=config.activation_checkpointing).train()
        if (problem := model.untrainable()) is not None:
            raise ConfigError(problem)
        freeze(model, config.optim.freeze, config.loss)
        found = treatments(model, config.optim)
        counted = config.model.backbone is not None
        peaks = [_peak(model, config, clips) for clips in (1, 2)] if counted else []
    return {
        "parameters": sum(t.parameter.numel() for t in found),
        "trained": sum(t.parameter.numel() for t in found if t.trained),
        "clip_bytes": peaks[1] - peaks[0] if counted else None,
        "frozen_blocks": max(0, min(t.layer or 0 for t in found if t.trained) - 1),
        "tensors": [] if config.optim.equal else summary_table(found),
    }


def _peak(model: MultiTrain, config: RunConfig, clips: int) -> int:
    """Bytes at the peak of a training step of so many clips, without the gradients of the parameters."""
    size = config.model
    batch = torch.empty(clips, 3, size.frames, size.crop, size.crop)
    keys = torch.empty(clips, dtype=torch.int64)
    with LiveBytes() as counted:
        with autocast(config.precision, torch.device("cpu")):
            out = model.outputs(batch, keys)
        parts = [*out.logits.values(), *out.projected.values(), *([] if out.expanded is None else [out.expanded])]
        torch.stack([part.float().square().sum() for part in parts]).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return counted.peak


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status: 0, or 2 with a one-line error about the network."""
    try:
        print(json.dumps(needs(load(arguments[0]))))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
