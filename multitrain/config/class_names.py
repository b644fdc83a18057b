"""Read class names from a file, in the formats that authors of datasets and their tools write.

* one name per line, line n (from 0) naming label n (``classes.txt``);
* ``name,label`` or ``label,name`` per line, with commas, semicolons or tabs, with or without a header line (Moments-in-Time's
  ``moments_categories.txt``, lists as ``id,name``), or ``label name`` with a space;
* JSON: a list of names, of ``{"id": …, "name": …}``, or an object of name → label (Something-Something's ``labels.json``,
  PySlowFast's ``kinetics_classnames.json`` with its doubled quotation marks) or label → name, bare or under ``id2label``,
  ``label2id``, ``classes`` or ``names``.

Labels are 0, 1, 2 …; a list with other numbers is refused, never renumbered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multitrain.config.errors import ConfigError
from multitrain.config.reading import LARGEST_YAML, parse_json, read_text, shown

LOOKED_FOR = (
    "classes.txt",
    "class_names.txt",
    "classnames.txt",
    "class_names.json",
    "classnames.json",
    "kinetics_classnames.json",
    "moments_categories.txt",
    "something-something-v2-labels.json",
    "labels.json",
)
"""Names of files in an annotation folder that may hold a dataset's class names, in the order in which they are tried."""

LARGEST = 16 * LARGEST_YAML
"""Limit of a class list, in bytes."""

_NAME_FIRST = re.compile(r"(?P<name>.+?)\s*[,;\t]\s*(?P<label>[0-9]{1,9})", re.ASCII)
_LABEL_FIRST = re.compile(r"(?P<label>[0-9]{1,9})\s*[,;\t]\s*(?P<name>.+)", re.ASCII)
_LABEL_BLANK = re.compile(r"(?P<label>[0-9]{1,9})\s+(?P<name>.+)", re.ASCII)
_HEADER = re.compile(r"\W*(\w*(id|index|idx|number|label|name|class|category|action)\w*|\W+)\W*", re.IGNORECASE)
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[\"\[{\]])")
"""Beginning of a JSON text, whatever the file's extension."""
_WRAPPERS = ("id2label", "label2id", "classes", "class_names", "names", "categories", "labels")


def read_class_names(file: Path) -> list[str]:
    """The class names in the order of their labels.

    Raises:
        ConfigError: the file cannot be read, or its labels are not 0, 1, 2 … each once; one line with the file and the remedy.
    """
    text = read_text(file, LARGEST)
    if file.suffix == ".json" or _JSON.match(text):
        return _of_json(file, parse_json(text, file, unique=True))
    return _of_lines(file, text)


def class_list_text(names: Sequence[str]) -> str:
    """The content of a file from which :func:`read_class_names` reads these names: a line each, or JSON for names such as ``1 run``,
    which would be taken for a label and a name."""
    text = "".join(f"{name}\n" for name in names)
    try:
        plain = not _JSON.match(text) and _of_lines(Path(), text) == list(names)
    except ConfigError:
        plain = False
    return text if plain else json.dumps(list(names), ensure_ascii=False) + "\n"


def repeated_name(names: Sequence[str]) -> str:
    """A clause about the first name that two classes share; empty when all names differ."""
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if first.setdefault(name, label) != label:
            return f"{shown(name, 60)!r} is the name of labels {first[name]} and {label}"
    return ""


def find_class_names(folder: Path, classes: int) -> list[str] | None:
    """The names in the first file of :data:`LOOKED_FOR` in `folder` with exactly `classes` names; None without such a file."""
    for file in (folder / name for name in LOOKED_FOR):
        if file.is_file():
            try:
                names = read_class_names(file)
            except ConfigError:  # an unrelated file of that name; without names, labels are displayed
                continue
            if len(names) == classes:
                return names
    return None


