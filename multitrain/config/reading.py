"""Read untrusted text, JSON and YAML within limits; refuse invalid files with a message of one line.

Every error is a :class:`ConfigError` (a ``ValueError``) that names the file. Reading takes at most a few seconds and a few hundred
megabytes, and YAML constructs plain values only.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from multitrain.config.errors import ConfigError
from multitrain.text import printable

LARGEST_TEXT = 1 << 30
"""Limit of a file of lines (annotations, class names, metrics), in bytes."""
LARGEST_JSON = 128 << 20
"""Limit of a JSON file, in bytes; the largest official annotation file has about 20 MB."""
MOST_VALUES = 10_000_000
"""Limit of values in a JSON text; each takes tens of bytes in memory."""
LARGEST_YAML = 2 << 20
"""Limit of a YAML file, in bytes."""
MOST_NODES = 200_000
"""Limit of values in a YAML text; values that aliases repeat count again."""
DEEPEST = 100
"""Limit of nested lists and mappings."""
LONGEST_NUMBER = 40
"""Limit of digits of an integer."""

BLOCK = 1 << 20
"""Bytes read at once."""

_UNPACK = "unpack it, and give the file that comes out"
_EXPORT = "export it as text"
_FORMATS = (
    (b"\x1f\x8b", "compressed by gzip", f"{_UNPACK} (gunzip)"),
    (b"PK\3\4", "a zip archive or a spreadsheet", "unzip it, or save the spreadsheet as CSV"),
    (b"\xfd7zXZ\0", "compressed by xz", f"{_UNPACK} (unxz)"),
    (b"BZh91AY&SY", "compressed by bzip2", f"{_UNPACK} (bunzip2)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", f"{_UNPACK} (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet or document of an older Office", "save it as CSV"),
    (b"PAR1\x15", "a Parquet table", _EXPORT),
    (b"SQLite format 3\0", "an SQLite database", _EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (b"%PDF-", "a PDF document", _EXPORT),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS", "fetch the file itself (git lfs pull)"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)
"""First bytes (in either case) of files that users give by mistake instead of a text, their format, and the remedy."""

_LONG_NUMBER = re.compile(rf"[0-9]{{{LONGEST_NUMBER + 1}}}")
_DIGITS = re.compile(r"[-+]?[0-9_]+")


def read_bytes(file: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file. Raises ConfigError: it is missing, not readable, not a regular file, or larger than `largest`."""
    return b"".join(read_blocks(file, largest))


def read_blocks(file: Path, largest: int = LARGEST_TEXT) -> Iterator[bytes]:
    """The content of a file in blocks of :data:`BLOCK` bytes; a file larger than `largest` is not read.

    Raises:
        ConfigError: it is missing, not readable, not a regular file, or larger than `largest`.
    """
    try:
        status = file.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{shown(file)}: is a folder; give a file")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device, which may never end
            raise ConfigError(f"{shown(file)}: is no ordinary file; write its content to one")
        size = status.st_size
        with file.open("rb", buffering=0) as opened:
            while size <= largest and (block := opened.read(BLOCK)):
                yield block
                size = max(size, opened.tell())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown(file)}: cannot be read ({reason}); check the path and its permissions") from error
    if size > largest:
        raise ConfigError(
            f"{shown(file)}: larger than the {largest >> 20} MB that such a file may have; is it the right file?"
        )


def read_text(file: Path, largest: int = LARGEST_TEXT) -> str:
    """The content of a UTF-8 file, without its byte order mark. Raises ConfigError."""
    return as_text(read_bytes(file, largest), file)


def refuse_other_format(content: bytes, where: object) -> None:
    """Refuse content that begins like a file of a known format other than plain text. Raises ConfigError.

    These are UTF-16 and UTF-32, compressed files and archives, tables of other programs, a Git LFS pointer, a web page.
    """
    refuse_utf16(content, where)
    head = content[:64]
    for begin, what, remedy in _FORMATS:
        if head.lower().startswith(begin.lower()):
            raise ConfigError(f"{where}: is {what}, not the text itself; {remedy}")


def as_text(content: bytes, where: object) -> str:
    """UTF-8 `content` as text, without its byte order mark. Raises ConfigError for another encoding, or a NUL."""
    refuse_other_format(content, where)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8") from None
    nul = text.find("\0")
    if nul >= 0:
        raise ConfigError(f"{where}:{text.count(chr(10), 0, nul) + 1}: a NUL byte in it; write the file again as text")
    return text


