"""Parse annotation files, one `path label` line per video, to arrays.

numpy parses a plain file of a million lines in a fraction of a second. Other files are parsed line by line, and so is the location of
every error.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from multitrain.config import ConfigError, DatasetConfig
from multitrain.config.reading import read_blocks, refuse_other_format
from multitrain.data.segment import Segment, named, split_columns

_MAX_LABEL = 10**9
MAX_PATH_BYTES = 4096
"""Maximum bytes of a path; the limit of Linux."""
MAX_LINE_BYTES = 1 << 16
"""Maximum bytes of a line; thousands of labels fit."""
MAX_LINES = 20_000_000
"""Maximum lines of an annotation file; the largest lists of action recognition have one or two million."""
_QUOTE = 34
_BINARY_NUL_SHARE = 0.01
"""Fraction of NUL bytes at the start of a file above which it is binary, not text with a stray NUL."""


class CatalogError(ConfigError):
    """An annotation file, class list or video folder cannot be used. The message is one line: file, line, and the remedy."""


class Syntax(NamedTuple):
    """Syntax of the lines of an annotation file."""

    separator: bytes
    """Separates path and label; the last occurrence counts, so paths may contain it."""
    multi_label: bool
    """Whether the label is a comma-separated list."""
    segments: bool = False
    """Whether a path that is followed by two numbers is a video with the start and end of a segment, in seconds."""

    @staticmethod
    def of(dataset: DatasetConfig, csv: Path) -> Syntax:
        """The syntax that the dataset's configuration sets. Raises CatalogError for an impossible separator; `csv` is for the message."""
        syntax = Syntax(dataset.separator.encode(), dataset.multi_label, dataset.segments)
        if not syntax.separator or b"\n" in syntax.separator or (syntax.multi_label and b"," in syntax.separator):
            what = "path and labels, which commas separate" if syntax.multi_label else "path and label"
            raise CatalogError(
                f"{csv}: separator={dataset.separator!r} cannot stand between {what}; use a blank or a tab"
            )
        return syntax


class Annotations(NamedTuple):
    """The N lines of a file as arrays. Path n is ``content[starts[n]:stops[n]]``."""

    starts: np.ndarray
    """int64 [N]."""
    stops: np.ndarray
    """int64 [N]."""
    labels: np.ndarray
    """int32: the label of each line [N]; for multi-label data, all label lists concatenated."""
    label_starts: np.ndarray
    """uint32 [N + 1] for multi-label data: where each line's list starts; else empty."""
    segments: np.ndarray | None = None
    """float64 [N, 2]: start and end in seconds, NaN for complete videos; None if no line has a segment."""

    def paths(self, content: bytes) -> list[bytes]:
        """All paths, in order."""
        return [content[a:b] for a, b in zip(self.starts.tolist(), self.stops.tolist())]


class Line(NamedTuple):
    """One non-blank line."""

    number: int
    """Line number, from 1; blank lines count."""
    path: bytes
    labels: list[int]
    """Ascending."""
    start: int
    """Offset of the path in the file."""
    segment: Segment | None = None
    """The part of the video; None for a complete video."""

    @property
    def name(self) -> str:
        """The path as a text, with the segment: see `multitrain.data.segment`."""
        return named(os.fsdecode(self.path), self.segment)


def read_annotations(csv: Path) -> bytes:
    """Read an annotation file (or another list with one video per line) block by block, checking each block.

    Reading a file that cannot be a list (a disk image, a video, an endless line) stops at the first block that shows it.

    Raises:
        CatalogError: the file cannot be read, is not a regular text file, is too large, or has too many or too long lines.
    """
    blocks: list[bytes] = []
    number, open_bytes = 1, 0  # of the line that the next block begins in, and the bytes of it that are read
    try:
        for block in read_blocks(csv):
            if not blocks:
                _refuse_binary(block, csv)
            open_bytes = _refuse_long_line(block, open_bytes, csv, number)
            number += block.count(b"\n")
            blocks.append(block)
            if number > MAX_LINES + 1:
                raise CatalogError(f"{csv}: more than {MAX_LINES:,} lines; is it the right file?")
    except CatalogError:
        raise
    except ConfigError as error:
        raise CatalogError(str(error)) from error
    return b"".join(blocks)


