"""Every frame of a file decoded, and none kept: what is in it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multitrain.data.decode import VideoError, open_video
from multitrain.data.prepare.crew import FINAL

_PICTURE = 8
"""Bytes of the smallest packet with a picture; XviD's packed AVIs hold smaller ones, which stand for no picture."""


@dataclass(frozen=True)
class Scan:
    """What a whole file holds."""

    frames: int
    """Shown; what `multitrain.data.decode` counts."""
    decoded: int
    """Pictures that the decoder gives; fewer where packets of an AVI only say that a picture stays."""
    fps: float
    width: int
    """Of the upright picture, in pixels."""
    height: int
    codec: str
    digest: str
    """Of the compressed pictures: the same for a copy, also in another container or with other sound. 32 hex digits."""

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def scan(path: Path | str) -> Scan:
    """Decode the whole file, single-threaded.

    Raises:
        VideoError: no video, one that is cut off, or one of which a frame cannot be decoded.
    """
    path = Path(path)
    with open_video(path) as video:
        frames, fps = video.frame_count, video.fps
        height, width = video.frames([0]).shape[1:3]
    import av

    digest = hashlib.blake2b(digest_size=16)
    packets = decoded = repeats = 0
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)  # open_video has seen to it
        stream.codec_context.thread_count = 1
        try:
            for packet in container.demux(stream):
                if packet.size:
                    packets += 1
                    repeats += packet.size < _PICTURE
                    digest.update(memoryview(packet))
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise VideoError(path, f"frame {decoded} of {frames} is damaged")
                    decoded += 1
        except av.error.FFmpegError as error:
            raise VideoError(
                path, f"cannot be decoded beyond frame {decoded}{_share(decoded, stream.frames)}"
            ) from error
        if packets < stream.frames:
            raise VideoError(path, f"cut off: {packets} of {stream.frames} frames are there")
        if decoded < frames - repeats:
            raise VideoError(path, f"only {decoded} of {frames} frames can be decoded")
        return Scan(frames, decoded, fps, width, height, stream.codec_context.name, digest.hexdigest())


def _share(decoded: int, of: int) -> str:
    return f" of {of}" if of else ""


class ScanFile:
    """`scan` as work for a crew: the item is a path; what is wrong comes back as ``kind`` and ``error``."""

    def __call__(self, path: str) -> dict[str, Any]:
        if not os.path.exists(path):
            return {"kind": "missing", "error": "no such file", FINAL: True}
        try:
            return scan(path).record()
        except VideoError as error:
            return {"kind": "broken", "error": error.reason, FINAL: not isinstance(error.__cause__, OSError)}


__all__ = ["Scan", "ScanFile", "scan"]
