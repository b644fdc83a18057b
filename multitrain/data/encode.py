"""Write frames to a video file: H.264 in MP4, each frame with its own presentation time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multitrain.data.decode import VideoError
from multitrain.files import output_file

if TYPE_CHECKING:
    import av

_TICKS = 90_000
"""Ticks per second, to which times are rounded."""
_FAST_START = {"movflags": "+faststart"}


class VideoWriter:
    """Writes upright frames; see :func:`write_video`."""

    def __init__(self, container: av.container.OutputContainer, fps: float) -> None:
        self._container, self._fps = container, fps
        self._stream: av.VideoStream | None = None
        self._last = -1

    def add(self, frame: np.ndarray, seconds: float) -> None:
        """Append a frame, uint8 [H, W, 3], RGB, shown from `seconds` on; an odd side is padded by repeating its last line."""
        import av

        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            rate = Fraction(self._fps).limit_denominator(100_000)
            self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
            self._stream.width, self._stream.height = frame.shape[1], frame.shape[0]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._last = max(round(seconds * _TICKS), self._last + 1)
        picture.pts, picture.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(picture))

    def finish(self) -> None:
        """Flush the encoder."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextmanager
def write_video(path: Path, fps: float, sources: Iterable[Path] = ()) -> Iterator[VideoWriter]:
    """A context that writes a video, which appears at `path` only if the block succeeds.

    Args:
        path: the file; its format is MP4, whatever its suffix.
        fps: nominal rate, for the header.
        sources: files that are read meanwhile, and must not be overwritten.

    Raises:
        ConfigError: a file that `multitrain` did not make is in the way.
        VideoError: the file cannot be written.
    """
    import av

    try:
        with (
            output_file(path, "overlay", sources) as temporary,
            av.open(str(temporary), "w", format="mp4") as container,
        ):
            writer = VideoWriter(container, fps)
            yield writer
            writer.finish()
    except (OSError, av.error.FFmpegError) as error:
        raise VideoError(path, f"cannot be written ({error.strerror or error})") from error


def retime(path: Path, target: Path, times: Sequence[float]) -> None:
    """Copy an MP4's frames without re-encoding; frame n is shown at ``times[n]``.

    Args:
        times: increasing times in seconds, one per frame.

    Raises:
        VideoError: the copy cannot be made.
    """
    import av

    ticks: list[int] = []
    for seconds in times:
        ticks.append(max(round(seconds * _TICKS), ticks[-1] + 1 if ticks else 0))
    try:
        with av.open(str(path)) as source, av.open(str(target), "w", format="mp4", options=_FAST_START) as out:
            packets = [packet for packet in source.demux(video=0) if packet.size]
            places = {pts: place for place, pts in enumerate(sorted(p.pts or 0 for p in packets))}
            if len(places) != len(times) or len(packets) != len(times):
                raise VideoError(path, f"{len(packets)} pictures, not {len(times)}")
            delay = max(number - places[packet.pts or 0] for number, packet in enumerate(packets))
            step = (ticks[-1] - ticks[0]) // max(len(ticks) - 1, 1)
            stream = out.add_stream_from_template(source.streams.video[0])
            stream.time_base = Fraction(
                1, _TICKS
            )  # the source's time base is coarser: times one tick apart would become equal
            for number, packet in enumerate(packets):
                packet.pts = ticks[places[packet.pts or 0]]
                packet.dts = ticks[number - delay] if number >= delay else ticks[0] - (delay - number)
                packet.duration, packet.time_base = step, Fraction(1, _TICKS)
                packet.stream = stream
                out.mux(packet)
    except (OSError, av.error.FFmpegError) as error:
        raise VideoError(path, f"cannot be written ({error.strerror or error})") from error
