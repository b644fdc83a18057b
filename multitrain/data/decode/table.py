"""The table of a file's frames: which packet holds each, and from which key packet it can be decoded."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Shown(NamedTuple):
    """A packet whose picture is shown."""

    packet: int
    """Its number in the file."""
    pts: int | None
    """When, in units of the stream's time base; None where the file does not say."""


class Key(NamedTuple):
    """A packet that decoding can start from."""

    packet: int
    pts: int


@dataclass(frozen=True)
class Table:
    """Where the shown frames are among a file's packets; frames in presentation order, packets in file order."""

    packet: list[int]
    """Number of the packet that holds frame n."""
    start: list[int]
    """Number of the key packet from which frame n can be decoded."""
    pts: list[int] | None
    """Presentation time of frame n; None for a file without: there frame n is the n-th that the decoder gives."""

    def runs(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The runs of packets (first, last) that decode frames `numbers`, in order, none overlapping."""
        runs: list[tuple[int, int]] = []
        for start, end in sorted((self.start[n], self.packet[n]) for n in numbers):
            if runs and start <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], end)
            else:
                runs.append((start, end))
        return runs


def by_count(shown: Sequence[Shown]) -> Table:
    """The table of a file without presentation times."""
    return Table([s.packet for s in shown], [0] * len(shown), None)


def by_time(shown: Sequence[Shown], keys: Sequence[Key]) -> Table:
    """The table of a file whose presentation times can be trusted; `keys` in file order.

    A frame can be decoded from the last key packet before it that is shown no later: pictures stored after a key picture
    but shown before it (open groups of pictures) refer to what came earlier.
    """
    frames = []
    for number, pts in shown:
        assert pts is not None
        at = bisect.bisect_right(keys, number, key=lambda k: k.packet)
        start = next((k.packet for k in reversed(keys[:at]) if k.pts <= pts), 0)
        frames.append((pts, number, start))
    frames.sort()
    return Table([n for _, n, _ in frames], [s for _, _, s in frames], [p for p, _, _ in frames])


__all__ = ["Key", "Shown", "Table", "by_count", "by_time"]
