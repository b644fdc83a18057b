"""The packets of an MP4 or MOV file from its sample tables, without reading the packets.

libavformat builds an index from the tables: position, size, decoding time and key flag of each packet, edit list applied. It does not give
presentation times; they are the decoding times plus the offsets of the table ``ctts``, which is read here. The result is used only if it
equals what libavformat delivers for the first packets; all packets that are read later are compared, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from multitrain.data.decode.frame_index import Packets

if TYPE_CHECKING:
    import av

_COMPARED = 16
"""Number of packets at the start that are compared."""
_LARGEST = 1 << 26
"""Maximum bytes of the tables, those of some days of video."""
_MOST = 1 << 22
"""Maximum packets."""
_KEY, _OTHER_FLAGS = 1, ~1
_INNER = (b"mdia", b"minf", b"stbl")


class _UnprovenError(Exception):
    """The packets cannot be derived from the tables with certainty."""


def packets_from_tables(
    stream: av.VideoStream, delivered: Iterator[av.Packet], file: BinaryIO, size: int
) -> Packets | None:
    """All packets of the stream, or None if the tables do not determine them: fragmented or truncated files, edit lists that
    hide or repeat packets, several sample descriptions, VP8 (some of its frames are not shown).

    Args:
        delivered: the packets of the stream from the first one on, of which some are read.
        file: the same file; the tables are read from it.
        size: bytes of the file.
    """
    if stream.codec_context.name in ("vp8", "libvpx"):
        return None
    try:
        index = _index(stream, size)
        offsets = _composition_offsets(_track(_movie(file), stream.id), index[:, 2])
    except (_UnprovenError, IndexError, ValueError):
        return None
    head = list(islice(delivered, _COMPARED))
    if not head or head[0].pts is None or head[0].dts is None:
        return None
    pts = index[:, 0] + offsets + (head[0].pts - head[0].dts - int(offsets[0]))
    packets = Packets.of(pts, index[:, 0], index[:, 3] == _KEY, index[:, 2])
    same = all(packets.holds(n, packet) and packet.dts == index[n, 0] for n, packet in enumerate(head))
    return packets if same and len(head) == min(_COMPARED, len(index)) else None


def _index(stream: av.VideoStream, size: int) -> np.ndarray:
    """libavformat's index: int64 [packets, 4], decoding time, position, size and flags. Raises _UnprovenError."""
    entries = stream.index_entries
    if not 0 < len(entries) <= _MOST or len(entries) != stream.frames:
        raise _UnprovenError
    values = (value for e in entries for value in (e.timestamp, e.pos, e.size, e.flags))
    index = np.fromiter(values, np.int64, 4 * len(entries)).reshape(-1, 4)
    if (index[:, 3] & _OTHER_FLAGS).any() or index[:, 2].min() <= 0 or index[:, 1].min() < 0:
        raise _UnprovenError
    if int((index[:, 1] + index[:, 2]).max()) > size:
        raise _UnprovenError
    return index


def _movie(file: BinaryIO) -> bytes:
    """The content of the box ``moov``."""
    at = 0
    while True:
        file.seek(at)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        begin = 8
        if length == 1:
            length, begin = int.from_bytes(head[8:16], "big"), 16
        if len(head) < 8 or length < begin:
            raise _UnprovenError
        if kind == b"moov":
            if length > _LARGEST:
                raise _UnprovenError
            file.seek(at + begin)
            return file.read(length - begin)
        at += length


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of the boxes in a box."""
    at = 0
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if length < 8:
            raise _UnprovenError
        yield kind, content[at + 8 : at + length]
        at += length


def _track(movie: bytes, number: int) -> dict[bytes, bytes]:
    """The sample tables of the track with this number, by type."""
    found = []
    for kind, content in _boxes(movie):
        if kind == b"mvex":
            raise _UnprovenError
        if kind == b"trak":
            boxes = dict(_boxes(content))
            header = boxes.get(b"tkhd", b"")
            place = 20 if header[:1] == b"\1" else 12
            if int.from_bytes(header[place : place + 4], "big") == number:
                found.append(boxes)
    if len(found) != 1:
        raise _UnprovenError
    boxes = found[0]
    for inner in _INNER:
        boxes = dict(_boxes(boxes.get(inner, b"")))
    return boxes


def _composition_offsets(tables: dict[bytes, bytes], sizes: np.ndarray) -> np.ndarray:
    """Presentation minus decoding time of each packet, int64, without a constant; `sizes` are those in the index."""
    if _number(tables.get(b"stsd", b""), 4) != 1 or not np.array_equal(_sizes(tables.get(b"stsz", b"")), sizes):
        raise _UnprovenError
    if (table := tables.get(b"ctts")) is None:
        return np.zeros(len(sizes), np.int64)
    runs = np.frombuffer(table, ">u4", 2 * _number(table, 4), 8).reshape(-1, 2)
    if int(runs[:, 0].sum(dtype=np.int64)) != len(sizes):
        raise _UnprovenError
    return np.repeat(runs[:, 1].astype(np.uint32).view(np.int32).astype(np.int64), runs[:, 0])


def _sizes(table: bytes) -> np.ndarray:
    constant, count = _number(table, 4), _number(table, 8)
    if constant:
        raise _UnprovenError  # of pictures without compression
    return np.frombuffer(table, ">u4", count, 12).astype(np.int64)


def _number(table: bytes, at: int) -> int:
    return int.from_bytes(table[at : at + 4], "big")
