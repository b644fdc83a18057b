"""Count the bytes saved, the bytes moved and the kernels of a training step without data: any size, in seconds, on any machine.

The step runs on fake tensors, which have shapes and no memory (torch's FakeTensor). Torch without CUDA cannot make fake CUDA tensors,
so they are fake CPU tensors with CUDA's choices patched in: its autocast policy for the baseline, our code's CUDA paths, and cuDNN's
layout of convolution results, which torch otherwise chooses by the processor's instructions.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import multitrain.model
from benchmarks.network import loss_of, trained_outputs
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain, constants

LOWERED = {torch.nn.functional.linear, torch.nn.functional.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__}
RAISED = {torch.nn.functional.layer_norm, torch.nn.functional.softmax, torch.softmax, Tensor.softmax}
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
)
"""Operations that launch no kernel, besides views."""
OVERWRITE = ("copy_", "zero_", "fill_", "_foreach_copy_")
"""Operations that overwrite their first argument without reading it."""


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast policy for bf16, as far as the baseline needs it: matrix products in bf16, norms and softmax in fp32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = torch.bfloat16 if function in LOWERED else torch.float32 if function in RAISED else None
        if dtype is not None:
            args, kwargs = torch.utils._pytree.tree_map(lambda x: _cast(x, dtype), (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


@dataclass
class Counts:
    """Counts of one step. The bytes `saved` and `peak` do not include the parameters."""

    kernels: int = 0
    forward_kernels: int = 0
    moved: int = 0
    forward_moved: int = 0
    saved: int = 0
    peak: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    """Kernels by name."""
    moved_by: Counter[str] = field(default_factory=Counter)
    """Bytes by name."""


class _Counter(TorchDispatchMode):
    """Counts dispatched operations: bytes of all inputs and outputs, and bytes alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._schema.name.split("::")[1]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            self._see(x)
        if function.is_view or name in FREE or function._schema.name.startswith("prim"):
            return out
        read = [x for x in tree_leaves((args[1:] if name in OVERWRITE else args, kwargs)) if isinstance(x, Tensor)]
        written = outputs or [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
        if "out" in kwargs:
            read = [x for x in read if x is not kwargs["out"]]
        moved = sum(_bytes(x) for x in {id(x): x for x in read}.values()) + sum(map(_bytes, written))
        self.counts.kernels += 1
        self.counts.moved += moved
        self.counts.by_operation[name] += 1
        self.counts.moved_by[name] += moved
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.counts.peak = max(self.counts.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.live -= size


def _bytes(x: Tensor) -> int:
    """Bytes of a tensor; an expanded axis counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= size if stride else 1
    return elements * x.element_size()


def _yes(_: Any) -> bool:
    """A replacement for such a function; a Mock would keep its tensor arguments alive."""
    return True


def _no(_: Any) -> None:
    return None


ANSWERS = {"is_cuda": _yes, "has_flash": _yes, "emulated_dtype": _no}
"""Functions that ask about the device, and their results on CUDA."""


def _cudnn_layout(x: Tensor, weight: Tensor, _backend: Any) -> torch.memory_format:
    """Layout of a convolution's results under cuDNN: channels last if the input or the filters are."""
    layouts = suggest_memory_format(x), suggest_memory_format(weight)
    return next((layout for layout in layouts if layout != torch.contiguous_format), torch.contiguous_format)


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Make our code take its CUDA paths and torch use cuDNN's layouts, regardless of device and processor."""
    names = [name for _, name, _ in pkgutil.iter_modules(multitrain.model.__path__, "multitrain.model.")]
    with contextlib.ExitStack() as stack:
        FakeTensorMode.cache_clear()  # results that were computed with the processor's answers, and ours when we leave
        stack.callback(FakeTensorMode.cache_clear)
        stack.enter_context(mock.patch.dict(constants.CACHE, clear=True))  # it may hold tensors with data
        for module in map(importlib.import_module, names):
            for name in ANSWERS.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, ANSWERS[name]))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _cudnn_layout))
        yield


def count(step: Callable[[Tensor], Tensor], config: ModelConfig, clips: int, parameters: list[Tensor]) -> Counts:
    """Counts of `step(clips)` (a scalar) and its backward pass. Call it under the FakeTensorMode of the parameters."""
    shape = (clips, 3, config.frames, config.crop, config.crop)
    own = {p.untyped_storage()._cdata for p in parameters}
    saved: dict[int, tuple[Any, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage, storage.nbytes()
        return x

    batch = torch.empty(shape)
    with _Counter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = step(batch)
        c = counter.counts
        c.saved = sum(size for _, size in saved.values())
        saved.clear()
        c.forward_kernels, c.forward_moved = c.kernels, c.moved
        loss.backward()
    for p in parameters:
        p.grad = None
    return c


def counts_of_ours(config: ModelConfig, datasets: dict[str, int], mode: str, clips: int) -> Counts:
    """A training step of our model, bf16 autocast, as on CUDA."""
    with FakeTensorMode(), as_on_cuda(), torch.random.fork_rng(devices=[]):
        model = _model(config, datasets, mode)
        keys = torch.empty(clips, dtype=torch.int64)

        def step(batch: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = trained_outputs(model, batch, keys)
            return loss_of(values)

        return count(step, config, clips, list(model.parameters()))


def counts_of_baseline(config: ModelConfig, datasets: dict[str, int], clips: int) -> Counts:
    """A training step of the baseline under CUDA's autocast policy for bf16."""
    from benchmarks.baseline import model as baseline

    with FakeTensorMode(), as_on_cuda(), torch.random.fork_rng(devices=[]):
        model = _model(config, datasets, "none")
        state = dict(model.named_parameters())

        def step(batch: Tensor) -> Tensor:
            with CudaAutocast():
                out = baseline.outputs(state, config, datasets, batch, training=True)
            return loss_of(v for n, v in out.items() if n != "features")

        return count(step, config, clips, list(model.parameters()))


def _model(config: ModelConfig, datasets: dict[str, int], mode: str) -> MultiTrain:
    with mock.patch.object(MultiTrain, "initialise"):  # there is nothing to fill
        return MultiTrain(config, datasets, activation_checkpointing=mode).train()  # type: ignore[arg-type]


def per_clip(counts: Callable[[int], Counts]) -> tuple[Counts, Counts]:
    """(counts of a batch of one clip, what a second clip adds)."""
    one, two = counts(1), counts(2)
    names = ("kernels", "forward_kernels", "moved", "forward_moved", "saved", "peak")
    return one, Counts(**{name: getattr(two, name) - getattr(one, name) for name in names})
