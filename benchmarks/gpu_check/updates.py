"""Updates as the trainer makes them, on clips made here: finalise, gradient in one or two passes, DeepSpeed's step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu_check.environment import join_alone
from benchmarks.gpu_check.network import CASES, Case, network
from benchmarks.gpu_check.setting import Setting, arithmetic
from multitrain.config import RunConfig, validate
from multitrain.data.loader import Batch
from multitrain.data.mix import finalize_batch
from multitrain.engine.distributed import World
from multitrain.engine.update import Gradient, Losses
from multitrain.loss import MultiDatasetLoss
from multitrain.model import MultiTrain
from multitrain.order import BatchShape, solve
from multitrain.order.plan import SAMPLE_DTYPE

LR = 1e-4


def case_of(setting: Setting) -> Case:
    """The network of this setting and its datasets."""
    return CASES["tiny" if setting.tiny else "mvit_b"]


def config_of(setting: Setting, videos: int, micro_batch: int, precision: str, **changes: Any) -> RunConfig:
    """A run of `videos` videos an update, with two clips of each, on one rank."""
    case = case_of(setting)
    datasets = {n: {"classes": k, "annotations": n, "videos": n} for n, k in case.datasets.items()}
    given = {
        "gpus": 1,
        "updates": 100,
        "effective_batch": videos,
        "micro_batch": micro_batch,
        "precision": precision,
        "cluster": {"kind": "local"},
        "data": {"datasets": datasets},
        "model": case.config.model_dump(),
        **{name: {} for name in ("loss", "optim", "engine", "augment", "eval")},
    }
    return validate({**given, **changes})


class Plain:
    """The engine's interface without DeepSpeed: gradients stay in the parameters until the update."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self.model, self.device, self._precision = model.to(device), device, precision
        self._optimizer: torch.optim.Optimizer | None = None

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The arithmetic of the forward pass."""
        return arithmetic(self._precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def update(self, lr: float) -> float:
        """Clip and step AdamW; the norm of the gradient."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, fused=self.device.type == "cuda")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


@dataclass
class Updates:
    """One rank that updates a model."""

    setting: Setting
    config: RunConfig
    shape: BatchShape
    model: MultiTrain
    engine: Any
    gradient: Gradient
    batches: list[Batch]

    def accumulate(self) -> Losses:
        """The gradient of one update, added to the accumulated one."""
        return self.gradient.accumulate(iter(self.batches))

    def update(self) -> float:
        """One whole update; the norm of its gradient."""
        self.accumulate()
        return float(self.engine.update(LR))

    def direct(self) -> Tensor:
        """The loss of the whole update by plain autograd, in one micro-batch and without a surrogate; its gradient is added."""
        (batch,) = self.batches if len(self.batches) == 1 else (joined(self.batches),)
        config = self.config
        datasets = self.model.datasets
        device, seed = self.setting.device, config.seed
        given = finalize_batch(batch, config.data, datasets, config.augment, device, seed, model=config.model)
        with self.engine.autocast():
            out = self.model.outputs(given.clips, given.keys)
        total = MultiDatasetLoss(datasets, config.loss)(out, given.targets, given.dataset).total
        self.engine.backward(total)
        return total.detach()

    def resized(self, videos: int, micro_batch: int) -> Updates:
        """The same model and engine, with updates of another size."""
        config = self.config.model_copy(update={"effective_batch": videos, "micro_batch": micro_batch})
        return _of(self.setting, config, self.model, self.engine)

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients by name, which are then none."""
        found = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found


def updates(
    setting: Setting,
    videos: int,
    micro_batch: int,
    precision: str,
    *,
    mode: str = "none",
    deepspeed: bool = True,
) -> Updates:
    """A rank that updates the setting's network on `videos` videos at once, in micro-batches of `micro_batch`."""
    config = config_of(setting, videos, micro_batch, precision, activation_checkpointing=mode)
    model = network(case_of(setting), mode)  # type: ignore[arg-type]
    join_alone(setting)
    if deepspeed:
        from multitrain.engine.deepspeed import Engine

        engine: Any = Engine(model, config.optim, config.engine, precision, setting.device)
    else:
        engine = Plain(model, precision, setting.device)
    return _of(setting, config, model, engine)


def _of(setting: Setting, config: RunConfig, model: MultiTrain, engine: Any) -> Updates:
    videos = config.effective_batch
    shape = solve(videos, nodes=1, gpus=1, micro_batch=config.micro_batch, group=config.group)
    control = dist.new_group(backend="gloo")
    world = World(0, 1, 0, setting.device, control, control)
    gradient = Gradient(config, model, engine, shape, world)
    batches = [made_batch(config, n, setting) for n in range(shape.accumulation)]
    return Updates(setting, config, shape, model, engine, gradient, batches)


def made_batch(config: RunConfig, number: int, setting: Setting) -> Batch:
    """Micro-batch `number`: clips of random pixels, a box to erase in every fourth; pinned for a GPU."""
    videos, copies, c = config.micro_batch or 1, config.augment.copies, config.model
    n, rng = videos * copies, np.random.default_rng(number)
    classes = [d.classes or 1 for d in config.data.datasets.values()]
    dataset = torch.arange(number * videos, (number + 1) * videos).remainder(len(classes)).repeat_interleave(copies)
    boxes = torch.tensor(
        [[c.crop // 8] * 2 + [c.crop // 2] * 2 if i % 4 == 0 else [0] * 4 for i in range(n)], dtype=torch.int32
    )
    batch = Batch(
        clips=torch.from_numpy(rng.integers(0, 256, (n, c.frames, c.crop, c.crop, 3), dtype=np.uint8)),
        dataset=dataset,
        labels=[(i % classes[d],) for i, d in enumerate(dataset.tolist())],
        boxes=boxes,
        keys=torch.from_numpy(rng.integers(0, 2**62, n, dtype=np.int64)),
        tickets=np.zeros(videos, SAMPLE_DTYPE),
        start=number * videos,
        skipped=[],
        decode_seconds=0.0,
    )
    return batch.pin_memory() if setting.cuda else batch


def joined(batches: list[Batch]) -> Batch:
    """All micro-batches of an update as one."""
    tensors = {n: torch.cat([getattr(b, n) for b in batches]) for n in ("clips", "dataset", "boxes", "keys")}
    labels = [label for b in batches for label in b.labels]
    return Batch(**tensors, labels=labels, tickets=batches[0].tickets, start=0, skipped=[], decode_seconds=0.0)
