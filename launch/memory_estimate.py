"""Estimate the needs of a run before it is submitted: memory per GPU, and clips per second from each CPU core.

Nothing is measured here. The bytes per clip were counted for the published networks (`footprint.json`, written by
``python -m benchmarks.footprint``) and scale with tokens × channels, block by block. The loader's clips per core, measured by
``python -m benchmarks.loader``, scale with the number of frames.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitrain.config import ModelConfig, RunConfig, machine
from multitrain.order.batch import BatchShape
from multitrain.text import byte_size, counted

GB = 1e9
CUDA_CONTEXT_BYTES = 0.8 * GB
"""Bytes of CUDA's context and of the workspaces of its libraries; an estimate, since torch does not count them."""
CPU_PROCESS_BYTES = 0.3 * GB
"""Bytes of a rank's process on a CPU before it trains: Python, torch and what they load."""
USABLE_MEMORY_FRACTION = 0.92
"""Fraction of a GPU's memory that an estimate may fill: the allocator cannot use every byte."""
MIN_RELATIVE_WORK = 0.05
"""Work per clip, relative to the default network, below which it does not determine the time of a step."""
FP32_FACTOR = 1.7
"""Bytes of activations in fp32 ÷ bytes in bf16: most double, masks and statistics do not."""

_FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("footprint.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Forecast:
    """The estimated needs of one GPU and its CPU cores."""

    clips: int
    """Clips in a micro-batch of one GPU."""
    clip_bytes: float
    """Bytes of the activations of one clip at the peak of a step."""
    fixed_bytes: float
    """Bytes of weights, gradients, this rank's shard of the optimizer, buffers, and CUDA itself (on a CPU: the process)."""
    gpu_clips: float
    """Clips per second that a GPU is expected to train on; a guess for networks much smaller than the published ones."""
    core_clips: float
    """Clips per second that one core decodes and augments."""

    @property
    def bytes(self) -> float:
        """Peak memory of a GPU, in bytes."""
        return self.fixed_bytes + self.clips * self.clip_bytes


def forecast(config: RunConfig, shape: BatchShape, network: Mapping[str, Any] | None = None) -> Forecast:
    """The estimate for a run whose effective batch is split as in `shape`.

    Args:
        network: what was counted of a network that is not the published one, or not trained in all tensors: see
            :mod:`multitrain.commands.backbone_needs`.
    """
    model, clips = config.model, shape.micro_batch * config.augment.copies
    size = work(model) / work(ModelConfig())
    network = network or {}
    count = network.get("parameters") or parameters(model, [d.classes or 400 for d in config.data.datasets.values()])
    trained = network.get("trained", count)
    if (clip := network.get("clip_bytes")) is None:
        clip = clip_bytes(model, config.activation_checkpointing, network.get("frozen_blocks", 0))
        clip *= FP32_FACTOR if config.precision == "fp32" else 1
    clip += 3 * model.frames * model.crop**2 * (4 + 4 + 1)  # as float32, its mixing partner, and as uint8
    buckets = 2 * min(config.engine.bucket_elements, trained)
    low = 0 if config.precision == "fp32" else 2
    fixed = (
        count * (4 + low)
        + trained * 4
        + (12 if config.ema.decay is None else 16) * trained / shape.world_size
        + 4 * buckets
        + (CPU_PROCESS_BYTES if on_cpus(config) else CUDA_CONTEXT_BYTES)
    )
    return Forecast(
        clips=clips,
        clip_bytes=clip,
        fixed_bytes=fixed,
        gpu_clips=config.cluster.gpu_clips or _FACTS["gpu_clips_per_second"] / size,
        core_clips=_FACTS["loader_clips_per_core"] * 32 / model.frames,
    )


def summary_lines(config: RunConfig, shape: BatchShape, network: Mapping[str, Any] | None = None) -> list[str]:
    """The estimate as comment lines for the user; warnings come last, each with a remedy. `network`: see :func:`forecast`."""
    f, cluster = forecast(config, shape, network), config.cluster
    cores = counted(cluster.cpus_per_gpu, "core")
    needed = f.gpu_clips / cluster.cpus_per_gpu
    device = "rank" if on_cpus(config) else "GPU"
    notes = [
        f"# memory {f.bytes / GB:.1f} GB per {device} at the peak, estimated: {counted(f.clips, 'clip')} × {_clip_size(f.clip_bytes)} "
        f"+ {f.fixed_bytes / GB:.1f} GB (activation_checkpointing={config.activation_checkpointing})"
    ]
    made = f"a core delivers about {f.core_clips:.0f} (multitrain data bench measures yours)"
    if on_cpus(config):
        return [
            *notes,
            f"# loader the ranks compute on CPU cores, which is slower than loading: {made}",
            *local_notes(config),
        ]
    if config.model.own_backbone and cluster.gpu_clips is None:
        return [
            *notes,
            *_memory_warning(config, f),
            f"# loader no estimate for a backbone of your own; {made}",
            *local_notes(config),
        ]
    if cluster.gpu_clips is None and work(config.model) < MIN_RELATIVE_WORK * work(ModelConfig()):
        return [
            *notes,
            *_memory_warning(config, f),
            f"# loader no estimate for so small a network; {made}",
            *local_notes(config),
        ]
    where = "" if cluster.gpu_clips else ", estimated; set cluster.gpu_clips=N if you know it"
    notes.append(
        f"# loader {needed:.1f} clips/s from each of {cores} per GPU, which trains on {f.gpu_clips:.0f} clips/s"
        f"{where}; {made}"
    )
    notes += _memory_warning(config, f)
    if needed > f.core_clips:
        notes.append(
            f"# warning: {cores} cannot feed a GPU; use cluster.cpus_per_gpu={math.ceil(f.gpu_clips / f.core_clips)}, "
            "or videos that decode faster (docs/performance.md)"
        )
    return notes + local_notes(config)


def _clip_size(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= 0.01 * GB else byte_size(size)


def on_cpus(config: RunConfig) -> bool:
    """Whether the ranks will compute on CPU cores, as far as this machine shows."""
    if config.cluster.kind == "local":
        return machine.gpu_count() == 0
    return config.cluster.gpu_request == "none"


def local_notes(config: RunConfig) -> list[str]:
    """Comment lines about what a run with ``cluster=local`` lacks on this machine; empty for other clusters."""
    if config.cluster.kind != "local":
        return []
    cores = machine.cores()
    loaders = config.gpus * config.data.workers
    notes = []
    if on_cpus(config):
        notes.append(
            f"# note: no GPU on this machine: {counted(config.gpus, 'rank')} {'trains' if config.gpus == 1 else 'train'} "
            f"on its {counted(cores, 'core')}"
        )
    if loaders + config.gpus > max(cores, config.gpus + 1):
        fits = max(1, (cores - config.gpus) // config.gpus)
        notes.append(
            f"# warning: {counted(config.gpus, 'rank')} × data.workers={config.data.workers} = {loaders} loader processes on "
            f"{counted(cores, 'core')}; "
            f"use data.workers={fits if fits < config.data.workers else 0}"
            + (f" and gpus={max(1, cores // 2)}" if config.gpus > cores else "")
        )
    return notes


def _memory_warning(config: RunConfig, f: Forecast) -> list[str]:
    memory = config.cluster.gpu_memory
    if memory is None or f.bytes <= USABLE_MEMORY_FRACTION * memory * GB:
        return []
    return [f"# warning: {f.bytes / GB:.1f} GB do not fit cluster.gpu_memory={memory:g} GB; {_smaller(config, f)}"]


def _smaller(config: RunConfig, f: Forecast) -> str:
    """The options with which the run would fit."""
    assert config.cluster.gpu_memory is not None
    free = USABLE_MEMORY_FRACTION * config.cluster.gpu_memory * GB - f.fixed_bytes
    group, copies = config.group, config.augment.copies
    fits = int(free / f.clip_bytes / copies) // group * group if free > 0 else 0
    remedies = [f"micro_batch={fits} or less"] if fits else []
    if config.activation_checkpointing == "none":
        remedies.append("activation_checkpointing=selective")
    return "use " + " or ".join(remedies) if remedies else "use GPUs with more memory"


@dataclass(frozen=True)
class Sizes:
    """The sizes from which the activations of one clip are computed."""

    inputs: int
    """Bytes of the clip and of every block's input, which all modes keep: fp32 up to the first stage change, then bf16."""
    outputs: int
    """Tokens × channels of the blocks' outputs, summed; the activations kept inside the blocks are proportional to it."""
    largest: int
    """Tokens × channels of the largest block; the memory of its backward pass is proportional to it."""


def clip_bytes(model: ModelConfig, activation_checkpointing: str, frozen_blocks: int = 0) -> float:
    """Bytes of the activations of one clip in bf16 at the peak of a training step; nothing is kept of the first `frozen_blocks`."""
    per_output, at_peak = _FACTS["bytes"][activation_checkpointing]
    size = sizes(model, frozen_blocks)
    return float(size.inputs + per_output * size.outputs + at_peak * size.largest)


def sizes(model: ModelConfig, frozen_blocks: int = 0) -> Sizes:
    """The sizes of one clip in bf16; `inputs` and `outputs` without those of the first `frozen_blocks`."""
    first = min(model.stages, default=model.depth)
    blocks = _blocks(model)
    read = [tokens for tokens, _, _ in blocks]
    read.append(model.frames // 2 * _grid(model, model.depth) ** 2)
    return Sizes(
        inputs=2 * 3 * model.frames * model.crop**2
        + sum(
            tokens * d_in * (4 if i <= first else 2) for i, (tokens, d_in, _) in enumerate(blocks) if i >= frozen_blocks
        ),
        outputs=sum(after * d_out for after, (_, _, d_out) in list(zip(read[1:], blocks))[frozen_blocks:]),
        largest=max(tokens * max(d_in, d_out) for tokens, d_in, d_out in blocks),
    )


def work(model: ModelConfig) -> float:
    """Tokens × channels summed over the blocks; the time of a step grows with it."""
    return sum(tokens * max(d_in, d_out) for tokens, d_in, d_out in _blocks(model))


def _blocks(model: ModelConfig) -> list[tuple[int, int, int]]:
    """For each block: input tokens, input channels, output channels."""
    dim, found = model.width, []
    for block in range(model.depth):
        out = 2 * dim if block in model.stages else dim
        found.append((model.frames // 2 * _grid(model, block) ** 2, dim, out))
        dim = out
    return found


def _grid(model: ModelConfig, block: int) -> int:
    """Side of a block's grid of input tokens; an odd side is rounded up when it is halved, as in the model."""
    side = model.crop // 4
    for stage in model.stages:
        side = -(-side // 2) if stage < block else side
    return side


def parameters(model: ModelConfig, classes: list[int]) -> int:
    """Number of parameters of the network with a head for each dataset."""
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
