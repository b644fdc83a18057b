"""Frames of a video file by index, exactly: the n-th picture that a player would show.

Two backends on the same footing. `pyav` builds a table of the file's packets first (presentation times, key pictures, what
an edit list hides), so that a frame's number is its place in presentation order, and decodes only what the wanted frames
need. `decord` is what the published code used: a file with an edit list gives wrong frames, AV1 gives none.

Whatever a library raises about a file comes out as one `VideoError`.
"""

from __future__ import annotations

import bisect
import math
import os
import stat
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from multitrain.config import ConfigError

if TYPE_CHECKING:
    import av

Backend = Literal["pyav", "decord"]

_HELD_BYTES = 256 << 20  # compressed bytes kept in memory; a longer file is read again for each call of frames()


class VideoError(Exception):
    """A video that cannot be read.

    Attributes:
        path: the file.
        reason: one line without the path.
        transient: whether the operating system failed rather than the file, so that another try may help.
    """

    def __init__(self, path: Path | str, reason: str, *, transient: bool = False) -> None:
        self.path, self.reason, self.transient = Path(path), " ".join(reason.split()), transient
        super().__init__(f"{path}: {self.reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _video_error, (str(self.path), self.reason, self.transient)


def _video_error(path: str, reason: str, transient: bool) -> VideoError:
    return VideoError(path, reason, transient=transient)


class Video(ABC):
    """An open video file; a context manager.

    Attributes:
        path: the file.
        frame_count: number of frames shown, at least 1.
        fps: average frames a second, positive.
    """

    path: Path
    frame_count: int
    fps: float

    @property
    def duration(self) -> float:
        """Length in seconds at the average rate."""
        return self.frame_count / self.fps

    def times(self) -> list[float]:
        """When each frame is shown, in seconds from the first; evenly spaced where the file does not say."""
        return [number / self.fps for number in range(self.frame_count)]

    def frames(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The frames at `indices` (any order, repeats allowed), upright: uint8 [len(indices), H, W, 3], RGB.

        Raises:
            VideoError: a wanted frame is damaged or missing, or the time limit is over.
            IndexError: an index outside range(frame_count).
        """
        wanted = [int(i) for i in indices]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.frame_count:
            raise IndexError(f"{self.path} has frames 0 to {self.frame_count - 1}, not {wanted}")
        return self._frames(wanted)

    @abstractmethod
    def _frames(self, wanted: list[int]) -> np.ndarray: ...

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_video(path: Path | str, backend: Backend = "pyav", timeout: float | None = None) -> Video:
    """Open a video file.

    Args:
        backend: "pyav" or "decord".
        timeout: seconds that opening and all calls of `frames` may take together; looked at between packets (pyav) or
            calls (decord). A library call that never returns is beyond it: see `multitrain.data.guard`.

    Raises:
        VideoError: no video in the file, or none that can be read.
        ConfigError: the backend's library is not installed.
    """
    path = Path(path)
    _check_file(path)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    return _DecordVideo(path, deadline) if backend == "decord" else _PyAVVideo(path, deadline)


def prepare(backend: Backend) -> None:
    """Import a backend's library now rather than with the first video; not decord, which may be missing."""
    if backend == "pyav":
        import av  # noqa: F401


def _check_file(path: Path) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error), transient=_may_pass(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(path, "not a file of bytes but a folder, pipe or device")
    if found.st_size == 0:
        raise VideoError(path, "empty file")


def _may_pass(error: BaseException) -> bool:
    """Whether the operating system failed in a way that another try may not meet (EIO, ESTALE, ETIMEDOUT …)."""
    lasting = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting)


def _check_time(path: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise VideoError(path, "decoding took longer than data.decode_timeout")


def _reason(error: BaseException) -> str:
    """What a library says is wrong, without the path and its own decoration."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    log = getattr(error, "log", None)
    return f"{text} ({log[2].strip()})" if log else str(text).splitlines()[-1]


# --- PyAV -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Where the shown frames are among a file's packets; frames in presentation order, packets in file order."""

    packet: list[int]
    """Number of the packet that holds frame n."""
    start: list[int]
    """Number of the key packet from which frame n can be decoded."""
    pts: list[int] | None
    """Presentation time of frame n; None for a file without: there frame n is the n-th that the decoder gives."""


class _PyAVVideo(Video):
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
        return VideoError(self.path, _reason(error), transient=_may_pass(error))

    def _demuxed(self) -> Iterator[av.Packet]:
        """All packets with content; the end of a truncated file is its end."""
        try:
            for packet in self._container.demux(self._stream):
                _check_time(self.path, self._deadline)
                if packet.size:
                    yield packet
        except Exception as error:
            raise self._error(error) from error

    def _tabulate(self) -> _Table:
        shown: list[tuple[int, int, int | None, bool]] = []  # number, start, pts, key
        keys: list[tuple[int, int]] = []  # pts and number of key packets
        held = 0
        for number, packet in enumerate(self._demuxed()):
            held += packet.size
            if self._packets is not None:
                self._packets.append(packet)
                if held > _HELD_BYTES:
                    self._packets = None
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, number))
            if not (packet.is_discard or packet.is_corrupt or _is_invisible(packet, self._stream.codec_context.name)):
                shown.append((number, 0, packet.pts, packet.is_keyframe))
        if not shown:
            raise VideoError(self.path, "no frame in it")
        return self._counted(shown) if self._pts_mislead(shown) else _by_pts(shown, keys)

    def _pts_mislead(self, shown: list[tuple[int, int, int | None, bool]]) -> bool:
        """Whether presentation times are missing, doubled, or made up by the reader of a format that has none (AVI)."""
        pts = [p for _, _, p, _ in shown if p is not None]
        if len(set(pts)) < len(shown):
            return True
        return self._container.format.name == "avi" and bool(self._stream.codec_context.has_b_frames)

    @staticmethod
    def _counted(shown: list[tuple[int, int, int | None, bool]]) -> _Table:
        return _Table([number for number, *_ in shown], [0] * len(shown), None)

    def _rate(self) -> float:
        """Average frames a second: the file's word, else frames by time."""
        for rate in (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate):
            if rate:
                return float(rate)
        pts, base = self._table.pts, self._stream.time_base or Fraction(1, 1000)
        if pts and len(pts) > 1:
            return float((len(pts) - 1) / ((pts[-1] - pts[0]) * base))
        return 30.0

    def _frames(self, wanted: list[int]) -> np.ndarray:
        numbers = sorted(set(wanted))
        try:
            images = self._counted_images(numbers) if self._table.pts is None else self._timed_images(numbers)
        except VideoError:
            raise
        except Exception as error:
            raise self._error(error) from error
        return np.stack([images[number] for number in wanted])

    def _timed_images(self, numbers: list[int]) -> dict[int, np.ndarray]:
        images = self._decoded(numbers, _intervals(self._table, numbers), skip=True)
        missing = [n for n in numbers if n not in images]
        if missing:  # e.g. a key picture that cannot be started from: decode everything from the top
            images |= self._decoded(missing, [(0, max(self._table.packet[n] for n in missing))], skip=False)
            for n in missing:
                if n not in images:
                    raise VideoError(self.path, f"frame {n} of {self.frame_count} cannot be decoded")
        return images

    def _decoded(self, numbers: list[int], intervals: list[tuple[int, int]], *, skip: bool) -> dict[int, np.ndarray]:
        """Images of frames `numbers` from the packets of `intervals` (first and last packet of each)."""
        assert self._table.pts is not None
        by_pts = {self._table.pts[n]: n for n in numbers}
        needed = {self._table.packet[n] for n in numbers}
        images: dict[int, np.ndarray] = {}
        decoder, size = self._stream.codec_context, None
        for first, last in intervals:
            decoder.flush_buffers()
            for number, packet in self._range(first, last):
                if skip:
                    decoder.skip_frame = "DEFAULT" if number in needed else "NONREF"
                for frame in self._decode(packet if packet is not None else None):
                    n = by_pts.get(frame.pts) if frame.pts is not None else None
                    if n is not None:
                        image = self._image(frame, n, size)
                        images[n], size = image.pixels, image.size
        decoder.skip_frame = "DEFAULT"
        return images

    def _counted_images(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """Images by counting what the decoder gives from the top; the last one stands for those that never come."""
        images: dict[int, np.ndarray] = {}
        wanted, size, count, final = set(numbers), None, 0, None
        self._stream.codec_context.flush_buffers()
        for _, packet in self._range(0, self._table.packet[-1]):
            for frame in self._decode(packet):
                if count in wanted:
                    image = self._image(frame, count, size)
                    images[count], size = image.pixels, image.size
                final, count = frame, count + 1
            if len(images) == len(wanted):
                return images
        if final is None:
            raise VideoError(self.path, "no frame can be decoded")
        last = self._image(final, count - 1, size).pixels
        return {n: images.get(n, last) for n in numbers}

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
        _check_time(self.path, self._deadline)
        try:
            return self._stream.codec_context.decode(packet)
        except EOFError:
            return []

    def _image(self, frame: av.VideoFrame, number: int, size: tuple[int, int] | None) -> _Image:
        if frame.is_corrupt:
            raise VideoError(self.path, f"frame {number} of {self.frame_count} is damaged")
        width, height = size or (frame.width, frame.height)
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC", threads=1)
        return _Image(_upright(pixels, _display_matrix(frame)), (width, height))


@dataclass(frozen=True)
class _Image:
    pixels: np.ndarray
    size: tuple[int, int]


def _listed(types: Iterable[str]) -> str:
    return ", ".join(sorted(set(types))) or "nothing"


def _is_invisible(packet: av.Packet, codec: str) -> bool:
    """Whether a VP8 packet only updates the decoder: bit 4 of its first byte is `show_frame` (RFC 6386, 9.1)."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] >> 4 & 1


def _by_pts(shown: list[tuple[int, int, int | None, bool]], keys: list[tuple[int, int]]) -> _Table:
    """The table of a file whose presentation times can be trusted.

    A frame can be decoded from the last key packet before it that is shown no later: pictures stored after a key picture
    but shown before it (open groups of pictures) refer to what came earlier.
    """
    frames = []
    for number, _, pts, _ in shown:
        assert pts is not None
        at = bisect.bisect_right(keys, number, key=lambda k: k[1])
        start = next((n for key_pts, n in reversed(keys[:at]) if key_pts <= pts), 0)
        frames.append((pts, number, start))
    frames.sort()
    return _Table([n for _, n, _ in frames], [s for _, _, s in frames], [p for p, _, _ in frames])


def _intervals(table: _Table, numbers: list[int]) -> list[tuple[int, int]]:
    """The runs of packets that decode frames `numbers`, in order, none overlapping."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted((table.start[n], table.packet[n]) for n in numbers):
        if runs and start <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], end)
        else:
            runs.append((start, end))
    return runs


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


