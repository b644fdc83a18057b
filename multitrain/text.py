"""Make untrusted text (paths, class names, library messages) safe to print, in tables, csv files and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
"""Control characters, marks that change the writing direction, line separators, bytes that are not UTF-8."""

_FORMULA = re.compile(r"[=@\t\r]|[-+](?=.*[(|!=@])", re.DOTALL)
"""Beginning of a cell that a spreadsheet evaluates. A leading ``-`` or ``+`` alone (video ids, numbers) is harmless."""

_MARKDOWN = re.compile(r"[\\`|<>&\[\]]")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def printable(text: str) -> str:
    """`text` on one line, with characters that control a terminal as escapes (``\\x1b``, ``\\n``, ``\\u202e``).

    A byte that is not UTF-8 (a surrogate from `os.fsdecode`) is written as that byte, e.g. ``\\xe9``.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def counted(number: int, what: str) -> str:
    """A number and its noun: ``1 rank``, ``4 ranks``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def byte_size(count: float) -> str:
    """A number of bytes in a unit that people read, e.g. ``1.44 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def quoted(text: str, length: int = 200) -> str:
    """`text` for an error message: printable and in quotation marks; beyond `length` characters its middle is left out."""
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
    """`value` as a cell of a csv file: printable, and never a formula (an apostrophe precedes what would be one).

    Numbers stay as they are. A text that begins with ``-`` or ``+`` also stays, unless a spreadsheet could evaluate it.
    """
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if _FORMULA.match(value) else printable(value)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Rows as the text of a csv file, one per line; every cell goes through :func:`cell`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([cell(value) for value in row])
    return out.getvalue()


def markdown(text: str) -> str:
    """`text` for a Markdown document: printable, with tags, table borders, links and code escaped."""
    return _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0]) or f"\\{match[0]}", printable(text))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Text in columns: the first `left` flush left, the others flush right. Cells may come from strangers."""
    cleaned = [[printable(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cleaned) for i in range(len(header))]
    lines = []
    for row in cleaned:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
