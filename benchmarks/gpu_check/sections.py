"""The sections, the most important first."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """One part of the check: module, title, and the seconds after which it is ended."""

    name: str
    title: str
    limit: int


SECTIONS = (
    Section("environment", "Environment, NCCL, refusals", 60),
    Section("losses", "Losses and gradients against stored values", 150),
    Section("bits", "Same bits twice, across checkpointing modes, deterministic", 120),
    Section("resume", "2 + 2 updates = 4 through a real run", 240),
    Section("poolings", "Pooling routes at the real shapes", 90),
    Section("speed", "Clips/s, MFU, peak memory against the forecast", 150),
    Section("two_pass", "Informative loss in two passes against one", 90),
    Section("syncs", "Host synchronisations in an update", 60),
    Section("kernels", "Kernels of an update", 60),
    Section("transfers", "Loader to device", 60),
)
NAMES = tuple(s.name for s in SECTIONS)
