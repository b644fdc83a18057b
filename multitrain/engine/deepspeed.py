"""DeepSpeed ZeRO-1 behind one class. The only file that imports deepspeed.

Settings that are silently wrong on this version are not offered: ZeRO stage 2, `overlap_comm`, and gradients that are
missing on some ranks (filled with zeros here). Weights, gradients and moments are fp32 in every precision; bf16 and
fp16 are the arithmetic of the forward and backward pass (autocast), so a checkpoint does not depend on the precision.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from multitrain.config import ConfigError, EngineConfig, OptimConfig
from multitrain.engine import without_compiler
from multitrain.engine.parameters import LR_FACTOR, parameter_groups
from multitrain.model.device import autocast

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
"""Name of the averaged weights beside the moments."""


def ema_decay(limit: float, updates: int) -> float:
    """Decay of the moving average at the update number `updates`, counted from 1: `limit`, and less at the beginning, so that the
    initial weights are forgotten."""
    return min(limit, (1 + updates) / (10 + updates))


@dataclass
class LossScale:
    """Dynamic loss scale of fp16: halved when gradients overflow, doubled after `window` good updates. Part of a checkpoint."""

    scale: float = 1.0
    good_updates: int = 0
    window: int = 2000
    dynamic: bool = False

    def after_update(self, overflow: bool) -> None:
        """Adapt to the outcome of an update."""
        if not self.dynamic:
            return
        self.good_updates = 0 if overflow else self.good_updates + 1
        if overflow:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_updates % self.window == 0:
            self.scale *= 2


class ShardFragment(NamedTuple):
    """`numel` elements of the parameter `name` from its element `start` on, at `offset` among the moments of a rank."""

    name: str
    start: int
    numel: int
    offset: int


class Sharded(Mapping[str, Tensor]):
    """Tensors of the shapes of parameters, as ``KIND.NAME``, assembled on access from the parts of all ranks. Iteration yields the names
    of the moments.

    Args:
        shapes: of the parameters, by name.
        layouts: for each rank, which pieces of which parameters its part holds.
        parts: for each rank, its part, float32 [len(kinds) n], kind by kind.
        kinds: e.g. the names of the moments.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        layouts: list[list[ShardFragment]],
        parts: list[Tensor],
        kinds: Sequence[str],
    ) -> None:
        self._shapes = shapes
        self._parts = parts
        self._kinds = list(kinds)
        self._pieces: dict[str, list[tuple[int, ShardFragment]]] = {name: [] for name in shapes}
        for rank, pieces in enumerate(layouts):
            for piece in pieces:
                self._pieces[piece.name].append((rank, piece))

    def __getitem__(self, key: str) -> Tensor:
        kind, _, name = key.partition(".")
        found = []
        for rank, piece in sorted(self._pieces[name], key=lambda pair: pair[1].start):
            begin = self._kinds.index(kind) * (self._parts[rank].numel() // len(self._kinds))
            found.append(self._parts[rank].narrow(0, begin + piece.offset, piece.numel))
        return (found[0] if len(found) == 1 else torch.cat(found)).view(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}.{name}" for name in self._shapes for kind in self._kinds if kind != EMA)

    def __len__(self) -> int:
        return sum(kind != EMA for kind in self._kinds) * len(self._shapes)

    def average(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The averaged weights by name, with the tensors of `weights` that are not trained; empty if there is no average."""
        return Averaged(self, self._shapes, weights) if EMA in self._kinds else {}


class Averaged(Mapping[str, Tensor]):
    """What :meth:`Sharded.average` returns."""

    def __init__(self, sharded: Sharded, trained: Collection[str], weights: Mapping[str, Tensor]) -> None:
        self._sharded = sharded
        self._trained = trained
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._sharded[f"{EMA}.{name}"] if name in self._trained else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Engine:
    """A model, its AdamW state sharded over the ranks by ZeRO-1, and the one way to change both.

    ``backward`` as often as there are micro-batches, then ``update`` once. The process group must exist.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        config: EngineConfig,
        precision: str,
        device: torch.device,
        ema: float | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.model = model.to(device)
        self.device = device
        self.precision = precision
        self.loss_scale = LossScale()
        if precision == "fp16":
            self.loss_scale = LossScale(scale=2.0**config.loss_scale_start, dynamic=True)
        without_compiler.untraced()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optim),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=device.type == "cuda",
        )
        without_compiler.stepping(optimizer)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # batch sizes are handled by multitrain.order
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": optim.clip_norm or 0.0,
            "steps_per_print": 2**62,
            "zero_optimization": {
                "stage": config.zero_stage,
                "overlap_comm": False,
                "contiguous_gradients": False,  # one copy less; tests/engine/test_update.py holds the gradient to plain PyTorch
                "reduce_bucket_size": config.bucket_elements,
                "allgather_bucket_size": config.bucket_elements,
            },
        }
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.steps_applied = 0
        self._layouts: list[list[ShardFragment]] | None = None  # of all ranks
        self._ema_limit = ema
        self._ema = [] if ema is None else [flat.detach().clone() for flat in self._flat_partitions()]
        self.sharded = MOMENTS if ema is None else (*MOMENTS, EMA)
        """What the ranks hold a part of, for each trained parameter."""

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the model's order; equal on all ranks."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of this run's forward pass."""
        return autocast(self.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) to the accumulated one.

        ZeRO averages over ranks: `loss` must be scaled so that the mean over ranks of the sum over micro-batches is
        the loss of the update.
        """
        if self.loss_scale.dynamic:
            self._engine.optimizer.override_loss_scale(self.loss_scale.scale)
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> float:
        """Average the gradient over ranks, clip it, and step AdamW with learning rate `lr` (times a group's factor).

        Returns:
            The global L2 norm of the gradient before clipping; inf when it was not finite and the step was skipped.
        """
        for parameter in self.named_parameters.values():
            if parameter.grad is None:  # ZeRO-1 sums different tensors where ranks lack different gradients
                parameter.grad = torch.zeros_like(parameter)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group[LR_FACTOR]
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        self.loss_scale.after_update(overflow=not applied)
        self.steps_applied += applied
        if not applied:
            return float("inf")
        if self._ema_limit is not None:
            decay = ema_decay(self._ema_limit, self.steps_applied)
            torch._foreach_lerp_(self._ema, [flat.detach() for flat in self._flat_partitions()], 1.0 - decay)
        norm = self._engine.get_global_grad_norm()
        return float(norm)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the trained parameters by name."""
        return {name: parameter.shape for name, parameter in self.named_parameters.items()}

    def copy_weights(self, into: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights by name: fp32 on the CPU, in the tensors of `into` where it has any. Complete on every rank."""
        state = self.model.state_dict()
        if not into:
            into = {n: _host(t.shape, self.device) for n, t in state.items()}
        for name, tensor in state.items():
            into[name].copy_(tensor, non_blocking=True)
        _wait_for(self.device)
        return into

    def pieces(self) -> list[ShardFragment]:
        """Which parts of which parameters the moments lie on this rank for, under ZeRO-1, in the order of `named_parameters`."""
        starts = [0]
        for flat in self._flat_partitions():
            starts.append(starts[-1] + flat.numel())
        found = []
        for name, parameter in self.named_parameters.items():
            link = parameter._hp_mapping  # type: ignore[attr-defined]
            if link is not None:
                own, whole = link.hp_fragment_address, link.lp_fragment_address
                offset = starts[link.param_group_index] + own.start
                found.append(ShardFragment(name, whole.start, whole.numel, offset))
        return found

    def copy_moments(self, into: Tensor | None) -> Tensor:
        """This rank's part of :attr:`sharded`, fp32 [2 n] or [3 n] on the CPU, in `into` when given: what :meth:`pieces` points into
        (n of AdamW's first moment, n of the second, n of the averaged weights). The same n on all ranks. No collective; the moments are
        zeros before the first step.
        """
        self._link_moments()
        state = self._engine.optimizer.optimizer.state
        own = [state[flat][moment] for moment in MOMENTS for flat in self._flat_partitions()] + self._ema
        if into is None:
            into = _host(torch.Size([sum(t.numel() for t in own)]), self.device)
        for target, tensor in zip(into.split([t.numel() for t in own]), own):
            target.copy_(tensor, non_blocking=True)
        _wait_for(self.device)
        return into

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the model compute with the averaged weights meanwhile, if there are any. A collective at the beginning."""
        if self._ema_limit is None:
            yield
            return
        own = torch.cat([part.flatten() for part in self._ema])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        if self._layouts is None:
            self._layouts = [[] for _ in parts]
            dist.all_gather_object(self._layouts, self.pieces())
        average = Sharded(self.shapes, self._layouts, parts, (EMA,))
        trained = {name: (parameter, parameter.detach().clone()) for name, parameter in self.named_parameters.items()}
        with torch.no_grad():
            for name, (parameter, _) in trained.items():
                parameter.copy_(average[f"{EMA}.{name}"])
            try:
                yield
            finally:
                for parameter, kept in trained.values():
                    parameter.copy_(kept)

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 tensors that AdamW steps on this rank, one a parameter group."""
        return [flat for group in self._engine.optimizer.optimizer.param_groups for flat in group["params"]]

    def restore(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        steps_applied: int,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put back the weights and moments of a checkpoint, on any world size. All ranks call it.

        Args:
            average: the averaged weights; an average begins with the weights where there was none.

        Raises:
            ConfigError: when names or shapes are not those of this model.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._check_fits(weights, moments)
        self._link_moments(steps_applied)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(weights[name])
            for name, parameter in self.named_parameters.items():
                safe_set_full_fp32_param(parameter, weights[name].to(self.device))
                for moment in MOMENTS:
                    safe_set_full_optimizer_state(parameter, moments[f"{moment}.{name}"].to(self.device), moment)
        self.steps_applied = steps_applied
        self._restore_average(average or weights)

    def _restore_average(self, average: Mapping[str, Tensor]) -> None:
        """Take this rank's part of the averaged weights."""
        if self._ema_limit is None:
            return
        flat = torch.cat([part.flatten() for part in self._ema])
        for piece in self.pieces():
            values = average[piece.name].flatten()[piece.start : piece.start + piece.numel]
            flat[piece.offset : piece.offset + piece.numel] = values.to(self.device)
        self._ema = [part.view_as(own) for part, own in zip(flat.split([p.numel() for p in self._ema]), self._ema)]

    def _check_fits(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        expected = {n: t.shape for n, t in self.model.state_dict().items()}
        expected |= {f"{m}.{n}": p.shape for n, p in self.named_parameters.items() for m in MOMENTS}
        given = {n: t.shape for n, t in {**weights, **moments}.items()}
        for name in sorted(expected.keys() | given.keys()):
            if expected.get(name) != given.get(name):
                raise ConfigError(
                    f"the checkpoint does not fit the model: {name} is {_shape(given.get(name))} in the checkpoint and "
                    f"{_shape(expected.get(name))} in the model; keep the run's model settings and optim.freeze, or start a new run "
                    "with init_from="
                )

    def _link_moments(self, steps_applied: int | None = None) -> None:
        """Make DeepSpeed see AdamW's moments of the flat partitions, creating them as zeros where AdamW has not yet.

        ZeRO-1 links the moments to the parameters before a client AdamW has made them, and then finds none; linking
        anew before each read or write mends that. The two names are DeepSpeed's own (0.19); a test guards them.
        """
        zero = self._engine.optimizer
        inner = zero.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                state = inner.state[flat]
                for moment in MOMENTS:
                    if moment not in state:
                        state[moment] = torch.zeros_like(flat)
                if steps_applied is not None or "step" not in state:
                    step = torch.tensor(float(steps_applied or 0), dtype=torch.float32)
                    state["step"] = step.to(flat.device) if group.get("fused") else step
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _host(shape: torch.Size, device: torch.device) -> Tensor:
    """Host memory, fp32, page-locked where that speeds up copies from the device."""
    return torch.empty(shape, dtype=torch.float32, pin_memory=device.type == "cuda")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it finds by itself, without a warning
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # torch 2.13 on what DeepSpeed calls
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"training needs DeepSpeed: pip install 'multitrain[train]' ({error})") from error
    if not torch.cuda.is_available():
        # Without this, 0.19 compiles a shared-memory operator with g++ at the first start, which we do not use.
        deepspeed.ops.__compatible_ops__ = {}
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """ZeRO imports Muon at each step, whatever the optimizer is, which compiles three functions: here they stay as they are."""
    from deepspeed.runtime import compiler

    unchanged = mock.patch.object(compiler, "compile", return_value=lambda function: function)
    with unchanged, contextlib.suppress(ImportError):
        from deepspeed.runtime.zero.muon import original_muon  # noqa: F401


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back DeepSpeed's start-up chatter below warnings."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(max(level, logging.WARNING))
