"""What a node reads of packed datasets, and whether `data.stage` can hold it: lines for a dry run, warnings for a submission."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from multitrain.config import DataConfig, RunConfig
from multitrain.data.packs import Pack, open_pack
from multitrain.order import Plan
from multitrain.text import byte_size

if TYPE_CHECKING:
    from multitrain.data.catalog import Catalog

_log = logging.getLogger(__name__)


class Packed(NamedTuple):
    """A packed dataset of a run."""

    name: str
    pack: Pack
    shards: dict[str, int]
    """Bytes by shard."""

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.shards.values())

    def window(self, shards: int) -> float:
        """Bytes of so many shards of usual size; of all, if there are fewer."""
        return self.bytes * min(1.0, shards / len(self.shards))


def packed_datasets(catalogs: Mapping[str, Catalog]) -> list[Packed]:
    """The datasets whose `videos` is a pack."""
    found = ((name, open_pack(catalog.videos)) for name, catalog in catalogs.items())
    return [Packed(name, pack, pack.shards()) for name, pack in found if pack is not None and len(pack)]


def lines(config: RunConfig, catalogs: Mapping[str, Catalog], plan: Plan, clips: float) -> list[str]:
    """The files, bytes and reads of each packed dataset and of a node; no lines without packs.

    Args:
        clips: clips that a node trains on per second.
    """
    packed = packed_datasets(catalogs)
    if not packed:
        return []
    sample = plan.tickets(0, config.effective_batch)
    share = np.bincount(sample["dataset"], minlength=len(plan.sources)) / len(sample)
    shares = {source.name: float(part) for source, part in zip(plan.sources, share)}
    videos = clips / config.augment.copies
    said = [f"pack   {p.name}: {len(p.shards) + 1} files, {byte_size(p.bytes)}, {len(p.pack)} videos" for p in packed]
    reads = sum(videos * shares[p.name] for p in packed) * (2 if config.data.decoder == "decord" else 1)
    rate = sum(videos * shares[p.name] * p.bytes / len(p.pack) for p in packed)
    return [*said, f"reads  of packs, a node and second: {byte_size(rate)}, {reads:.3g} reads"]


def warn(data: DataConfig, catalogs: Mapping[str, Catalog]) -> None:
    """Warn about options that cannot have their effect with these packs."""
    packed = packed_datasets(catalogs)
    for p in packed:
        _warn_of_other_shards(data, p, catalogs[p.name])
        if data.shuffle_window is not None and catalogs[p.name].has_segments:
            _log.warning(
                "%s: the segments of a video are spread over an epoch, so updates read from more shards than data.shuffle_window=%d says",
                catalogs[p.name].csv, data.shuffle_window,
            )  # fmt: skip
    if data.stage is None:
        return
    loose = [repr(name) for name in catalogs if name not in [p.name for p in packed]]
    if loose:
        _log.warning(
            "data.stage: only packs are staged, and %s %s not packed; see multitrain data pack",
            ", ".join(loose), "is" if len(loose) == 1 else "are",
        )  # fmt: skip
    total, limit = sum(p.bytes for p in packed), data.stage_limit
    if total <= limit:
        return
    if data.shuffle_window is None:
        _log.warning(
            "data.stage_limit=%s holds %.0f %% of %s of shards, and with an order without windows every update reads of all: the "
            "other reads go to the shared folders. Raise it, or set data.shuffle_window (for a new run)",
            byte_size(limit), 100 * limit / total, byte_size(total),
        )  # fmt: skip
        return
    window = sum(p.window(data.shuffle_window + 1) for p in packed)
    if window > limit:
        _log.warning(
            "data.stage_limit=%s cannot hold the %s of the shards that updates read with data.shuffle_window=%d: the other reads go to "
            "the shared folders. Raise it, or lower the window (for a new run)",
            byte_size(limit), byte_size(window), data.shuffle_window,
        )  # fmt: skip


def _warn_of_other_shards(data: DataConfig, packed: Packed, catalog: Catalog) -> None:
    """Warn about a pack whose shards differ from those that `data.shuffle_window` assumes: same samples, but from more shards."""
    header = packed.pack.header
    was = header.get("shard_videos"), dict(header.get("rows", {})).get("train")
    if data.shuffle_window is not None and was != (data.shard_videos, len(catalog)):
        _log.warning(
            "%s was packed with %s videos a shard for %s lines of train.csv; with data.shard_videos=%d and %d lines updates read "
            "from more shards than data.shuffle_window=%d says. Set data.shard_videos, or pack again",
            catalog.videos, *was, data.shard_videos, len(catalog), data.shuffle_window,
        )  # fmt: skip


__all__ = ["Packed", "lines", "packed_datasets", "warn"]
