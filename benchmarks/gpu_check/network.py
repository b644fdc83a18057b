"""The network, clips and labels of the comparison with stored values; the same bits on every machine and version of the libraries.

All numbers come from the raw words of a keyed Philox generator, which numpy keeps between versions, by operations that are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.setting import TINY, arithmetic
from benchmarks.network import DATASETS
from multitrain.config import LossConfig, ModelConfig
from multitrain.data.random import generator
from multitrain.loss import MultiDatasetLoss
from multitrain.loss.total import Terms
from multitrain.model import MultiTrain
from multitrain.model.layers import Recompute
from multitrain.model.multitrain import Outputs

FP16_SCALE = 2.0**10
"""Factor of the loss in fp16, as the engine has one, so that small gradients do not become zero."""
NO_GRADIENT = ("norm_k.bias", "expander.fc2.bias")
"""Parameters whose true gradient is zero: a softmax does not see what is added to all keys, and the informative loss centres."""
SKETCHES = 8


@dataclass(frozen=True)
class Case:
    """A network with its batch."""

    name: str
    config: ModelConfig
    datasets: dict[str, int]
    clips: int


CASES = {
    "tiny": Case("tiny", TINY, {"kinetics": 7, "mit": 5, "ssv2": 3}, 6),
    "mvit_b": Case("mvit_b", ModelConfig(), DATASETS, 3),
}


def uniform(name: str, *shape: int) -> Tensor:
    """Numbers in [-1, 1) on a grid of 2**-23, exact in fp32: float64 [*shape], from `name` alone."""
    words = generator("gpu check", name).bit_generator.random_raw(int(np.prod(shape)))
    return torch.from_numpy((words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1).view(shape)


def network(case: Case, mode: Recompute = "none") -> MultiTrain:
    """The model in training mode, on the CPU in fp32; no weight, bias, norm or pooling filter is trivial."""
    model = MultiTrain.__new__(MultiTrain, case.config)
    initialise, type(model).initialise = type(model).initialise, lambda self, seed: None  # type: ignore[method-assign,assignment]
    try:
        model.__init__(case.config, case.datasets, activation_checkpointing=mode)  # type: ignore[misc]
    finally:
        type(model).initialise = initialise  # type: ignore[method-assign]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = uniform(name, *parameter.shape)
            if parameter.dim() == 1:
                values = values * 0.125 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.startswith("pos_embed"):
                values = values * 0.0625
            else:
                values = values * 2.0 ** -round(0.5 * float(np.log2(parameter[0].numel() / 3)))
            parameter.copy_(values)
    return model.train()


def batch(case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Clips float64 [N, 3, T, S, S], keys int64 [N], soft labels by dataset float64 [N, K], dataset ids int64 [N]."""
    c, n = case.config, case.clips
    clips = uniform("clips", n, 3, c.frames, c.crop, c.crop) * 2
    labels = {d: uniform(f"labels {d}", n, k) + 1 for d, k in case.datasets.items()}
    keys = torch.arange(n) * 0x5DEECE66D + 0xB
    return clips, keys, {d: v / v.sum(1, keepdim=True) for d, v in labels.items()}, torch.arange(n) % len(labels)


@dataclass
class Found:
    """What one forward and backward pass gave."""

    terms: dict[str, float]
    """Loss terms by name."""
    values: dict[str, Tensor]
    """Outputs (``out.…``) and gradients, by name, on the device."""


def step(model: MultiTrain, case: Case, precision: str, device: torch.device) -> Found:
    """One forward and backward pass of `case` in `precision`; `model` is on `device`, and in fp64 for fp64."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    clips, keys, labels, ids = batch(case)
    labels = {d: v.to(device, dtype) for d, v in labels.items()}
    scale = FP16_SCALE if precision == "fp16" else 1.0
    with arithmetic(precision, device):
        out = model.outputs(clips.to(device, dtype), keys.to(device))
        terms = MultiDatasetLoss(case.datasets, LossConfig())(out, labels, ids.to(device))
        (terms.total * scale).backward()
    values = outputs(out)
    values |= {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Found(scalars(terms), values)


def scalars(terms: Terms) -> dict[str, float]:
    """The loss and its terms, and each dataset's own."""
    named = {n: getattr(terms, n) for n in ("total", "classification", "projection", "informative")}
    return {n: float(t.detach()) for n, t in {**named, **{f"own {d}": t for d, t in terms.per_dataset.items()}}.items()}


def outputs(out: Outputs) -> dict[str, Tensor]:
    """The model's outputs by name."""
    found = {"out.features": out.features, **{f"out.logits.{d}": z for d, z in out.logits.items()}}
    found |= {f"out.projected.{a}.{b}": z for (a, b), z in out.projected.items()}
    if out.expanded is not None:
        found["out.expanded"] = out.expanded
    return {n: v.detach() for n, v in found.items()}


def sketch(name: str, value: Tensor) -> list[float]:
    """Sums of all elements with random signs, `SKETCHES` of them, in fp64.

    The mean square of the differences of two sketches estimates the squared L2 distance of the two tensors (each element counts in each
    sum), so that a few numbers stand for a gradient of millions.
    """
    count = value.numel()
    words = generator("gpu check signs", name).bit_generator.random_raw(-(-count // 8))
    bits = torch.from_numpy(words.view(np.uint8)[:count]).to(value.device)
    flat = value.detach().flatten().double()
    return [float((flat * ((bits >> k) & 1)).sum() * 2 - flat.sum()) for k in range(SKETCHES)]