def _of_lines(file: Path, text: str) -> list[str]:
    ends = "\n" if "\n" in text else "\r"
    lines = [line.strip() for line in text.rstrip().split(ends)] if text.strip() else []
    for pattern in (_NAME_FIRST, _LABEL_FIRST, _LABEL_BLANK):
        for skipped in (0, 1):
            found = [pattern.fullmatch(line) for line in lines[skipped:]]
            if not found or not all(found) or (skipped and not _is_header(lines[0])):
                continue
            pairs = [(int(m["label"]), _unquoted(m["name"])) for m in found if m]
            if pattern is _LABEL_BLANK and sorted(label for label, _ in pairs) not in (
                list(range(len(pairs))),
                list(range(1, len(pairs) + 1)),
            ):
                continue  # names such as "400 m run"
            return _by_label(file, pairs)
    if "" in lines:
        raise ConfigError(
            f"{file}:{lines.index('') + 1}: an empty line between names, where line n names label n; remove it, "
            "or write 'label,name' lines"
        )
    return lines


def _is_header(line: str) -> bool:
    cells = re.split(r"[,;\t ]", line)
    return len(cells) >= 2 and all(not cell or _HEADER.fullmatch(cell) for cell in cells)


def _unquoted(name: str) -> str:
    name = name.strip()
    return name[1:-1].replace('""', '"') if len(name) > 1 and name[0] == name[-1] == '"' else name


def _of_json(file: Path, found: Any) -> list[str]:
    if isinstance(found, dict):
        wrapper = next((w for w in _WRAPPERS if isinstance(found.get(w), (dict, list))), None)
        found = found[wrapper] if wrapper else found
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return list(found)
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        pairs = [(_label(e.get("id", e.get("label"))), e.get("name")) for e in found]
        if all(label is not None and isinstance(name, str) for label, name in pairs):
            return _by_label(file, [(label, name) for label, name in pairs if label is not None])
    if isinstance(found, dict) and (numbered := _pairs(found)) is not None:
        return _by_label(file, [(label, name.strip().strip('"')) for label, name in numbered])
    raise ConfigError(
        f"{file}: neither a list of names nor an object with the labels 0, 1, 2 …; write "
        '["name of 0", "name of 1", …] or {"name": label}'
    )


def _pairs(found: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    """Label and name of each entry of ``{name: label}`` or ``{label: name}``; None if `found` has neither form."""
    ways: tuple[Iterable[tuple[Any, Any]], ...] = (((v, k) for k, v in found.items()), found.items())
    for pairs in ways:
        numbered = [(_label(label), name) for label, name in pairs]
        if numbered and all(label is not None and isinstance(name, (str, int)) for label, name in numbered):
            return [(label, str(name)) for label, name in numbered if label is not None]
    return None


def _label(value: Any) -> int | None:
    """A label: an integer below a billion, or its ASCII digits (not ``²``); None for other values."""
    return int(value) if not isinstance(value, bool) and re.fullmatch("[0-9]{1,9}", str(value), re.ASCII) else None


def _by_label(file: Path, pairs: Sequence[tuple[int, str]]) -> list[str]:
    """The names in the order of their labels. Raises ConfigError if the labels are not 0, 1, 2 …"""
    names: dict[int, str] = {}
    for label, name in pairs:
        if names.setdefault(label, name) is not name:
            raise ConfigError(f"{file}: label {label} is {shown(names[label], 60)!r} and {shown(name, 60)!r}; keep one")
    if sorted(names) == list(range(1, len(names) + 1)):
        raise ConfigError(
            f"{file}: labels are numbered from 1, and labels start at 0 here; subtract 1 from every label, in this list "
            "and in the annotation files"
        )
    missing = next((label for label in range(len(names)) if label not in names), None)
    if missing is not None:
        raise ConfigError(
            f"{file}: neither a list of names nor the labels 0 to {len(names) - 1}: no name for label {missing}, but one "
            f"for {max(names)}; correct the file"
        )
    return [names[label] for label in range(len(names))]
