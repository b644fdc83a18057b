"""Text, JSON and YAML that may come from strangers: read within limits, and refused in one line.

Whatever is wrong, the error is a :class:`ConfigError` (a ``ValueError``) that names the file; nothing here takes more than a
few seconds or a few hundred megabytes, and nothing that YAML can name is constructed but plain values.
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

LARGEST_TEXT = 1 << 30
"""Bytes of a file of lines (annotations, class names, metrics)."""
LARGEST_JSON = 128 << 20
"""Bytes of a JSON file; the largest official annotation file has about 20 MB."""
MOST_VALUES = 10_000_000
"""Values in a JSON text; each takes tens of bytes once it is read."""
LARGEST_YAML = 2 << 20
"""Bytes of a YAML file."""
MOST_NODES = 200_000
"""Values in a YAML text, those that aliases repeat counted again."""
DEEPEST = 100
"""Levels of lists and mappings inside each other."""
LONGEST_NUMBER = 40
"""Digits of a whole number."""

BLOCK = 1 << 20
"""Bytes read at once of a file that may have to be refused."""

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
"""First bytes of files that stand in the place of a text now and then (in any case), what they are, and the remedy."""

_LONG_NUMBER = re.compile(rf"[0-9]{{{LONGEST_NUMBER + 1}}}")
_DIGITS = re.compile(r"[-+]?[0-9_]+")


def read_bytes(file: Path, largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file. Raises ConfigError: missing, not readable, no file of bytes, or larger than `largest`."""
    return b"".join(read_blocks(file, largest))


def read_blocks(file: Path, largest: int = LARGEST_TEXT) -> Iterator[bytes]:
    """The content of a file in blocks of :data:`BLOCK` bytes; nothing is read of a file that is larger than `largest`.

    Raises:
        ConfigError: missing, not readable, no file of bytes, or larger than `largest`.
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
    """Raises ConfigError for content that begins as a file of a known format that is no text of the user's.

    UTF-16 and UTF-32, compressed files and archives, tables of other programs, a pointer of Git LFS, a web page.
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
    """Raises ConfigError for UTF-16 or UTF-32, with or without a byte order mark: every other byte of a short text is 0."""
    head = content[:200]
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    zeros = max(head[0::2].count(0), head[1::2].count(0))
    text = head.count(0) < 0.9 * len(head)  # and no hole of a file that was never written
    if (marked and zeros) or (text and len(head) >= 6 and zeros >= 0.8 * (len(head) // 2)):
        raise ConfigError(f"{where}: is UTF-16, not UTF-8; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")


def read_json(file: Path, largest: int = LARGEST_JSON) -> Any:
    """The value in a JSON file. Raises ConfigError."""
    return parse_json(read_bytes(file, largest), file)


def parse_json(text: str | bytes, where: object, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: what an error begins with: a file, or a file and a line.
        unique: whether a key that stands twice in one object is an error; else the last one counts.

    Raises:
        ConfigError: not JSON, deeper than :data:`DEEPEST`, with more than :data:`MOST_VALUES` values or too long a number.
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
    """The value of a YAML text of plain values; dates stay text, as Hydra has it.

    Raises:
        ConfigError: not YAML, another kind of value, or beyond the limits of :func:`check_yaml`.
    """
    check_yaml(text, where)
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(_not_yaml(where, error)) from None


def check_yaml(text: str, where: object) -> None:
    """Raises ConfigError for a YAML text that is none, deeper than :data:`DEEPEST`, or with more than :data:`MOST_NODES` values.

    An alias counts as much as what it repeats, so that a kilobyte cannot stand for gigabytes.
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
    """How many values a YAML event adds."""
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
    """Text of strangers for an error: one line, no control characters, not longer than `longest`."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value).replace("\n", " ")[: longest + 1])
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


__all__ = [
    "as_text",
    "check_yaml",
    "parse_json",
    "parse_yaml",
    "read_blocks",
    "read_bytes",
    "read_json",
    "read_text",
    "read_yaml",
    "refuse_other_format",
    "refuse_utf16",
    "shown",
]
