"""Every frame of a file decoded, and none kept: what is in it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from multitrain.data.decode.container import as_video_error, content_of
from multitrain.data.decode.extent import needed_bytes
from multitrain.data.decode.pyav import PyAVVideo, upright_size
from multitrain.data.decode.rate import cut_off_avi
from multitrain.data.decode.video import Video, VideoError, check_file

_PICTURE = 8
"""Bytes of the smallest packet with a picture; XviD's packed AVIs hold smaller ones, which stand for no picture."""


@dataclass(frozen=True)
class VideoScan:
    """What a whole file holds."""

    frames: int
    """Shown; `open_video` counts the same."""
    decoded: int
    """Pictures that the decoder gives; fewer where packets of an AVI only say that a picture stays."""
    fps: float
    """Average frames a second."""
    width: int
    """Of the upright picture, in pixels."""
    height: int
    codec: str
    digest: str
    """Of the compressed pictures: the same for a copy, also in another container or with other sound. 32 hex digits."""
    hidden: str
    """Digest of which of them the container hides (an edit list); empty where it hides none."""


def scan_video(path: Path | str, timeout: float | None = None) -> VideoScan:
    """Decode the whole file, single-threaded, once.

    Args:
        timeout: seconds that this may take.

    Raises:
        VideoError: no video, one that is cut off, or one of which a frame cannot be decoded.
    """
    path = Path(path)
    check_file(path)
    video = PyAVVideo(path, math.inf if timeout is None else time.monotonic() + timeout)
    with video:
        decoded, height, width = _decode_all(video)
        check_complete(video)
        digest, hidden, placeholders = _digest(video)
        if decoded < video.frame_count - placeholders:
            raise VideoError(path, f"only {decoded} of {video.frame_count} frames can be decoded")
        codec = video.stream.codec_context.name
        return VideoScan(video.frame_count, decoded, video.fps, width, height, codec, digest, hidden)


def _decode_all(video: PyAVVideo) -> tuple[int, int, int]:
    """Pictures that the decoder gives, and the height and width of the first, upright."""
    decoded = height = width = 0
    try:
        for frame in video.everything():
            if frame.is_corrupt:
                raise VideoError(video.path, f"frame {decoded} of {video.frame_count} is damaged")
            if not decoded:
                height, width = upright_size(frame)
            decoded += 1
            del frame
    except VideoError:
        raise
    except Exception as error:
        said = as_video_error(video.path, error)
        if said.transient:
            raise said from error
        promised = video.stream.frames if video.container.format.name.startswith("mov") else 0
        of = promised or video.frame_count
        raise VideoError(video.path, f"cannot be decoded beyond frame {decoded} of {of}") from error
    return decoded, height, width


def check_complete(video: Video) -> None:
    """Raises VideoError unless all is there that the file speaks of: the frames that its header counts, and its own chunks.

    An AVI counts places for frames, of which some are empty: what is compared is the place of the last. Nothing is decoded.
    """
    if not isinstance(video, PyAVVideo):
        return
    kind, promised = video.container.format.name, video.stream.frames
    if kind.startswith("mov"):
        there = video.packet_count
    elif kind == "avi" and cut_off_avi(video.stream):
        there = video.last_tick + 1
    else:
        there = promised
    if there < promised:
        raise VideoError(video.path, f"cut off: {there} of {promised} frames are there")
    with content_of(video.path) as file:
        size = file.seek(0, os.SEEK_END)
        needed = needed_bytes(file, size, kind)
    if needed > size:
        raise VideoError(video.path, f"cut off: {size} of at least {needed} bytes are there")


def _digest(video: PyAVVideo) -> tuple[str, str, int]:
    """Digest of all packets, that of which are hidden, and how many are too small for a picture."""
    digest, placeholders, hidden = hashlib.blake2b(digest_size=16), 0, bytearray()
    for packet in video.packets():
        digest.update(memoryview(packet))
        placeholders += packet.size < _PICTURE
        hidden.append(packet.is_discard)
    which = hashlib.blake2b(hidden, digest_size=16).hexdigest() if any(hidden) else ""
    return digest.hexdigest(), which, placeholders


__all__ = ["VideoScan", "check_complete", "scan_video"]
