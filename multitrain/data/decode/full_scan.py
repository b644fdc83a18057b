"""Decode every frame of a file, without keeping any, to report the file's properties or its damage."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from multitrain.data.decode.container import as_video_error, content_of
from multitrain.data.decode.convert import upright_size
from multitrain.data.decode.extent import needed_bytes
from multitrain.data.decode.pyav import PyAVVideo
from multitrain.data.decode.rate import cut_off_avi
from multitrain.data.decode.video import Video, VideoError, check_file

_PICTURE = 8
"""Minimum bytes of a packet with a frame; XviD's packed AVIs have smaller packets, which hold none."""


@dataclass(frozen=True)
class VideoScan:
    """Properties of a complete video file."""

    frames: int
    """Number of frames shown, as `open_video` counts them."""
    decoded: int
    """Number of frames that the decoder outputs; fewer if an AVI has packets that repeat the previous frame."""
    fps: float
    """Average frames a second."""
    width: int
    """Of the upright frame, in pixels."""
    height: int
    codec: str
    digest: str
    """Digest of the compressed frames, 32 hex digits: the same for a copy, also in another container or with other audio."""
    hidden: str
    """Digest of the set of frames that the container hides (edit list); empty if it hides none."""
    begin: float = 0.0
    """Time at which the first frame is shown, in seconds from the start of the file: see `Video.shown_at`."""
    last: float | None = None
    """Time at which the last frame is shown."""


def scan_video(path: Path | str) -> VideoScan:
    """Decode the complete file once, single-threaded.

    Raises:
        VideoError: the file has no video, is truncated, or has a frame that cannot be decoded.
    """
    path = Path(path)
    check_file(path)
    video = PyAVVideo(path, math.inf, whole=True)
    with video:
        decoded, height, width = _decode_all(video)
        check_complete(video)
        digest, hidden, placeholders = _digest(video)
        if decoded < video.frame_count - placeholders:
            raise VideoError(path, f"only {decoded} of {video.frame_count} frames can be decoded")
        codec = video.stream.codec_context.name
        begin, last = video.shown_at()[[0, -1]].tolist()
        return VideoScan(video.frame_count, decoded, video.fps, width, height, codec, digest, hidden, begin, last)


def _decode_all(video: PyAVVideo) -> tuple[int, int, int]:
    """(number of frames that the decoder outputs, height and width of the first one, upright)."""
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
    """Raise VideoError if the file lacks frames that its header counts, or ends inside a chunk. Decodes nothing.

    An AVI counts frame slots, some of which are empty; the slot of its last frame is compared with that count.
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
    """(digest of all packets, digest of the set of hidden ones, number of packets too small for a frame)."""
    digest, placeholders, hidden = hashlib.blake2b(digest_size=16), 0, bytearray()
    for packet in video.packets():
        digest.update(memoryview(packet))
        placeholders += packet.size < _PICTURE
        hidden.append(packet.is_discard)
    which = hashlib.blake2b(hidden, digest_size=16).hexdigest() if any(hidden) else ""
    return digest.hexdigest(), which, placeholders
