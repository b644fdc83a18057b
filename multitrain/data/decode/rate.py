"""How many frames a second a video has on average, and when each is shown."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from multitrain.data.decode.container import has_flag

if TYPE_CHECKING:
    import av

DEFAULT_FPS = 30.0
"""Frames a second of a single picture, or of a file that says nothing of time."""

_RATE_TOLERANCE = 0.01
"""Share of the frames by which a container's word may differ from its time stamps; one frame is allowed in any case."""
_CLOCK_RESET_SECONDS = 10.0
"""Seconds between two frames of a stream from which on the clock has been set anew; ffmpeg's `dts_delta_threshold`."""


def average_rate(
    container: av.container.InputContainer, stream: av.VideoStream, pictures: int, seconds: np.ndarray | None
) -> float:
    """Average frames a second.

    The container's average where it is right, which means: where it agrees with the time stamps, (frames - 1) ÷ (last -
    first); else these. An MP4's is right by itself, for it is the number of samples over their length. An AVI counts places
    for frames, of which some are empty: pictures over its length. A stream's greatest common rate (`r_frame_rate`) never
    counts: it is 90000 where nothing is known.

    Args:
        pictures: how many the file holds, shown or not.
        seconds: rising times of the frames, from :func:`frame_seconds`; None where the file has none that can be trusted.
    """
    said = float(stream.average_rate) if stream.average_rate else None
    kind = container.format.name
    if kind == "avi" and not cut_off_avi(stream):
        length = (stream.duration or 0) * (stream.time_base or Fraction(0))
        return float(pictures / length) if length else said or DEFAULT_FPS
    if said and kind.startswith("mov") and stream.frames:
        return said
    steps, span = (0, 0.0) if seconds is None else (len(seconds) - 1, float(seconds[-1]))
    if span <= 0 or (said and abs(said * span - steps) <= max(1.0, _RATE_TOLERANCE * steps)):
        return said or DEFAULT_FPS
    return steps / span


def frame_seconds(container: av.container.InputContainer, stream: av.VideoStream, ticks: np.ndarray) -> np.ndarray:
    """Seconds from the first frame, float64, by time stamps in units of the stream's time base.

    The clock of a transport or program stream may be set anew within the file; as in ffmpeg, the time goes on there.
    """
    base = stream.time_base or Fraction(1)
    seconds: np.ndarray = (ticks - ticks[0]) * base.numerator / base.denominator
    steps = np.diff(seconds)
    anew = steps < 0
    if has_flag(container, "ts_discont"):
        anew |= steps > max(_CLOCK_RESET_SECONDS, 10 * float(np.median(steps))) if len(steps) else False
    if anew.any():
        seconds[1:] = np.cumsum(np.where(anew, np.median(steps), steps))
    return seconds


def cut_off_avi(stream: av.VideoStream) -> bool:
    """Whether an AVI's file ends before its header says: libavformat shortens the stream then, but not its count."""
    return bool(stream.frames and stream.duration and stream.duration < stream.frames)


__all__ = ["DEFAULT_FPS", "average_rate", "cut_off_avi", "frame_seconds"]
