"""Text from strangers (paths, class names, library messages), made safe to print and to put into a csv file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""Control characters, marks that change the direction of writing, line separators, bytes that are no UTF-8."""

_FORMULA = re.compile(r"[=@\t\r]|[-+](?=.*[(|!=@])", re.DOTALL)
"""How a cell begins that a spreadsheet computes. A leading ``-`` or ``+`` alone (video ids, numbers) calls nothing."""

_MARKDOWN = re.compile(r"[\\`|<>&\[\]]")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def printable(text: str) -> str:
    """`text` on one line, with everything that a terminal would obey written as an escape (``\\x1b``, ``\\n``, ``\\u202e``).

    A byte that is no UTF-8 (a surrogate, as `os.fsdecode` gives it) is written as that byte, e.g. ``\\xe9``.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def counted(number: int, what: str) -> str:
    """A number and its noun: ``1 rank``, ``4 ranks``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def quoted(text: str, length: int = 200) -> str:
    """`text` for an error message: printable, in quotation marks, its middle left out beyond `length` characters."""
    shown = printable(text)
    half = length // 2
    return f"'{shown if len(shown) <= length else f'{shown[:half]}…{shown[-half:]}'}'"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0])
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def cell(value: object) -> object:
    """`value` as a cell of a csv file: printable, and never a formula (an apostrophe goes before what would be one).

    Numbers stay as they are. A text that begins with ``-`` or ``+`` stays too, unless it could call something.
    """
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if _FORMULA.match(value) else printable(value)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as the text of a csv file, every one on a line of its own; every cell goes through :func:`cell`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([cell(value) for value in row])
    return out.getvalue()


def markdown(text: str) -> str:
    """`text` for a Markdown document: printable, and nothing in it is a tag, a table's border, a link or code."""
    return _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0]) or f"\\{match[0]}", printable(text))


__all__ = ["cell", "counted", "csv_text", "markdown", "printable", "quoted"]
