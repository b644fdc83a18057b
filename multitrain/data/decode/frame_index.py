"""Frame index of a file: the packet of each frame, and the key packet from which it can be decoded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

NO_TIME = -(1 << 63)
"""Marks a missing time stamp."""


class Packets:
    """The packets of a stream, in file order. Add all packets before reading any property."""

    def __init__(self) -> None:
        self._pts, self._dts = array("q"), array("q")
        self._shown, self._key, self._size = bytearray(), bytearray(), array("I")

    @staticmethod
    def of(pts: np.ndarray, dts: np.ndarray, keys: np.ndarray, sizes: np.ndarray) -> Packets:
        """Packets of which every frame is shown, from arrays [packets]: times, whether decoding can start there, and bytes."""
        packets = Packets()
        packets._pts.frombytes(pts.astype(np.int64).tobytes())
        packets._dts.frombytes(dts.astype(np.int64).tobytes())
        packets._size.frombytes(sizes.astype(np.uint32).tobytes())
        packets._key, packets._shown = bytearray(keys.astype(np.uint8).tobytes()), bytearray(b"\1" * len(keys))
        return packets

    def add(self, pts: int | None, dts: int | None, shown: bool, key: bool, size: int) -> None:
        """Append a packet: its presentation and decoding time, in units of the stream's time base; whether its frame is shown;
        whether decoding can start from it; and its bytes."""
        self._pts.append(NO_TIME if pts is None else pts)
        self._dts.append(NO_TIME if dts is None else dts)
        self._shown.append(shown)
        self._key.append(key)
        self._size.append(size)

    def holds(self, number: int, packet: av.Packet) -> bool:
        """Whether a packet that was read is packet `number`: by time, bytes, and whether decoding can start there."""
        pts = NO_TIME if packet.pts is None else packet.pts
        expected = self._pts[number], self._size[number], bool(self._key[number])
        return expected == (pts, packet.size, packet.is_keyframe)

    @property
    def nbytes(self) -> int:
        """Memory of the times, sizes, flags and numbers of shown packets in bytes."""
        return len(self) * (3 * self._pts.itemsize + self._size.itemsize + 2)

    def hide_last(self) -> None:
        """Mark the frame of the last packet as not shown."""
        self._shown[-1] = False

    def __len__(self) -> int:
        return len(self._key)

    @cached_property
    def pts(self) -> np.ndarray:
        """int64 [packets], `NO_TIME` where missing."""
        return np.frombuffer(self._pts, np.int64)

    @cached_property
    def dts(self) -> np.ndarray:
        """int64 [packets], `NO_TIME` where missing."""
        return np.frombuffer(self._dts, np.int64)

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 [S]: the numbers of packets whose picture is shown."""
        return np.flatnonzero(np.frombuffer(self._shown, np.uint8))

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [K]: numbers of the packets from which decoding can start."""
        return np.flatnonzero(np.frombuffer(self._key, np.uint8))

    @cached_property
    def first(self) -> int:
        """The packet from which decoding starts: the first key packet, or the first packet of a file without key packets."""
        return int(self.keys[0]) if len(self.keys) else 0

    def timed(self) -> bool:
        """Whether presentation times are distinct and decoding times increase, as in a single recording."""
        pts, dts = self.pts[self.shown], self.dts
        dts = dts[dts != NO_TIME]
        return NO_TIME not in pts and _is_rising(np.sort(pts)) and _is_rising(dts)

    def begins_inside(self) -> bool:
        """Whether frames precede the first key frame, in file or presentation order; only the decoder can then determine which of
        them are shown."""
        first, pts = self.first, self.pts
        early = pts[self.shown] < pts[first] if pts[first] != NO_TIME else np.False_
        return first > 0 or not len(self.keys) or bool(np.any(early))


def _is_rising(times: np.ndarray) -> bool:
    return bool((times[1:] > times[:-1]).all())


@dataclass(frozen=True)
class FrameIndex:
    """Maps shown frames, in presentation order, to packets, in file order."""

    packet: np.ndarray
    """int64 [frames]: number of the packet that holds frame n."""
    start: np.ndarray
    """int64 [frames]: number of the key packet from which frame n can be decoded."""
    pts: np.ndarray | None
    """int64 [frames]: presentation time of frame n; None for a file without times, in which frame n is the n-th frame decoded
    from packet `first` on."""
    first: int
    """The packet from which the first frame is decoded."""

    def runs(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The runs of packets (first, last) to decode for frames `numbers`, in order and without overlap."""
        runs: list[tuple[int, int]] = []
        for start, end in sorted((int(self.start[n]), int(self.packet[n])) for n in numbers):
            if runs and start <= runs[-1][1]:
                runs[-1] = runs[-1][0], max(runs[-1][1], end)
            else:
                runs.append((start, end))
        return runs


def index_by_count(packets: Packets, hidden: int = 0) -> FrameIndex:
    """The index of a file without usable presentation times, of which the decoder does not output the first `hidden` frames."""
    shown = packets.shown
    shown = shown[shown >= packets.first][hidden:]
    return FrameIndex(shown, np.full(len(shown), packets.first), None, packets.first)


def index_by_pts(packets: Packets, begin: int = NO_TIME) -> FrameIndex:
    """The index of a file with usable presentation times, of which no frame before `begin` is shown.

    A frame can be decoded from the last preceding key packet that is not shown after it. Frames stored after a key frame
    but shown before it (open GOP) refer to earlier frames.
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
    """Boolean mask of the frames whose key packet is shown after them."""
    if not len(keys):
        return np.zeros(len(shown), bool)
    return (at >= 0) & (pts[keys[at]] > pts[shown])
