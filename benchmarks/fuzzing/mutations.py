"""Random changes to the bytes of a valid input, determined by the case."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

TOKENS = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1b[31m",
        b"\r",
        b"\n",
        b"\t",
        b" ",
        b"\xe9",
        "\u202e".encode(),
        b"\x7f",
    ),
    *(
        b",",
        b";",
        b":",
        b"=",
        b"'",
        b'"',
        b"\\",
        b"%",
        b"#",
        b"~",
        b"[",
        b"]",
        b"{",
        b"}",
        b"(",
        b")",
        b"${",
        b"*",
        b"&a ",
        b"- ",
    ),
    *(b"../", b"/", b"//dev/full", b"null", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"true", b"\xf0\x9f\x8e\xac"),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a" * 5000, b"- " * 3000, b"\n" * 3000),
    *(b"${oc.env:HOME}", b"!!python/object/apply:os.getcwd []", b"&x [*x, *x]", b"*x", b"<script>", b"<<: *x"),
)
"""Texts on which readers often fail."""

NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"255",
    b"65536",
    b"2147483648",
    b"9223372036854775808",
    b"1e308",
    b"0.5",
    b"99999999999999999999",
)
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")

Change = Callable[[bytearray, random.Random], bytearray]


def mutated(data: bytes, rng: random.Random, changes: int | None = None) -> bytes:
    """`data` after one to four changes; sometimes unchanged, so that the valid case is tested too."""
    if changes is None:
        changes = rng.choice((0, 1, 1, 1, 2, 2, 3, 4))
    out = bytearray(data)
    for _ in range(changes):
        out = rng.choice(CHANGES)(out, rng)
    return bytes(out)


def _span(data: Sequence[int], rng: random.Random) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 512, 4096))))


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _overwrite(data: bytearray, rng: random.Random) -> bytearray:
    span = _span(data, rng)
    size = span.stop - span.start
    data[span] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data


def _delete(data: bytearray, rng: random.Random) -> bytearray:
    del data[_span(data, rng)]
    return data


def _repeat(data: bytearray, rng: random.Random) -> bytearray:
    span = _span(data, rng)
    data[span.stop : span.stop] = data[span] * rng.choice((1, 2, 100))
    return data


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(TOKENS)
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data) + 1)]


def _swap(data: bytearray, rng: random.Random) -> bytearray:
    one = _span(data, rng)
    piece = data[one]
    del data[one]
    at = rng.randrange(len(data) + 1)
    data[at:at] = piece
    return data


def _number(data: bytearray, rng: random.Random) -> bytearray:
    """Replace a number in a text, or in the header of a binary file."""
    found = list(_NUMBER.finditer(data, 0, 20_000))
    if found:
        at = rng.choice(found)
        data[at.start() : at.end()] = rng.choice(NUMBERS)
    return data


def _header(data: bytearray, rng: random.Random) -> bytearray:
    """Replace eight of the first hundred bytes of a binary file, as a length or an offset."""
    at = rng.randrange(min(len(data), 100) + 1)
    value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, len(data), rng.randrange(2**20)))
    data[at : at + 8] = value.to_bytes(8, rng.choice(("little", "big")))
    return data


CHANGES: tuple[Change, ...] = (
    _flip,
    _overwrite,
    _delete,
    _repeat,
    _insert,
    _insert,
    _truncate,
    _swap,
    _number,
    _number,
    _header,
)