def _refuse_long_line(block: bytes, open_bytes: int, csv: Path, number: int) -> int:
    """Raise CatalogError for a line longer than `MAX_LINE_BYTES`; return the bytes of the block's last, unfinished line.

    Args:
        open_bytes: bytes of the block's first line that precede the block.
        number: number of that line.
    """
    begin, room = 0, MAX_LINE_BYTES - open_bytes
    while len(block) - begin > room:
        end = block.rfind(b"\n", begin, begin + room + 1)
        if end < 0:
            number += block.count(b"\n", 0, begin)
            _refuse_nul(block[begin:], csv, number)
            _refuse_carriage_returns(block[begin : begin + room], csv, number)
            raise CatalogError(_long_line(csv, number))
        begin, room = end + 1, MAX_LINE_BYTES
    begin = max(begin, block.rfind(b"\n") + 1)
    return len(block) - begin if begin else open_bytes + len(block)


def parse(content: bytes, csv: Path, syntax: Syntax) -> Annotations:
    """Parse all lines of a file's `content`.

    Raises:
        CatalogError: it is not text, has no line, or has a line that is not a path and a label.
    """
    _refuse_no_text(content, csv)
    parsed = None if syntax.multi_label or syntax.segments else _parse_fast(content, syntax.separator)
    if parsed is None:
        parsed = _parse_slowly(content, csv, syntax)
    if not len(parsed.starts):
        raise CatalogError(f"{csv}: no line in it; write 'path label' lines, or take the dataset out of data.datasets")
    lengths = parsed.stops - parsed.starts
    if lengths.max() > MAX_PATH_BYTES:
        start = int(parsed.starts[lengths.argmax()])
        raise CatalogError(_too_long(csv, _line_at(content, start), int(lengths.max())))
    return parsed


def _refuse_no_text(content: bytes, csv: Path) -> None:
    """Raise CatalogError for content that is not text: another format, NUL bytes, carriage returns as line ends."""
    _refuse_binary(content, csv)
    _refuse_carriage_returns(content, csv)


def _refuse_binary(content: bytes, csv: Path) -> None:
    """Raise CatalogError for content of a binary format, and for NUL bytes."""
    try:
        refuse_other_format(content, csv)
    except ConfigError as error:
        raise CatalogError(str(error)) from None
    _refuse_nul(content, csv)


def _refuse_nul(content: bytes, csv: Path, number: int = 1) -> None:
    """Raise CatalogError for NUL bytes; `number` is that of the first line of `content`."""
    nul = content.find(b"\0")
    if nul < 0:
        return
    head = content[: 1 << 16]
    if head.count(0) > max(16, _BINARY_NUL_SHARE * len(head)):
        raise CatalogError(
            f"{csv}: bytes, not text (many are NUL); is it the right file, and was it written to its end?"
        )
    raise CatalogError(
        f"{csv}:{number - 1 + _line_at(content, nul)}: a NUL byte in the line, which no path can hold; remove it "
        f"(tr -d '\\000' < {csv.name})"
    )


def _refuse_carriage_returns(content: bytes, csv: Path, number: int = 1) -> None:
    """Raise CatalogError for lines that end with a carriage return alone, as on old Macintosh systems."""
    if content.count(b"\r") == content.count(b"\r\n"):
        return
    alone = re.search(rb"\r(?!\n)", content)
    line = number - 1 + _line_at(content, alone.start() if alone else 0)
    raise CatalogError(
        f"{csv}:{line}: lines that end with a carriage return alone; save it with Unix or Windows line ends"
    )


def _too_long(csv: Path, line: int, size: int) -> str:
    return f"{csv}:{line}: a path of {size} bytes, and none can be longer than {MAX_PATH_BYTES}; correct the line"


def _long_line(csv: Path, line: int) -> str:
    return f"{csv}:{line}: a line of more than {MAX_LINE_BYTES:,} bytes, which no list of videos has; is it the right file?"


