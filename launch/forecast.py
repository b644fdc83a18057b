"""What a run will need, said before it is submitted: memory of a GPU, and clips that a CPU core has to deliver.

Nothing is measured here. Bytes of a clip were counted for the published networks (`footprint.json`, written by
``python -m benchmarks.footprint``), and follow from tokens × channels, block by block; the loader's clips per core,
measured by ``python -m benchmarks.loader``, are scaled by frames.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitrain.config import ModelConfig, RunConfig
from multitrain.order.batch import BatchShape

GB = 1e9
CONTEXT = 0.8 * GB
"""CUDA's context and its libraries' work space; an estimate, for no count sees it."""
ROOM = 0.92
"""Share of a GPU's memory that a forecast may fill: the allocator cannot use every byte."""
FULL_PRECISION = 1.7
"""Activations in fp32 ÷ in bf16: most double, masks and statistics do not."""

_FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("footprint.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Forecast:
    """What one GPU and its cores have to hold and to do."""

    clips: int
    """Clips in a micro-batch of one GPU."""
    clip_bytes: float
    """Activations of one clip at the peak of a step."""
    fixed_bytes: float
    """Weights, gradients, this rank's share of the optimizer, buffers, and CUDA's own."""
    gpu_clips: float
    """Clips a second that a GPU is expected to train on."""
    core_clips: float
    """Clips a second that one core makes."""

    @property
    def bytes(self) -> float:
        """Peak memory of a GPU."""
        return self.fixed_bytes + self.clips * self.clip_bytes


def forecast(config: RunConfig, shape: BatchShape) -> Forecast:
    """The forecast of a run whose updates are cut as `shape` says."""
    model, clips = config.model, shape.micro_batch * config.augment.copies
    size = work(model) / work(ModelConfig())
    clip = clip_bytes(model, config.activation_checkpointing)
    if config.precision == "fp32":
        clip *= FULL_PRECISION
    clip += 3 * model.frames * model.crop**2 * (4 + 4 + 1)  # as float32, its mixing partner, and as uint8
    count = parameters(model, [d.classes or 400 for d in config.data.datasets.values()])
    buckets = 2 * min(config.engine.bucket_elements, count)
    low = 0 if config.precision == "fp32" else 2
    fixed = count * (4 + 4 + low) + 12 * count / shape.world_size + 4 * buckets + CONTEXT
    return Forecast(
        clips=clips,
        clip_bytes=clip,
        fixed_bytes=fixed,
        gpu_clips=config.cluster.gpu_clips or _FACTS["gpu_clips_per_second"] / size,
        core_clips=_FACTS["loader_clips_per_core"] * 32 / model.frames,
    )


def lines(config: RunConfig, shape: BatchShape) -> list[str]:
    """The forecast as comment lines for a person; warnings last, each with what to do."""
    f, cluster = forecast(config, shape), config.cluster
    cores = cluster.cpus_per_gpu
    needed = f.gpu_clips / cores
    where = "" if cluster.gpu_clips else ", estimated; cluster.gpu_clips=N says better"
    said = [
        f"# memory {f.bytes / GB:.1f} GB a GPU at the peak, predicted: {f.clips} clips × {f.clip_bytes / GB:.2f} GB "
        f"+ {f.fixed_bytes / GB:.1f} GB (activation_checkpointing={config.activation_checkpointing})",
        f"# loader {needed:.1f} clips a second from each of {cores} cores a GPU, which trains on {f.gpu_clips:.0f} a second"
        f"{where}; a core makes about {f.core_clips:.0f} (multitrain data bench measures yours)",
    ]
    if cluster.gpu_memory is not None and f.bytes > ROOM * cluster.gpu_memory * GB:
        said.append(
            f"# warning: {f.bytes / GB:.1f} GB do not fit cluster.gpu_memory={cluster.gpu_memory:g} GB; {_smaller(config, f)}"
        )
    if needed > f.core_clips:
        said.append(
            f"# warning: {cores} cores cannot feed a GPU; use cluster.cpus_per_gpu={math.ceil(f.gpu_clips / f.core_clips)}, "
            "or videos that decode faster (docs/performance.md)"
        )
    return said


def _smaller(config: RunConfig, f: Forecast) -> str:
    """What would fit."""
    assert config.cluster.gpu_memory is not None
    free = ROOM * config.cluster.gpu_memory * GB - f.fixed_bytes
    group, copies = config.group, config.augment.copies
    fits = int(free / f.clip_bytes / copies) // group * group if free > 0 else 0
    remedies = [f"micro_batch={fits} or less"] if fits else []
    if config.activation_checkpointing == "none":
        remedies.append("activation_checkpointing=selective")
    return "use " + " or ".join(remedies) if remedies else "use GPUs with more memory"


@dataclass(frozen=True)
class Sizes:
    """What the activations of one clip follow from."""

    inputs: int
    """Bytes of the clip and of every block's input, which all modes keep: fp32 up to the first stage change, then bf16."""
    outputs: int
    """Tokens × channels of the blocks' outputs, summed: so much is kept of what is inside the blocks."""
    largest: int
    """Tokens × channels of the largest block: so much is alive while its gradient is computed."""


def clip_bytes(model: ModelConfig, activation_checkpointing: str) -> float:
    """Activations of one clip in bf16 at the peak of a training step."""
    per_output, at_peak = _FACTS["bytes"][activation_checkpointing]
    size = sizes(model)
    return float(size.inputs + per_output * size.outputs + at_peak * size.largest)


def sizes(model: ModelConfig) -> Sizes:
    """The sizes of one clip in bf16."""
    first = min(model.stages, default=model.depth)
    blocks = _blocks(model)
    return Sizes(
        inputs=2 * 3 * model.frames * model.crop**2
        + sum(tokens * d_in * (4 if i <= first else 2) for i, (tokens, d_in, _) in enumerate(blocks)),
        outputs=sum(tokens // (4 if i in model.stages else 1) * d_out for i, (tokens, _, d_out) in enumerate(blocks)),
        largest=max(tokens * max(d_in, d_out) for tokens, d_in, d_out in blocks),
    )


def work(model: ModelConfig) -> float:
    """Tokens × channels summed over the blocks, which time grows with."""
    return sum(tokens * max(d_in, d_out) for tokens, d_in, d_out in _blocks(model))


def _blocks(model: ModelConfig) -> list[tuple[int, int, int]]:
    """Of each block: tokens that it reads, and channels in and out."""
    side, dim, found = model.crop // 4, model.width, []
    for block in range(model.depth):
        out = 2 * dim if block in model.stages else dim
        found.append((model.frames // 2 * side**2, dim, out))
        if block in model.stages:
            side //= 2
        dim = out
    return found


def parameters(model: ModelConfig, classes: list[int]) -> int:
    """Parameters of the network with a head for each dataset."""
    head = model.width // model.heads
    count = model.width * (3 * 3 * 7 * 7 + 1) + (model.crop // 4) ** 2 * model.width + model.frames // 2 * model.width
    for _, d_in, d_out in _blocks(model):
        hidden = int(d_out * model.mlp_ratio)
        count += d_in * 3 * d_out + 3 * d_out + d_out**2 + d_out + 2 * d_out * hidden + hidden + d_out
        count += 2 * d_in + 2 * d_out + 3 * (27 * head + 2 * head) + (d_in * d_out + d_out if d_in != d_out else 0)
    dim = model.width * 2 ** len(model.stages)
    count += 2 * dim
    for k in classes:
        count += (
            dim * model.head_hidden + model.head_hidden + model.head_hidden * k + k
            if model.head == "mlp"
            else dim * k + k
        )
    if model.projections:
        count += sum(a * b for i, a in enumerate(classes) for j, b in enumerate(classes) if i != j)
    if model.expander:
        count += 2 * dim * model.expander_hidden + model.expander_hidden + dim
    return count
