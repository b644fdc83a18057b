"""Decomposition of an update: effective batch = micro-batch × accumulation × GPUs. Accumulation is computed, not configured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from multitrain.errors import ConfigError


class BatchShapeError(ConfigError):
    """An effective batch that does not divide; one line with the given values and the nearest that work."""


@dataclass(frozen=True)
class BatchShape:
    """The decomposition of an update; all counts are of videos.

    Raises:
        BatchShapeError: unless effective_batch = world_size × micro_batch × accumulation.
    """

    effective_batch: int
    """Videos per update, over all ranks."""
    world_size: int
    """Ranks (GPUs)."""
    micro_batch: int
    """Videos of one rank in one forward and backward pass."""
    accumulation: int
    """Micro-batches of one rank per update."""

    def __post_init__(self) -> None:
        parts = self.world_size, self.micro_batch, self.accumulation
        if min(parts) < 1 or self.world_size * self.videos_per_rank != self.effective_batch:
            raise BatchShapeError(f"{self}: effective_batch is not world_size × micro_batch × accumulation")

    @property
    def videos_per_rank(self) -> int:
        """Videos of one rank per update."""
        return self.micro_batch * self.accumulation

    def slice(self, update: int, micro_step: int, rank: int) -> tuple[int, int]:
        """The sample numbers ``[start, stop)`` of one micro-batch of one rank.

        Raises:
            IndexError: for a negative update, or a micro-step or rank that this shape does not have.
        """
        if update < 0 or not 0 <= micro_step < self.accumulation or not 0 <= rank < self.world_size:
            raise IndexError(f"no update {update}, micro-step {micro_step}, rank {rank} in {self}")
        start = update * self.effective_batch + rank * self.videos_per_rank + micro_step * self.micro_batch
        return start, start + self.micro_batch


def solve(
    effective_batch: int,
    *,
    nodes: int,
    gpus: int,
    micro_batch: int | None = None,
    group: int = 1,
    largest_micro_batch: int = 4,
) -> BatchShape:
    """The shape of an update of `effective_batch` videos on `nodes` × `gpus` GPUs.

    Args:
        micro_batch: videos per GPU and forward pass; None takes the largest divisor up to
            `largest_micro_batch` (or one group, if a group is larger).
        group: videos that have to stay together in a micro-batch (the option augment.mix_group).

    Raises:
        BatchShapeError: when it does not divide; the message names the nearest values that do, by the options' names.
    """
    for name, value in _options(effective_batch, nodes, gpus, micro_batch, group, largest_micro_batch):
        if value < 1:
            raise BatchShapeError(f"{name}={value} is not possible; use {name}=1 or more")
    world = nodes * gpus
    unit = group if micro_batch is None else micro_batch
    if micro_batch is not None and micro_batch % group:
        near = _around(micro_batch, lambda m: m % group == 0, 2 * micro_batch + group)
        raise BatchShapeError(
            f"micro_batch={micro_batch} does not hold whole groups of augment.mix_group={group} videos; "
            f"use {_choices('micro_batch', near)}, or augment.mix_group=1"
        )
    if effective_batch % (world * group):
        raise BatchShapeError(_refusal(effective_batch, nodes, gpus, group, unit))
    per_rank = effective_batch // world
    sizes = [m for m in range(group, per_rank + 1, group) if per_rank % m == 0]
    if micro_batch is None:
        micro_batch = max((m for m in sizes if m <= largest_micro_batch), default=group)
    if micro_batch not in sizes:
        raise BatchShapeError(
            f"micro_batch={micro_batch} does not divide the {per_rank} videos that each of "
            f"{_gpus(nodes, gpus)} has of effective_batch={effective_batch}; use {_choices('micro_batch', sizes)}"
        )
    return BatchShape(effective_batch, world, micro_batch, per_rank // micro_batch)


def _options(batch: int, nodes: int, gpus: int, micro: int | None, group: int, largest: int) -> list[tuple[str, int]]:
    options = [("effective_batch", batch), ("nodes", nodes), ("gpus", gpus), ("augment.mix_group", group)]
    return [*options, ("largest_micro_batch", largest), *([] if micro is None else [("micro_batch", micro)])]


def _refusal(batch: int, nodes: int, gpus: int, group: int, unit: int) -> str:
    """The error for a `batch` that does not divide over these GPUs, with the nearest GPU counts and batches that work."""
    world = nodes * gpus
    what = f"effective_batch={batch} does not divide over {_gpus(nodes, gpus)}"
    if group > 1:
        what += f" in groups of augment.mix_group={group} videos"
    worlds = _around(world, lambda w: batch % (w * unit) == 0, 2 * world)
    step = world * unit
    batches = [b for b in (batch // step * step, (batch // step + 1) * step) if b]
    on_a_node = max(gpus, 8) if nodes == 1 else gpus
    remedies = [" or ".join(_placed(w, on_a_node) for w in worlds)] if worlds else []
    return f"{what}; use {', or '.join([*remedies, _choices('effective_batch', batches)])}"


def _around(value: int, works: Callable[[int], bool], limit: int) -> list[int]:
    """The nearest number below `value` that works and the nearest above it, up to `limit`; those that exist."""
    below = next((v for v in range(value - 1, 0, -1) if works(v)), None)
    above = next((v for v in range(value + 1, limit + 1) if works(v)), None)
    return [v for v in (below, above) if v is not None]


def _gpus(nodes: int, gpus: int) -> str:
    return f"nodes={nodes} × gpus={gpus} = {nodes * gpus} GPUs"


def _placed(world: int, most: int) -> str:
    """`world` GPUs on as few nodes as possible, with `most` on a node at most."""
    gpus = max(g for g in range(1, most + 1) if world % g == 0)
    return f"{world} GPU{'s' if world > 1 else ''} (nodes={world // gpus} gpus={gpus})"


def _choices(name: str, values: Iterable[int]) -> str:
    return f"{name}=" + " or ".join(str(v) for v in values)
