"""Detect truncated files: compute the bytes that a file must have from the sizes of its chunks.

Most containers are a sequence of chunks (elements, tags, pages, boxes), each starting with its size. A file that ends inside
a chunk is truncated. The duration in the header is not used: it may be that of a longer audio track, or missing in a
recording. A chunk of unknown size, and bytes after the last chunk, do not make a file truncated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

_Reader = Callable[[bytes, "_Walk"], int]
"""Size in bytes, header included, of the chunk that starts with these bytes; 0 if the rest of the file has unknown size."""

_HEADER_BYTES = 320
"""Maximum bytes of a chunk's header; an Ogg page has the longest."""
_MAX_CHUNKS = 1 << 22
"""Maximum number of chunks to read; a file with more is assumed complete."""
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_FRAGMENTED = (b"moof", b"mdat", b"mfra", b"styp", b"sidx", b"emsg", b"prft", b"free", b"skip", b"uuid")
"""Box types of a fragmented MP4 after its first fragment; other bytes do not belong to it."""


class _Walk:
    """State of a reader while it goes from chunk to chunk.

    Attributes:
        left: bytes of the file from the chunk's start.
        fragmented: whether a fragment of an MP4 was found.
    """

    left = 0
    fragmented = False


class _ShortError(Exception):
    """The file ends inside a chunk's header."""


def needed_bytes(file: BinaryIO, size: int, kind: str) -> int:
    """The minimum number of bytes that a complete file has; at most `size` if the file is complete, or this cannot be determined.

    Args:
        size: actual bytes of the file.
        kind: libavformat's name of the format.
    """
    found = next((chunk for name, chunk in _READERS.items() if name in kind.split(",")), None)
    if found is None:
        return size
    first, read = found
    file.seek(0)
    at, walk = first(file.read(_HEADER_BYTES)), _Walk()
    for _ in range(_MAX_CHUNKS):
        if at >= size:
            return at
        file.seek(at)
        head, walk.left = file.read(_HEADER_BYTES), size - at
        try:
            length = read(head, walk)
        except (_ShortError, IndexError):
            return at + len(head) + 1
        if length <= 0:
            return size
        at += length
    return size


def _bytes(head: bytes, begin: int, count: int) -> bytes:
    if len(head) < begin + count:
        raise _ShortError
    return head[begin : begin + count]


def _number(head: bytes, begin: int, count: int, order: str = "big") -> int:
    return int.from_bytes(_bytes(head, begin, count), "big" if order == "big" else "little")


def _element(head: bytes, walk: _Walk) -> int:
    """Matroska. Enter elements of unknown size (a recording's segment and clusters); skip all others."""
    id_length = 9 - head[0].bit_length()
    if id_length > 4:
        return 0
    size_length = 9 - head[id_length].bit_length()
    if size_length > 8:
        return 0
    content = _number(head, id_length, size_length) & ((1 << 7 * size_length) - 1)
    unknown = content == (1 << 7 * size_length) - 1
    return id_length + size_length + (0 if unknown else content)


def _tag(head: bytes, walk: _Walk) -> int:
    """FLV. The four bytes after the last tag, which repeat its size, are optional: some writers omit them."""
    if head[0] & 0x1F not in (8, 9, 18):
        return 0
    size = 11 + _number(head, 1, 3)
    return size + (4 if walk.left > size else 0)


def _frame(head: bytes, walk: _Walk) -> int:
    """IVF."""
    size = _number(head, 0, 4, "little")
    return 12 + size if size else 0


def _object(head: bytes, walk: _Walk) -> int:
    """ASF: the header, then the data, whose size is unknown in a broadcast; later objects hold no frames."""
    if len(head) < 24 or head[:16] not in (_ASF_HEADER, _ASF_DATA):
        return 0
    size = _number(head, 16, 8, "little")
    return size if size > 50 else 0


def _page(head: bytes, walk: _Walk) -> int:
    """Ogg."""
    if not b"OggS".startswith(head[:4]):
        return 0
    segments = _number(head, 26, 1)
    return 27 + segments + sum(_bytes(head, 27, segments))


def _triplet(head: bytes, walk: _Walk) -> int:
    """MXF: key, length, value."""
    if not b"\x06\x0e\x2b\x34".startswith(head[:4]):
        return 0
    length = _number(head, 16, 1)
    if length < 0x80:
        return 17 + length
    return 17 + (length & 0x7F) + _number(head, 17, length & 0x7F)


def _box(head: bytes, walk: _Walk) -> int:
    """Fragmented MP4. In other MP4 files, the header has the number of frames."""
    kind = head[4:8]
    walk.fragmented = walk.fragmented or kind == b"moof"
    if len(head) < 16:
        return 0
    size = _number(head, 0, 4)
    size = _number(head, 8, 8) if size == 1 else size
    if size < 8 or (walk.fragmented and kind not in _FRAGMENTED):
        return 0
    return size if walk.fragmented else min(size, walk.left)


def _from_start(head: bytes) -> int:
    return 0


_READERS: dict[str, tuple[Callable[[bytes], int], _Reader]] = {
    "matroska": (_from_start, _element),
    "flv": (lambda head: int.from_bytes(head[5:9], "big") + 4, _tag),
    "ivf": (lambda head: int.from_bytes(head[6:8], "little"), _frame),
    "asf": (_from_start, _object),
    "ogg": (_from_start, _page),
    "mxf": (_from_start, _triplet),
    "mov": (_from_start, _box),
}
"""By format: a function for the offset of the first chunk, and the reader of a chunk."""
