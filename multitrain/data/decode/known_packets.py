"""What this process knows of the packets of long videos: a cache, bounded in bytes, so that a video is indexed once, not for every clip."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from multitrain.data.decode.frame_index import FrameIndex, Packets
from multitrain.data.decode.video import located
from multitrain.data.packs import is_cut_off

LONG = 4 << 20
"""Bytes from which a video is sought. A shorter one is read completely, which costs no more."""
MAX_BYTES = 32 << 20
"""Maximum memory of the cache in bytes: 40 videos of ten minutes at 30 frames per second."""


@dataclass(frozen=True)
class KnownPackets:
    """The packets and frames of a video. Times as in `PyAVVideo`."""

    packets: Packets
    frames: FrameIndex
    seconds: np.ndarray | None
    fps: float
    seekable: bool
    """Whether the packets from a key packet on give the same frames as a file that is read from its start."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        arrays = (self.frames.packet, self.frames.start, self.frames.pts, self.seconds)
        return self.packets.nbytes + sum(array.nbytes for array in arrays if array is not None)


_known: OrderedDict[Hashable, KnownPackets] = OrderedDict()
_lock = threading.Lock()  # a call that took too long continues in its thread


def identity(path: Path) -> Hashable | None:
    """What identifies the content of a long video, in a file or a pack; None for a short one. Raises VideoError, OSError."""
    if (stored := located(path)) is not None:
        return tuple(stored) if stored.size >= LONG and not is_cut_off(stored) else None
    found = os.stat(path)
    if found.st_size < LONG:
        return None
    return os.path.abspath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def get(video: Hashable) -> KnownPackets | None:
    """What is known of a video."""
    with _lock:
        if video in _known:
            _known.move_to_end(video)
        return _known.get(video)


def put(video: Hashable, known: KnownPackets) -> None:
    """Keep what is known of a video, and drop what was not needed for the longest time."""
    with _lock:
        _known[video] = known
        _known.move_to_end(video)
        while len(_known) > 1 and sum(k.nbytes for k in _known.values()) > MAX_BYTES:
            _known.popitem(last=False)


def forget() -> None:
    """Empty the cache."""
    with _lock:
        _known.clear()
