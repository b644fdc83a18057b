"""The PyAV backend: frame-exact through an index of the file's packets; decodes only the packets that the requested frames need."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multitrain.data.decode import known_packets
from multitrain.data.decode.container import as_video_error, content_of, has_flag, open_container
from multitrain.data.decode.convert import Converter
from multitrain.data.decode.frame_index import NO_TIME, FrameIndex, Packets, index_by_count, index_by_pts
from multitrain.data.decode.known_packets import KnownPackets
from multitrain.data.decode.picture import LARGE, Frame
from multitrain.data.decode.rate import average_rate, frame_seconds, start_of_file
from multitrain.data.decode.sample_table import packets_from_tables
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


class _OutOfStepError(Exception):
    """A packet that was read is not the one that the index promises there."""


class PyAVVideo(Video):
    """An open video; `deadline` is a time of the monotonic clock.

    A long video (`known_packets.LONG`) is sought: its packets are listed once per process, from the tables of an MP4 or by
    reading the file, and then only those from the key frame before the wanted frames on are read. Each is compared with the list. If one
    differs, or the list cannot be trusted, the file is read from its start, as for a short video.

    Args:
        whole: whether to read the file from its start in any case.

    Attributes:
        container, stream: PyAV's objects.
    """

    def __init__(self, path: Path, deadline: float, *, whole: bool = False) -> None:
        self.path, self._deadline = path, deadline
        self._video = None if whole else _identified(path)
        known = None if self._video is None else known_packets.get(self._video)
        self._seeks = self._video is not None and (known is None or known.seekable)
        self._packets: list[av.Packet] | None = None
        self.container, self.stream = open_container(path, whole=not self._seeks)
        try:
            if self._seeks and known is None:
                known = self._from_tables()
            if known is None or not known.seekable:
                known = self._from_start(trusted=known is None)
            self._listed, self._table, self._seconds, self.fps = known.packets, known.frames, known.seconds, known.fps
            self.frame_count = len(self._table.packet)
            self.timed = self._table.pts is not None and not has_flag(self.container, "ts_discont")
            if self._table.pts is not None and self.stream.time_base:
                self.begin = float(self._table.pts[0] * self.stream.time_base) - start_of_file(self.container)
        except BaseException:
            self.close()
            raise

    def _from_tables(self) -> KnownPackets | None:
        """The packets by the tables of an MP4 or MOV file, if frames can be found by them."""
        if not self.container.format.name.startswith("mov"):
            return None
        try:
            with content_of(self.path, whole=False) as file:
                size = file.seek(0, os.SEEK_END)
                packets = packets_from_tables(self.stream, self._demuxed(), file, size)
            if packets is None:
                return None
            self._listed = packets
            known = self._indexed()
        except (_OutOfStepError, VideoError, OSError):  # the whole file is then read, with its own errors
            return None
        return self._kept(known) if known.seekable else None

    def _from_start(self, *, trusted: bool) -> KnownPackets:
        """The packets by reading the whole file; `trusted`: whether its packets may be sought the next time."""
        if self._seeks:
            self._seeks = False
            self._reopen()
        self._packets = []
        self._listed = self._read_packets()
        known = self._indexed()
        return self._kept(replace(known, seekable=known.seekable and trusted))

    def _kept(self, known: KnownPackets) -> KnownPackets:
        if self._video is not None:
            known_packets.put(self._video, known)
        return known

    def _indexed(self) -> KnownPackets:
        """The frames of `_listed`."""
        self._table, inside = self._build_index()
        if not len(self._table.packet):
            raise VideoError(self.path, "no frame in it is shown")
        self._seconds = self._times()
        shown = len(self._listed.shown)
        seekable = self._table.pts is not None and not inside and shown == len(self._listed)
        fps = average_rate(self.container, self.stream, shown, self._seconds)
        return KnownPackets(self._listed, self._table, self._seconds, fps, seekable)

    def _reopen(self) -> None:
        self.container.close()
        self.container, self.stream = open_container(self.path, whole=not self._seeks)
        self.stream.codec_context.flush_buffers()

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

    def shown_at(self) -> np.ndarray:
        return super().shown_at() if self._seconds is None else self.begin + self._seconds

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
            packets.add(packet.pts, packet.dts, not hidden, packet.is_keyframe, packet.size)
            if number >= MAX_FRAMES:
                raise VideoError(self.path, f"more than {MAX_FRAMES} frames; cut it into shorter videos")
            last = packet
        if last is not None and last.is_corrupt:  # for other packets, the decoder detects damage, as in ffmpeg
            packets.hide_last()
        if not len(packets.shown):
            raise VideoError(self.path, "no frame in it")
        return packets

    def _build_index(self) -> tuple[FrameIndex, bool]:
        """The index of the frames that a player shows: from the first frame that the decoder outputs, as in ffmpeg.

        Also whether the decoder had to be asked for it: frames precede the first key frame, or it is refreshed gradually.
        """
        packets = self._listed
        avi = self.container.format.name == "avi"
        made_up = avi and self.stream.codec_context.has_b_frames  # the demuxer invents times: an AVI has none
        inside = packets.begins_inside() or self._begins_with_refresh()
        if packets.timed() and not made_up:
            return index_by_pts(packets, self._first_pts()) if inside else index_by_pts(packets), inside
        raw = has_flag(
            self.container, "no_timestamps"
        )  # whether a frame is shown before the first key frame is unknown
        return index_by_count(packets, self._count_hidden() if inside or raw else 0), inside

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
        try:
            try:
                yield from self._found(numbers)
            except _OutOfStepError:
                self._distrust()
                yield from self._found(numbers)
        except VideoError:
            raise
        except Exception as error:
            raise as_video_error(self.path, error) from error

    def _found(self, numbers: list[int]) -> Iterator[tuple[int, Frame]]:
        convert = Converter(self.path, self.frame_count)
        yield from (self._frames_by_count if self._table.pts is None else self._frames_by_pts)(numbers, convert)

    def _distrust(self) -> None:
        """Read the file from its start from now on. Raises VideoError if it has other frames than its index promised."""
        promised = self._table
        found = self._from_start(trusted=False).frames
        same = found.pts is not None and promised.pts is not None and np.array_equal(found.pts, promised.pts)
        if not same or not np.array_equal(found.packet, promised.packet):
            raise VideoError(
                self.path, "its index and its frames disagree; or it was changed while it was read", transient=True
            )

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
        elif self._seeks:
            yield from self._sought(first, last)
        else:
            self._reopen()
            for number, packet in enumerate(self._demuxed()):
                if number > last:
                    break
                if number >= first:
                    yield number, packet
        yield last + 1, None

    def _sought(self, first: int, last: int) -> Iterator[tuple[int, av.Packet]]:
        """Packets `first` to `last`, found by seeking. Raises _OutOfStepError if they are not those of the index."""
        listed, number = self._listed, -1
        for time in (int(listed.pts[first]), int(min(listed.pts[first], listed.dts[first])), int(listed.pts[0])):
            if time == NO_TIME:
                continue
            self._seek(time)
            demuxed = self._demuxed()
            packet = next(demuxed, None)
            number = -1 if packet is None else self._number(packet, first)
            if 0 <= number <= first:
                break
        if packet is None or not 0 <= number <= first:
            raise _OutOfStepError
        while True:
            if packet is None or not listed.holds(number, packet):
                raise _OutOfStepError
            if number >= first:
                yield number, packet
            if number == last:
                return
            packet, number = next(demuxed, None), number + 1

    def _seek(self, time: int) -> None:
        try:
            self.container.seek(time, stream=self.stream, backward=True)
        except Exception as error:
            raise _OutOfStepError from error

    def _number(self, packet: av.Packet, first: int) -> int:
        """The number of the packet that a seek to packet `first` led to; -1 for none."""
        listed = self._listed
        if listed.holds(first, packet):
            return first
        found = np.flatnonzero(listed.pts == (NO_TIME if packet.pts is None else packet.pts))
        return int(found[0]) if len(found) == 1 else -1

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        check_deadline(self.path, self._deadline)
        try:
            return self.stream.codec_context.decode(packet)
        except EOFError:
            return []


def _identified(path: Path) -> Hashable | None:
    try:
        return known_packets.identity(path)
    except OSError as error:
        raise as_video_error(path, error) from error


def _drain(frames: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Pop the frames of a list one by one, so that only the consumer keeps a frame alive; a frame of 8K has 50 MB."""
    while frames:
        yield frames.pop(0)


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
