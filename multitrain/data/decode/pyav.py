"""Frames by PyAV, over a table of the file's packets: any file's frames right, and only what they need decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.data.decode.table import Key, Shown, Table, by_count, by_time
from multitrain.data.decode.video import Video, VideoError, check_time, may_pass

if TYPE_CHECKING:
    import av

HELD_BYTES = 256 << 20
"""Compressed bytes kept in memory; a longer file is read again for each pass over its frames."""


class PyAVVideo(Video):
    """An open video; `deadline` is a time of the monotonic clock."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self._deadline = path, deadline
        self._container, self._stream = self._open()
        try:
            self._packets: list[av.Packet] | None = []
            self._table = self._tabulate()
            self.frame_count = len(self._table.packet)
            self.fps = self._rate()
        except BaseException:
            self.close()
            raise

    def times(self) -> list[float]:
        pts, base = self._table.pts, self._stream.time_base
        return super().times() if pts is None or base is None else [float((p - pts[0]) * base) for p in pts]

    def close(self) -> None:
        self._packets = []
        self._container.close()

    def _open(self) -> tuple[av.container.InputContainer, av.VideoStream]:
        import av
        from av.stream import Discard

        try:
            container = av.open(str(self.path), metadata_errors="replace")
        except av.error.InvalidDataError as error:
            raise VideoError(self.path, "no video format that is known, or cut off before its index") from error
        except Exception as error:
            raise self._error(error) from error
        stream = container.streams.best("video")
        if stream is None or not isinstance(stream, av.VideoStream):
            held = _listed(s.type for s in container.streams)
            container.close()
            raise VideoError(self.path, f"no video in it, only {held}")
        kind = container.format.name
        if kind.endswith("_pipe") or kind == "image2":
            container.close()
            raise VideoError(self.path, f"a picture ({kind.removesuffix('_pipe')}), not a video")
        stream.codec_context.thread_count = 1
        try:
            stream.codec_context.open(strict=False)  # now, for dav1d reads skip_frame here and never again
        except Exception as error:
            container.close()
            raise self._error(error) from error
        for other in container.streams:
            if other is not stream:
                other.discard = Discard.all
        return container, stream

    def _error(self, error: BaseException) -> VideoError:
        if isinstance(error, VideoError):
            return error
        return VideoError(self.path, _reason(error), transient=may_pass(error))

    def _demuxed(self) -> Iterator[av.Packet]:
        """All packets with content; the end of a truncated file is its end."""
        try:
            for packet in self._container.demux(self._stream):
                check_time(self.path, self._deadline)
                if packet.size:
                    yield packet
        except Exception as error:
            raise self._error(error) from error

    def _tabulate(self) -> Table:
        shown: list[Shown] = []
        keys: list[Key] = []
        held = 0
        for number, packet in enumerate(self._demuxed()):
            held += packet.size
            if self._packets is not None:
                self._packets.append(packet)
                if held > HELD_BYTES:
                    self._packets = None
            if packet.is_keyframe and packet.pts is not None:
                keys.append(Key(number, packet.pts))
            if not (packet.is_discard or packet.is_corrupt or _is_invisible(packet, self._stream.codec_context.name)):
                shown.append(Shown(number, packet.pts))
        if not shown:
            raise VideoError(self.path, "no frame in it")
        return by_count(shown) if self._pts_mislead(shown) else by_time(shown, keys)

    def _pts_mislead(self, shown: list[Shown]) -> bool:
        """Whether presentation times are missing, doubled, or made up by the reader of a format that has none (AVI)."""
        if len({s.pts for s in shown if s.pts is not None}) < len(shown):
            return True
        return self._container.format.name == "avi" and bool(self._stream.codec_context.has_b_frames)

    def _rate(self) -> float:
        """Average frames a second: the file's word, else frames by time."""
        for rate in (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate):
            if rate:
                return float(rate)
        pts, base = self._table.pts, self._stream.time_base or Fraction(1, 1000)
        if pts and len(pts) > 1:
            return float((len(pts) - 1) / ((pts[-1] - pts[0]) * base))
        return 30.0

    def _each(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        convert = Converter(self.path, self.frame_count)
        try:
            yield from (self._counted if self._table.pts is None else self._timed)(numbers, convert)
        except VideoError:
            raise
        except Exception as error:
            raise self._error(error) from error

    def _timed(self, numbers: list[int], convert: Converter) -> Iterator[tuple[int, np.ndarray]]:
        missing = set(numbers)
        for number, image in self._decoded(numbers, self._table.runs(numbers), convert, skip=True):
            missing.discard(number)
            yield number, image
        if missing:  # e.g. a key picture that cannot be started from: decode everything from the top
            top = [(0, max(self._table.packet[n] for n in missing))]
            for number, image in self._decoded(sorted(missing), top, convert, skip=False):
                missing.discard(number)
                yield number, image
        if missing:
            raise VideoError(self.path, f"frame {min(missing)} of {self.frame_count} cannot be decoded")

    def _decoded(
        self, numbers: list[int], runs: list[tuple[int, int]], convert: Converter, *, skip: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Frames `numbers` as they come out of the packets of `runs` (first and last packet of each)."""
        assert self._table.pts is not None
        by_pts = {self._table.pts[n]: n for n in numbers}
        needed = {self._table.packet[n] for n in numbers}
        try:
            for first, last in runs:
                self._stream.codec_context.flush_buffers()
                for number, packet in self._range(first, last):
                    if skip:
                        self._stream.codec_context.skip_frame = "DEFAULT" if number in needed else "NONREF"
                    for frame in self._decode(packet):
                        n = by_pts.get(frame.pts) if frame.pts is not None else None
                        if n is not None:
                            yield n, convert(frame, n)
        finally:
            self._stream.codec_context.skip_frame = "DEFAULT"

    def _counted(self, numbers: list[int], convert: Converter) -> Iterator[tuple[int, np.ndarray]]:
        """Frames by counting what the decoder gives from the top; the last one stands for those that never come."""
        missing, count, final = set(numbers), 0, None
        self._stream.codec_context.flush_buffers()
        for _, packet in self._range(0, self._table.packet[-1]):
            for frame in self._decode(packet):
                if count in missing:
                    missing.discard(count)
                    yield count, convert(frame, count)
                final, count = frame, count + 1
            if not missing:
                return
        if final is None:
            raise VideoError(self.path, "no frame can be decoded")
        last = convert(final, count - 1)
        yield from ((n, last) for n in sorted(missing))

    def _range(self, first: int, last: int) -> Iterator[tuple[int, av.Packet | None]]:
        """Packets `first` to `last`, then None, which empties the decoder."""
        if self._packets is not None:
            yield from enumerate(self._packets[first : last + 1], start=first)
        else:
            self._container.close()
            self._container, self._stream = self._open()
            self._stream.codec_context.flush_buffers()
            for number, packet in enumerate(self._demuxed()):
                if number > last:
                    break
                if number >= first:
                    yield number, packet
        yield last + 1, None

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        check_time(self.path, self._deadline)
        try:
            return self._stream.codec_context.decode(packet)
        except EOFError:
            return []


class Converter:
    """Decoded frames of one video as upright RGB, all in the size and turned the way of the first."""

    def __init__(self, path: Path, frame_count: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._path, self._count = path, frame_count
        self._reformatter = VideoReformatter()  # one for all frames: setting it up costs as much as a frame
        self._size: tuple[int, int] | None = None
        self._matrix: tuple[int, int, int, int] | None = None

    def __call__(self, frame: av.VideoFrame, number: int) -> np.ndarray:
        """uint8 [H, W, 3]; the memory is the frame's own."""
        if frame.is_corrupt:
            raise VideoError(self._path, f"frame {number} of {self._count} is damaged")
        if self._size is None:  # side data and its frame hold each other: asked of every frame, frames would pile up
            self._size, self._matrix = (frame.width, frame.height), _display_matrix(frame)
        width, height = self._size
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
        plane = rgb.planes[0]
        pixels = np.ndarray((height, width, 3), np.uint8, memoryview(plane), strides=(plane.line_size, 3, 1))
        return _upright(pixels, self._matrix)


def _listed(types: Iterable[str]) -> str:
    return ", ".join(sorted(set(types))) or "nothing"


def _is_invisible(packet: av.Packet, codec: str) -> bool:
    """Whether a VP8 packet only updates the decoder: bit 4 of its first byte is `show_frame` (RFC 6386, 9.1)."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] >> 4 & 1


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """The linear part (a, b, c, d) of the frame's display matrix, (x, y) → (a·x + c·y, b·x + d·y); None for upright."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """`image` [H, W, 3] turned and mirrored as its display matrix says, to the nearest quarter turn."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        across, down = a < 0, d < 0
    else:
        image, across, down = image.swapaxes(0, 1), c < 0, b < 0
    return image[:: -1 if down else 1, :: -1 if across else 1]


def _reason(error: BaseException) -> str:
    """What a library says is wrong, without the path and its own decoration."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    return f"{text} ({log[2].strip()})" if log else str(text).splitlines()[-1]


__all__ = ["HELD_BYTES", "Converter", "PyAVVideo"]