# --- decord ---------------------------------------------------------------------------------------------------------


class _DecordVideo(Video):
    def __init__(self, path: Path, deadline: float) -> None:
        decord = _import_decord()
        self.path, self._deadline = path, deadline
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            self.frame_count, self.fps = len(self._reader), float(self._reader.get_avg_fps())
        except Exception as error:
            raise VideoError(path, _decord_reason(error, self.path), transient=_may_pass(error)) from error
        if self.frame_count < 1 or not 0 < self.fps < math.inf:
            raise VideoError(path, f"{self.frame_count} frames at {self.fps} frames a second")

    def close(self) -> None:
        self._reader = None

    def _frames(self, wanted: list[int]) -> np.ndarray:
        _check_time(self.path, self._deadline)
        try:
            frames = self._reader.get_batch(wanted).asnumpy()
        except Exception as error:
            raise VideoError(self.path, _decord_reason(error, self.path), transient=_may_pass(error)) from error
        return np.ascontiguousarray(frames, dtype=np.uint8)


def _import_decord() -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"data.decoder=decord, but decord cannot be imported ({error}); pip install 'multitrain[decord]' (x86-64 only), "
            "or use data.decoder=pyav"
        ) from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _decord_reason(error: Exception, path: Path) -> str:
    """decord's messages open with a C++ position, name the file and end with a stack trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = text.split("Check failed: ")[-1] if "Check failed" in text else text.split("] ", 1)[-1]
    return text.replace(str(path), "the file").rstrip(".")


__all__ = ["Backend", "Video", "VideoError", "open_video", "prepare"]
