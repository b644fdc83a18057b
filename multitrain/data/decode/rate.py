"""Average frame rate of a video, and the presentation times of its frames."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from multitrain.data.decode.container import has_flag

if TYPE_CHECKING:
    import av

DEFAULT_FPS = 30.0
"""Frame rate of a single frame, or of a file without time stamps."""

_RATE_TOLERANCE = 0.01
"""Fraction of the frames by which the container's rate may differ from the time stamps; one frame is always allowed."""
_CLOCK_RESET_SECONDS = 10.0
"""Seconds between two frames above which the stream's clock was reset; ffmpeg's `dts_delta_threshold`."""


def average_rate(
    container: av.container.InputContainer, stream: av.VideoStream, pictures: int, seconds: np.ndarray | None
) -> float:
    """Average frames per second.

    The container's average rate if it agrees with the time stamps, (frames - 1) ÷ (last - first); else the rate of the time stamps.
    An MP4's average is always used, because it is the number of samples divided by their duration. An AVI counts frame slots,
    some of which are empty; its rate is the number of frames divided by its duration. The base rate of a stream (`r_frame_rate`) is never
    used: it is 90000 if the rate is unknown.

    Args:
        pictures: number of frames in the file, shown or not.
        seconds: increasing times of the frames, from :func:`frame_seconds`; None if the file has no usable times.
    """
    said = float(stream.average_rate) if stream.average_rate else None
    kind = container.format.name
    if kind == "avi" and not cut_off_avi(stream):
        length = (stream.duration or 0) * (stream.time_base or Fraction(0))
        return float(pictures / length) if length else said or DEFAULT_FPS
    if said and kind.startswith("mov") and stream.frames:
        return said
    steps, span = (0, 0.0) if seconds is None else (len(seconds) - 1, float(seconds[-1]))
    if span <= 0 or (said and _agrees(said, steps, span)):
        return said or DEFAULT_FPS
    return steps / span


def segment_rate(rate: float, seconds: np.ndarray) -> float:
    """Average frames per second of consecutive frames: `rate`, that of the file, if it agrees with their times, else that of the times."""
    steps, span = len(seconds) - 1, float(seconds[-1] - seconds[0])
    return rate if span <= 0 or _agrees(rate, steps, span) else steps / span


def _agrees(rate: float, steps: int, span: float) -> bool:
    return abs(rate * span - steps) <= max(1.0, _RATE_TOLERANCE * steps)


def frame_seconds(container: av.container.InputContainer, stream: av.VideoStream, ticks: np.ndarray) -> np.ndarray:
    """Seconds from the first frame, float64, from time stamps in units of the stream's time base.

    The clock of a transport or program stream may be reset within the file; as in ffmpeg, the times then continue.
    """
    base = stream.time_base or Fraction(1)
    seconds: np.ndarray = (ticks - ticks[0]) * base.numerator / base.denominator
    steps = np.diff(seconds)
    resets = steps < 0
    if has_flag(container, "ts_discont"):
        resets |= steps > max(_CLOCK_RESET_SECONDS, 10 * float(np.median(steps))) if len(steps) else False
    if resets.any():
        seconds[1:] = np.cumsum(np.where(resets, np.median(steps), steps))
    return seconds


def start_of_file(container: av.container.InputContainer) -> float:
    """Time in seconds at which players start the file, by its earliest stream; 0 if it has no times."""
    return (container.start_time or 0) / 1e6


def cut_off_avi(stream: av.VideoStream) -> bool:
    """Whether an AVI file ends before the length in its header. libavformat then shortens the stream's duration, not its frame count."""
    return bool(stream.frames and stream.duration and stream.duration < stream.frames)
