"""Frame-exact access to video files by frame number: frame n is the n-th that a player shows.

There are two backends. `pyav` first indexes the file's packets (presentation times, key frames, frames hidden by an edit list).
A frame's number is then its position in presentation order, and only the packets that the requested frames
need are decoded. `decord` is the library of the published code. It returns wrong frames for files with an edit list and for MPEG-4
AVI, and none for AV1; `pyav` reads a recording that starts inside a group of pictures for both backends.

`scan_video` decodes a complete file and reports its properties or its damage. Every error that a library raises about a file becomes a
`VideoError`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

from multitrain.data.decode.decord import DecordVideo
from multitrain.data.decode.full_scan import VideoScan, check_complete, scan_video
from multitrain.data.decode.part import PartOfVideo, whole_and_segment
from multitrain.data.decode.picture import LARGE, Frame, Picture, part, pixels
from multitrain.data.decode.pyav import PyAVVideo
from multitrain.data.decode.video import Video, VideoError, check_file

Backend = Literal["pyav", "decord"]


def open_video(path: Path | str, backend: Backend = "pyav", timeout: float | None = None) -> Video:
    """Open a video, or the part of a video that a name like ``a.mp4#t=3.5,7`` stands for (see `multitrain.data.segment`).

    Args:
        backend: "pyav" or "decord".
        timeout: seconds for opening and all calls of `frames` and `each` together, checked between packets
            (pyav) or calls (decord). It cannot interrupt a library call that hangs: see `multitrain.data.call_timeout`.

    Raises:
        VideoError: the file has no video, or none that can be read.
        ConfigError: the backend's library is not installed.
    """
    path, segment = whole_and_segment(Path(path))
    video = _open_whole(path, backend, math.inf if timeout is None else time.monotonic() + timeout)
    if segment is None:
        return video
    try:
        return PartOfVideo(video, segment)
    except BaseException:
        video.close()
        raise


def _open_whole(path: Path, backend: Backend, deadline: float) -> Video:
    check_file(path)
    if backend == "decord":
        video = DecordVideo(path, deadline)
        if not video.begins_inside:
            return video
        video.close()
    return PyAVVideo(path, deadline)


def preload(backend: Backend) -> None:
    """Import a backend's library before the first video; except decord, which may be missing."""
    if backend == "pyav":
        import av  # noqa: F401


__all__ = [
    "LARGE",
    "Backend",
    "Frame",
    "PartOfVideo",
    "Picture",
    "Video",
    "VideoError",
    "VideoScan",
    "check_complete",
    "open_video",
    "part",
    "pixels",
    "preload",
    "scan_video",
]
