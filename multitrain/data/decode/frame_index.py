"""The table of a file's frames: which packet holds each, and from which key packet it can be decoded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

NO_TIME = -(1 << 63)
"""Stands for a time that the file does not say."""


class Packets:
    """What the reader of a container says of each packet of a stream, in file order: all is added before anything is asked."""

    def __init__(self) -> None:
        self._pts, self._dts = array("q"), array("q")
        self._shown, self._key = bytearray(), bytearray()

    def add(self, pts: int | None, dts: int | None, shown: bool, key: bool) -> None:
        """One more packet: when it is shown and decoded, in units of the stream's time base; whether its picture is shown
        at all, and whether decoding can start from it."""
        self._pts.append(NO_TIME if pts is None else pts)
        self._dts.append(NO_TIME if dts is None else dts)
        self._shown.append(shown)
        self._key.append(key)

    def hide_last(self) -> None:
        """The picture of the last packet is not shown after all."""
        self._shown[-1] = False

    def __len__(self) -> int:
        return len(self._key)

    @cached_property
    def pts(self) -> np.ndarray:
        """int64 [packets], `NO_TIME` where not known."""
        return np.frombuffer(self._pts, np.int64)

    @cached_property
    def dts(self) -> np.ndarray:
        """int64 [packets], `NO_TIME` where not known."""
        return np.frombuffer(self._dts, np.int64)

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 [S]: the numbers of packets whose picture is shown."""
        return np.flatnonzero(np.frombuffer(self._shown, np.uint8))

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [K]: the numbers of packets that decoding can start from."""
        return np.flatnonzero(np.frombuffer(self._key, np.uint8))

    @cached_property
    def first(self) -> int:
        """The packet that decoding starts from: the first key packet, or the first of a file without."""
        return int(self.keys[0]) if len(self.keys) else 0

    def timed(self) -> bool:
        """Whether presentation times tell frames apart, and decoding times rise, as they do in one recording."""
        pts, dts = self.pts[self.shown], self.dts
        dts = dts[dts != NO_TIME]
        return NO_TIME not in pts and _is_rising(np.sort(pts)) and _is_rising(dts)

    def begins_inside(self) -> bool:
        """Whether pictures come before the first key picture, in the file or on the screen: then the decoder has to be
        asked which of them can be shown."""
        first, pts = self.first, self.pts
        early = pts[self.shown] < pts[first] if pts[first] != NO_TIME else np.False_
        return first > 0 or not len(self.keys) or bool(np.any(early))


def _is_rising(times: np.ndarray) -> bool:
    return bool((times[1:] > times[:-1]).all())


@dataclass(frozen=True)
class FrameIndex:
    """Where the shown frames are among a file's packets; frames in presentation order, packets in file order."""

    packet: np.ndarray
    """int64 [frames]: number of the packet that holds frame n."""
    start: np.ndarray
    """int64 [frames]: number of the key packet from which frame n can be decoded."""
    pts: np.ndarray | None
    """int64 [frames]: presentation time of frame n; None for a file without: there frame n is the n-th that the decoder
    gives from packet `first` on."""
    first: int
    """The packet that the first frame is decoded from."""

    def runs(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The runs of packets (first, last) that decode frames `numbers`, in order, none overlapping."""
        runs: list[tuple[int, int]] = []
        for start, end in sorted((int(self.start[n]), int(self.packet[n])) for n in numbers):
            if runs and start <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], end)
            else:
                runs.append((start, end))
        return runs


def index_by_count(packets: Packets, hidden: int = 0) -> FrameIndex:
    """The table of a file without presentation times, of which the decoder does not show the first `hidden` pictures."""
    shown = packets.shown
    shown = shown[shown >= packets.first][hidden:]
    return FrameIndex(shown, np.full(len(shown), packets.first), None, packets.first)


def index_by_pts(packets: Packets, begin: int = NO_TIME) -> FrameIndex:
    """The table of a file whose presentation times can be trusted, of which nothing is shown before `begin`.

    A frame can be decoded from the last key packet before it that is shown no later: pictures stored after a key picture
    but shown before it (open groups of pictures) refer to what came earlier.
    """
    pts, first, keys = packets.pts, packets.first, packets.keys
    shown = packets.shown
    shown = shown[(shown >= first) & (pts[shown] >= begin)]
    shown = shown[np.argsort(pts[shown], kind="stable")]
    keys = keys[pts[keys] != NO_TIME]
    at = np.searchsorted(keys, shown, side="right") - 1
    later = _later(pts, keys, at, shown)
    while later.any():
        at[later] -= 1
        later = _later(pts, keys, at, shown)
    start = np.where(at >= 0, keys[at] if len(keys) else 0, first)
    return FrameIndex(shown, start, pts[shown], first)


def _later(pts: np.ndarray, keys: np.ndarray, at: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Where the key packet in question is shown after the frame."""
    if not len(keys):
        return np.zeros(len(shown), bool)
    return (at >= 0) & (pts[keys[at]] > pts[shown])


__all__ = ["NO_TIME", "FrameIndex", "Packets", "index_by_count", "index_by_pts"]
