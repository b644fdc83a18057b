"""Frames of a video file by index, exactly: the n-th picture that a player would show.

Two backends on the same footing. `pyav` builds a table of the file's packets first (presentation times, key pictures, what
an edit list hides), so that a frame's number is its place in presentation order, and decodes only what the wanted frames
need. `decord` is what the published code used: a file with an edit list and an MPEG-4 AVI give wrong frames, AV1 gives
none; a recording that begins inside a group of pictures is read by `pyav` all the same.

`scan_video` decodes all of a file and says what is in it or wrong with it. Whatever a library raises about a file comes out
as one `VideoError`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

from multitrain.data.decode.decord import DecordVideo
from multitrain.data.decode.full_scan import VideoScan, check_complete, scan_video
from multitrain.data.decode.picture import LARGE, Frame, Picture, part, pixels
from multitrain.data.decode.pyav import PyAVVideo
from multitrain.data.decode.video import Video, VideoError, check_file

Backend = Literal["pyav", "decord"]


def open_video(path: Path | str, backend: Backend = "pyav", timeout: float | None = None) -> Video:
    """Open a video file.

    Args:
        backend: "pyav" or "decord".
        timeout: seconds that opening and all calls of `frames` and `each` may take together; looked at between packets
            (pyav) or calls (decord). A library call that never returns is beyond it: see `multitrain.data.call_timeout`.

    Raises:
        VideoError: no video in the file, or none that can be read.
        ConfigError: the backend's library is not installed.
    """
    path = Path(path)
    check_file(path)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    if backend == "decord":
        video = DecordVideo(path, deadline)
        if not video.begins_inside:
            return video
        video.close()
    return PyAVVideo(path, deadline)


def preload(backend: Backend) -> None:
    """Import a backend's library now rather than with the first video; not decord, which may be missing."""
    if backend == "pyav":
        import av  # noqa: F401


__all__ = [
    "LARGE",
    "Backend",
    "Frame",
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