def refuse_utf16(content: bytes, where: object) -> None:
    """Refuse UTF-16 and UTF-32, with or without a byte order mark: every other byte of a short text is 0. Raises ConfigError."""
    head = content[:200]
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    zeros = max(head[0::2].count(0), head[1::2].count(0))
    text = head.count(0) < 0.9 * len(head)  # and not a hole of a sparse file
    if (marked and zeros) or (text and len(head) >= 6 and zeros >= 0.8 * (len(head) // 2)):
        raise ConfigError(f"{where}: is UTF-16, not UTF-8; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")


def read_json(file: Path) -> Any:
    """The value in a JSON file. Raises ConfigError."""
    return parse_json(read_bytes(file, LARGEST_JSON), file)


def parse_json(text: str | bytes, where: object, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: beginning of an error message: a file, or a file and a line.
        unique: whether a repeated key in an object is an error; otherwise the last one counts.

    Raises:
        ConfigError: it is not JSON, nested deeper than :data:`DEEPEST`, or has more than :data:`MOST_VALUES` values or too long a
            number.
    """
    text = as_text(text, where) if isinstance(text, bytes) else text
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > MOST_VALUES:
        raise ConfigError(f"{where}: more than {MOST_VALUES:,} values in it; is it the right file?")
    try:
        number, pairs = _json_number if _LONG_NUMBER.search(text) else None, _unique if unique else None
        value = json.loads(text, parse_int=number, object_pairs_hook=pairs)
    except RecursionError:
        raise ConfigError(_too_deep(where)) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error}); correct or restore it") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; correct it") from None
    if opened <= DEEPEST:
        return value
    level = [value]
    for _ in range(DEEPEST):
        inner = (v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()))
        level = [v for v in inner if isinstance(v, (dict, list))]
        if not level:
            return value
    raise ConfigError(_too_deep(where))


def read_yaml(file: Path) -> Any:
    """The value in a YAML file. Raises ConfigError."""
    return parse_yaml(as_text(read_bytes(file, LARGEST_YAML), file), file)


def parse_yaml(text: str, where: object) -> Any:
    """The value of a YAML text of plain values; dates stay text, as in Hydra.

    Raises:
        ConfigError: it is not YAML, constructs other values, or exceeds the limits of :func:`check_yaml`.
    """
    check_yaml(text, where)
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(_not_yaml(where, error)) from None


def check_yaml(text: str, where: object) -> None:
    """Refuse a text that is not YAML, is nested deeper than :data:`DEEPEST`, or has more than :data:`MOST_NODES` values.

    An alias counts as many values as it repeats, so that a kilobyte cannot expand to gigabytes.

    Raises:
        ConfigError: names the limit.
    """
    if len(text) > LARGEST_YAML:
        raise ConfigError(f"{where}: larger than the {LARGEST_YAML >> 20} MB that such a file may have")
    sizes: dict[str, int | None] = {}
    starts: list[tuple[str | None, int]] = []
    count = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            count += _nodes(event, sizes, where)
            if isinstance(event, yaml.CollectionStartEvent):
                starts.append((event.anchor, count))
                if event.anchor:
                    sizes[event.anchor] = None  # of unknown size until it ends
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, start = starts.pop()
                if anchor:
                    sizes[anchor] = count - start + 1
            if len(starts) > DEEPEST:
                raise ConfigError(_too_deep(where))
            if count > MOST_NODES:
                raise ConfigError(
                    f"{where}: more than {MOST_NODES:,} values in it, aliases (*) counted; write it plainly"
                )
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(_not_yaml(where, error)) from None


def _nodes(event: Any, sizes: dict[str, int | None], where: object) -> int:
    """Number of values that a YAML event adds."""
    if isinstance(event, yaml.AliasEvent):
        size = sizes.get(event.anchor or "", 1)
        if size is None:
            raise ConfigError(f"{where}: the value &{event.anchor} contains itself; write it plainly")
        return size
    if isinstance(event, yaml.ScalarEvent):
        if event.anchor:
            sizes[event.anchor] = 1
        if len(event.value) > LONGEST_NUMBER and not event.style and _DIGITS.fullmatch(event.value):
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"{where}:{line}: a number of {len(event.value)} digits; write a number, or quote a text")
        return 1
    return int(isinstance(event, yaml.CollectionStartEvent))


def shown(value: object, longest: int = 200) -> str:
    """Untrusted text for an error message: one line, no control characters, at most `longest` characters."""
    text = printable(str(value).replace("\n", " ")[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{shown(key, 60)!r} stands twice in one object")
        found[key] = value
    return found


def _json_number(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits in it")
    return int(text)


def _too_deep(where: object) -> str:
    return f"{where}: lists or mappings more than {DEEPEST} deep; write it plainly"


def _not_yaml(where: object, error: BaseException) -> str:
    if isinstance(error, RecursionError) or "nesting depth" in str(error):
        return _too_deep(where)
    return f"{where}: not YAML ({shown(' '.join(str(error).split()))}); correct or restore it"


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """PyYAML's safe loader, without dates: ``2001-99-99`` is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in _Base.yaml_implicit_resolvers.items()
    }
