"""The PyAV backend: frame-exact through an index of the file's packets; decodes only the packets that the requested frames need."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.data.decode.container import as_video_error, check_size, has_flag, open_container
from multitrain.data.decode.frame_index import NO_TIME, FrameIndex, Packets, index_by_count, index_by_pts
from multitrain.data.decode.picture import LARGE, Cutter, Frame, Picture, can_be_cut
from multitrain.data.decode.rate import average_rate, frame_seconds
from multitrain.data.decode.video import Video, VideoError, check_deadline

if TYPE_CHECKING:
    import av

MAX_CACHED_BYTES = 64 << 20
"""Maximum compressed bytes kept in memory; a longer file is read again for each pass over its frames."""
MAX_FRAMES = 1 << 22
"""Maximum frames of a video: 38 hours at 30 frames per second."""
_LARGE_FRAME_DIVISOR = 8
"""Divisor of `MAX_CACHED_BYTES` for large frames, whose decoding takes far longer than reading the file again."""
_PACKET_OVERHEAD = 512
"""Memory of a packet in bytes, in addition to its content."""


class PyAVVideo(Video):
    """An open video; `deadline` is a time of the monotonic clock.

    Attributes:
        container, stream: PyAV's objects.
    """

    def __init__(self, path: Path, deadline: float) -> None:
        self.path, self._deadline = path, deadline
        self.container, self.stream = open_container(path)
        try:
            self._packets: list[av.Packet] | None = []
            self._listed = self._read_packets()
            self._table = self._build_index()
            self.frame_count = len(self._table.packet)
            self._seconds = self._times()
            self.fps = average_rate(self.container, self.stream, len(self._listed.shown), self._seconds)
        except BaseException:
            self.close()
            raise

    @property
    def packet_count(self) -> int:
        """Number of packets with content, shown or not."""
        return len(self._listed)

    @property
    def last_tick(self) -> int:
        """Decoding time of the last packet, in units of the stream's time base; in an AVI, its frame number."""
        return int(self._listed.dts[-1])

    def packets(self) -> Iterator[av.Packet]:
        """All packets with content, in file order."""
        yield from (packet for _, packet in self._range(0, self.packet_count - 1) if packet is not None)

    def everything(self) -> Iterator[av.VideoFrame]:
        """All frames in decoder output order, not converted. Raises the decoder's own errors."""
        self.stream.codec_context.flush_buffers()
        for _, packet in self._range(self._table.first, self.packet_count - 1):
            yield from _drain(self._decode(packet))

    def times(self) -> list[float]:
        return super().times() if self._seconds is None else self._seconds.tolist()

    def close(self) -> None:
        self._packets = []
        self.container.close()

    def _demuxed(self) -> Iterator[av.Packet]:
        """All packets with content, up to the end of the file, also of a truncated file."""
        try:
            for packet in self.container.demux(self.stream):
                check_deadline(self.path, self._deadline)
                if packet.size:
                    yield packet
        except Exception as error:
            raise as_video_error(self.path, error) from error

    def _read_packets(self) -> Packets:
        """Read all packets of the file, and cache them if they are not too large."""
        context = self.stream.codec_context
        packets, held, last = Packets(), 0, None
        most = MAX_CACHED_BYTES // _LARGE_FRAME_DIVISOR if context.width * context.height > LARGE else MAX_CACHED_BYTES
        vp8 = context.name in ("vp8", "libvpx")
        for number, packet in enumerate(self._demuxed()):
            if self._packets is not None:
                self._packets.append(packet)
                held += packet.size + _PACKET_OVERHEAD
                if held > most:
                    self._packets = None
            hidden = packet.is_discard or (vp8 and _is_invisible(packet))
            packets.add(packet.pts, packet.dts, not hidden, packet.is_keyframe)
            if number >= MAX_FRAMES:
                raise VideoError(self.path, f"more than {MAX_FRAMES} frames; cut it into shorter videos")
            last = packet
        if last is not None and last.is_corrupt:  # for other packets, the decoder detects damage, as in ffmpeg
            packets.hide_last()
        if not len(packets.shown):
            raise VideoError(self.path, "no frame in it")
        return packets

    def _build_index(self) -> FrameIndex:
        """The index of the frames that a player shows: from the first frame that the decoder outputs, as in ffmpeg."""
        packets = self._listed
        avi = self.container.format.name == "avi"
        made_up = avi and self.stream.codec_context.has_b_frames  # the demuxer invents times: an AVI has none
        inside = packets.begins_inside() or self._begins_with_refresh()
        if packets.timed() and not made_up:
            return index_by_pts(packets, self._first_pts()) if inside else index_by_pts(packets)
        raw = has_flag(
            self.container, "no_timestamps"
        )  # whether a frame is shown before the first key frame is unknown
        return index_by_count(packets, self._count_hidden() if inside or raw else 0)

    def _times(self) -> np.ndarray | None:
        """Time of each frame in seconds from the first; without presentation times, from the decoding times of the packets."""
        ticks = self._table.pts
        if ticks is None:
            ticks = self._listed.dts[self._table.packet]
        return None if NO_TIME in ticks else frame_seconds(self.container, self.stream, ticks)

    def _begins_with_refresh(self) -> bool:
        """Whether an H.264 stream starts with a gradual refresh over several frames (intra refresh, a cut recording)."""
        if self.stream.codec_context.name != "h264":
            return False
        first = next((packet for _, packet in self._range(0, 0)), None)
        return first is not None and not _holds_idr(bytes(first), self.stream.codec_context.extradata or b"")

    def _first_pts(self) -> int:
        """The time stamp of the first frame that the decoder outputs."""
        for _, packet in self._range(self._listed.first, len(self._listed) - 1):
            for frame in self._decode_if_possible(packet):
                if frame.pts is not None:
                    return frame.pts
        raise VideoError(self.path, "no frame can be decoded")

    def _count_hidden(self) -> int:
        """The number of frames of the first group of pictures that the decoder does not output."""
        first, keys, shown = self._listed.first, self._listed.keys, self._listed.shown
        stop = int(keys[1]) if len(keys) > 1 else len(self._listed)
        given = 0
        self.stream.codec_context.flush_buffers()
        for _, packet in self._range(first, stop - 1):
            given += len(self._decode_if_possible(packet))
        held = int(((shown >= first) & (shown < stop)).sum())
        return max(held - given, 0)

    def _decode_if_possible(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        import av

        try:
            return self._decode(packet)
        except av.error.FFmpegError:
            return []

    def _each(self, numbers: list[int]) -> Iterator[tuple[int, Frame]]:
        convert = Converter(self.path, self.frame_count)
        try:
            yield from (self._frames_by_count if self._table.pts is None else self._frames_by_pts)(numbers, convert)
        except VideoError:
            raise
        except Exception as error:
            raise as_video_error(self.path, error) from error

    def _frames_by_pts(self, numbers: list[int], convert: Converter) -> Iterator[tuple[int, Frame]]:
        missing = set(numbers)
        for number, image in self._decoded(numbers, self._table.runs(numbers), convert, skip=True):
            missing.discard(number)
            yield number, image
            del image
        if missing:  # e.g. a key frame from which decoding cannot start: decode everything from the start
            top = [(self._table.first, max(int(self._table.packet[n]) for n in missing))]
            for number, image in self._decoded(sorted(missing), top, convert, skip=False):
                missing.discard(number)
                yield number, image
                del image
        if missing:
            raise VideoError(self.path, f"frame {min(missing)} of {self.frame_count} cannot be decoded")

    def _decoded(
        self, numbers: list[int], runs: list[tuple[int, int]], convert: Converter, *, skip: bool
    ) -> Iterator[tuple[int, Frame]]:
        """Decode the packets of `runs` (first and last packet of each), and yield frames `numbers` in decoder output order."""
        assert self._table.pts is not None
        by_pts = {int(self._table.pts[n]): n for n in numbers}
        needed = {int(self._table.packet[n]) for n in numbers}
        try:
            for first, last in runs:
                self.stream.codec_context.flush_buffers()
                for number, packet in self._range(first, last):
                    if skip:
                        self.stream.codec_context.skip_frame = "DEFAULT" if number in needed else "NONREF"
                    for frame in _drain(self._decode(packet)):
                        n = by_pts.get(frame.pts) if frame.pts is not None else None
                        image = None if n is None else convert(frame, n)
                        del frame
                        if n is not None and image is not None:
                            yield n, image
                        del image
                        convert.let_go()
        finally:
            self.stream.codec_context.skip_frame = "DEFAULT"

    def _frames_by_count(self, numbers: list[int], convert: Converter) -> Iterator[tuple[int, Frame]]:
        """Frames by counting the decoder's output from the start; the last frame replaces those that the decoder does not output."""
        missing, count, final = set(numbers), 0, None
        self.stream.codec_context.flush_buffers()
        for _, packet in self._range(self._table.first, int(self._table.packet[-1])):
            for frame in _drain(self._decode(packet)):
                final, count = frame, count + 1
                del frame
                if count - 1 in missing:
                    missing.discard(count - 1)
                    yield count - 1, convert(final, count - 1)
                    convert.let_go()
            if not missing:
                return
        if final is None:
            raise VideoError(self.path, "no frame can be decoded")
        last = convert(final, count - 1)
        yield from ((n, last) for n in sorted(missing))

    def _range(self, first: int, last: int) -> Iterator[tuple[int, av.Packet | None]]:
        """Packets `first` to `last`, then None, which flushes the decoder."""
        if self._packets is not None:
            yield from enumerate(self._packets[first : last + 1], start=first)
        else:
            self.container.close()
            self.container, self.stream = open_container(self.path)
            self.stream.codec_context.flush_buffers()
            for number, packet in enumerate(self._demuxed()):
                if number > last:
                    break
                if number >= first:
                    yield number, packet
        yield last + 1, None

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        check_deadline(self.path, self._deadline)
        try:
            return self.stream.codec_context.decode(packet)
        except EOFError:
            return []


class Converter:
    """Converts decoded frames of one video to upright RGB, all with the size and orientation of the first."""

    def __init__(self, path: Path, frame_count: int) -> None:
        self._path, self._count = path, frame_count
        self._cutter: Cutter | None = None
        self._hanging = False

    def __call__(self, frame: av.VideoFrame, number: int) -> Frame:
        """Convert a frame to uint8 [H, W, 3], in memory of its own, or to a `Picture` if it is large."""
        if frame.is_corrupt:
            raise VideoError(self._path, f"frame {number} of {self._count} is damaged")
        if (
            self._cutter is None
        ):  # read once: a frame and its side data reference each other, so that reading it from every frame would leak them
            check_size(self._path, frame.width, frame.height)
            self._cutter = Cutter(frame.width, frame.height, partial(_upright, matrix=_display_matrix(frame)))
            self._hanging = frame.width * frame.height > LARGE
        cutter = self._cutter
        large = frame.width * frame.height > LARGE and (frame.width, frame.height) == (cutter.width, cutter.height)
        return Picture(frame, cutter) if large and can_be_cut(frame) else cutter.whole(frame)

    def let_go(self) -> None:
        """Free the first frame if it is large; called when no other reference to it exists."""
        if self._hanging:
            self._hanging = False
            gc.collect()


def _drain(frames: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Pop the frames of a list one by one, so that only the consumer keeps a frame alive; a frame of 8K has 50 MB."""
    while frames:
        yield frames.pop(0)


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) in which a frame is shown."""
    matrix = _display_matrix(frame)
    turned = matrix is not None and _is_turned(matrix)
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _is_invisible(packet: av.Packet) -> bool:
    """Whether a VP8 packet has no shown frame: bit 4 of its first byte is `show_frame` (RFC 6386, 9.1)."""
    return not bytes(packet)[0] >> 4 & 1


def _holds_idr(packet: bytes, extradata: bytes) -> bool:
    """Whether an H.264 packet holds a slice of an IDR frame (NAL unit type 5), which can be decoded without earlier frames."""
    if extradata[:1] != b"\1":  # start codes
        return any(found[1][0] & 31 == 5 for found in re.finditer(b"\0\0\1(.)", packet, re.DOTALL))
    at, size = 0, (extradata[4] & 3) + 1 if len(extradata) > 4 else 4
    while at + size < len(packet):
        if packet[at + size] & 31 == 5:
            return True
        at += size + int.from_bytes(packet[at : at + size], "big")
    return False


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """The linear part (a, b, c, d) of the frame's display matrix, (x, y) → (a·x + c·y, b·x + d·y); None for upright."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])


def _is_turned(matrix: tuple[int, int, int, int]) -> bool:
    """Whether a display matrix, rounded to quarter turns, rotates by 90° or 270°."""
    a, b, c, d = matrix
    return abs(a) + abs(d) < abs(b) + abs(c)


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """`image` [H, W, 3] rotated and mirrored by its display matrix, rounded to quarter turns."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if _is_turned(matrix):
        image, across, down = image.swapaxes(0, 1), c < 0, b < 0
    else:
        across, down = a < 0, d < 0
    return image[:: -1 if down else 1, :: -1 if across else 1]