def _line_at(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1


def count_repeated(paths: list[bytes], content: bytes, csv: Path, syntax: Syntax) -> int:
    """Count the lines that repeat the video of an earlier line, also with another spelling of its path (``a//b``, ``./a``).

    Raises:
        CatalogError: a video has two different labels.
    """
    if syntax.segments:
        return count_repeats(content, csv, syntax)
    odd = any(mark in content for mark in (b"//", b"./"))
    different = {normalise_path(p) for p in paths} if odd else set(paths)
    return 0 if len(different) == len(paths) else count_repeats(content, csv, syntax)


def normalise_path(path: bytes) -> bytes:
    """A path without double slashes, ``.`` and ``..``."""
    if b"//" not in path and b"./" not in path:
        return path
    plain = os.path.normpath(path)
    return plain[1:] if plain.startswith(b"//") else plain


def depends_on_folder(paths: list[bytes], content: bytes) -> bool:
    """Whether paths can be compared only with the folder they start from: some are absolute, or leave it (``../``)."""
    if 0 < sum(path[:1] == b"/" for path in paths) < len(paths):
        return True
    return b"../" in content and any(normalise_path(path).startswith(b"../") for path in paths)


def _speller(videos: Path | None) -> Callable[[bytes], bytes]:
    """A function that normalises paths; with `videos`, it resolves them from that folder, which may be a symbolic link."""
    if videos is None:
        return normalise_path
    folder, real = os.fsencode(os.path.abspath(videos)), os.fsencode(os.path.realpath(videos))

    def whole(path: bytes) -> bytes:
        joined = normalise_path(os.path.join(folder, path))
        return folder + joined[len(real) :] if joined.startswith(real + b"/") else joined

    return whole


def count_repeats(content: bytes, csv: Path, syntax: Syntax, videos: Path | None = None) -> int:
    """Count the lines that repeat the video of an earlier line.

    Args:
        videos: the folder from which paths start, needed where :func:`depends_on_folder` is true.

    Raises:
        CatalogError: a video has two different labels.
    """
    spelled, seen = _speller(videos), dict[tuple[bytes, Segment | None], Line]()
    repeats = 0
    for line in lines(content, csv, syntax):
        first = seen.setdefault((spelled(line.path), line.segment), line)
        if first.labels != line.labels:
            here, there = (",".join(map(str, x.labels)) for x in (line, first))
            as_spelled = "" if first.path == line.path else f" (as {_shown(first.path)}, the same video)"
            raise CatalogError(
                f"{csv}:{line.number}: {_shown(os.fsencode(line.name))} has label {_short(here)} here and {_short(there)} in line "
                f"{first.number}{as_spelled}; keep one of the two lines"
            )
        repeats += first is not line
    return repeats


def lines(content: bytes, csv: Path, syntax: Syntax) -> Iterator[Line]:
    """Iterate over the non-blank lines. Raises CatalogError at a line that is not a path and a label."""
    _refuse_no_text(content, csv)
    end = 0
    for number, raw in enumerate(io.BytesIO(content), start=1):  # which shares the memory of `content`
        start, end = end, end + len(raw)
        if len(raw) > MAX_LINE_BYTES + 1:
            raise CatalogError(_long_line(csv, number))
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw  # the byte order mark of some editors
        start += len(raw) - len(text.lstrip())
        path, found, tail = text.strip().rpartition(syntax.separator)
        path, segment = path.rstrip(), None
        if syntax.segments:
            path, segment = split_columns(path, syntax.separator)
            if segment is not None and (problem := segment.problem()):
                raise CatalogError(f"{csv}:{number}: {_shown(text)}: no segment: {problem}; correct the line")
        if path[:1] == b'"' and path[-1:] == b'"' and len(path) > 2:
            path, tail, start = _unquoted(path, csv, number), tail.strip().strip(b'"'), start + 1
        if len(path) > MAX_PATH_BYTES:
            raise CatalogError(_too_long(csv, number, len(path)))
        if found and path:
            yield Line(number, path, _labels(tail, csv, number, syntax, text.strip()), start, segment)
        elif text.strip():
            expected = f"path{syntax.separator.decode()}label"
            remedy = _line_remedy(text.strip(), number) or _separator_remedy(text, syntax.separator)
            raise CatalogError(f"{csv}:{number}: {_shown(text)} is not {expected!r}; {remedy}")


def line_text(path: str, segment: Segment | None, labels: Sequence[int], separator: str) -> str:
    """A line of an annotation file, with its line end."""
    return separator.join([path, *(segment.columns() if segment else ()), ",".join(map(str, labels))]) + "\n"


def _unquoted(path: bytes, csv: Path, number: int) -> bytes:
    """Remove the quotation marks that pandas and spreadsheets put around a path."""
    inner = path[1:-1]
    if b'"' in inner:
        raise CatalogError(
            f"{csv}:{number}: {_shown(path)} is quoted and has quotation marks within; write the path without those around it"
        )
    return inner


def _labels(text: bytes, csv: Path, number: int, syntax: Syntax, line: bytes) -> list[int]:
    labels = set()
    for token in text.split(b",") if syntax.multi_label else [text]:
        token = token.strip()
        if not token.isdigit() or len(token.lstrip(b"0")) > 10 or int(token) > _MAX_LABEL:
            remedy = _line_remedy(line, number) or _label_remedy(token, text, number, syntax)
            raise CatalogError(
                f"{csv}:{number}: label {_shown(token)} is no whole number up to {_MAX_LABEL:,}; {remedy}"
            )
        labels.add(int(token))
    return sorted(labels)


def _line_remedy(line: bytes, number: int) -> str:
    """The remedy for a line that is not 'path label'; empty if its parts show the problem."""
    if number == 1 and line[:1] in (b"{", b"["):
        return "this is JSON: write 'path label' lines (`multitrain data import` does, from official annotation files)"
    if len(line) > 1 and line[:1] == line[-1:] and line[:1] in (b'"', b"'"):
        return "the line as a whole is in quotation marks; write it without them"
    if re.fullmatch(rb"[0-9]{1,10}[\s,;]+[^\s,;].*", line) and not re.search(rb"[\s,;][-+0-9.]+$", line):
        return "the columns are in the other order; write 'path label'"
    return ""


def _label_remedy(token: bytes, text: bytes, number: int, syntax: Syntax) -> str:
    """The remedy for an invalid label `token`; `text` is everything after the path."""
    if not syntax.multi_label and re.fullmatch(rb"\s*[0-9]+(\s*,\s*[0-9]+)+\s*", text):
        return "for several labels a video set the dataset's multi_label=true"
    if re.fullmatch(rb"\+[0-9]+|[0-9]+\.0*", token):
        return "write it without sign and point"
    if number == 1 and re.fullmatch(rb"[\"']?([^\W\d]|[\x80-\xff])[\w\x80-\xff -]*[\"']?", token):
        return "labels are whole numbers from 0 up; remove the header line"
    return "labels are whole numbers from 0 up; correct the line"


def _separator_remedy(line: bytes, separator: bytes) -> str:
    for other in (b"\t", b",", b";", b" "):
        if other != separator and other in line.strip():
            return f"correct the line, or set the dataset's separator to {other.decode()!r}"
    return "correct the line"


def _shown(text: bytes) -> str:
    return repr(_short(text.decode("utf-8", "replace").strip()))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"


def _parse_fast(content: bytes, separator: bytes) -> Annotations | None:
    """Parse all lines at once; None if a line is not plainly 'path separator digits'."""
    if len(separator) != 1 or not content or content.startswith(b"\xef\xbb\xbf"):
        return None
    text = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(text == 10)
    if content[-1:] != b"\n":
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if np.any(ends == starts):
        return None
    stops = ends - (text[ends - 1] == 13)
    marks = np.flatnonzero(text == separator[0])
    last = np.searchsorted(marks, stops) - 1
    if not len(marks) or last.min() < 0:
        return None
    cuts = marks[last]
    digits = stops - cuts - 1
    if np.any(cuts <= starts) or digits.min() < 1 or digits.max() > 9:
        return None
    if np.any(text[starts] <= 32) or np.any(text[cuts - 1] <= 32) or np.any(text[starts] == _QUOTE):
        return None
    labels = np.zeros(len(starts), np.int32)
    for place in range(int(digits.max())):
        rows = digits > place
        digit = text[(stops - 1 - place)[rows]].astype(np.int32) - 48
        if digit.min() < 0 or digit.max() > 9:
            return None
        labels[rows] += digit * 10**place
    return Annotations(starts, cuts, labels, np.zeros(0, np.uint32))


def _parse_slowly(content: bytes, csv: Path, syntax: Syntax) -> Annotations:
    starts, stops, labels, counts, parts = [], [], [], [], []
    for line in lines(content, csv, syntax):
        starts.append(line.start)
        stops.append(line.start + len(line.path))
        labels.extend(line.labels)
        counts.append(len(line.labels))
        parts.append(line.segment or (np.nan, np.nan))
    segments = np.array(parts, np.float64)
    label_starts = np.concatenate([[0], np.cumsum(counts)]) if syntax.multi_label else np.zeros(0)
    return Annotations(
        np.array(starts, np.int64),
        np.array(stops, np.int64),
        np.array(labels, np.int32),
        label_starts.astype(np.uint32),
        segments if len(segments) and not np.isnan(segments).all() else None,
    )
