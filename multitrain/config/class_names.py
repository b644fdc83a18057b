"""Names of classes from a file: the formats that the three datasets' authors and PySlowFast use.

* one name a line, line n (from 0) naming label n (``classes.txt``);
* ``name,label`` a line (Moments-in-Time's ``moments_categories.txt``);
* JSON: a list of names, or an object of name → label (Something-Something's ``labels.json``, PySlowFast's
  ``kinetics_classnames.json`` with its doubled quotation marks) or label → name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain.config.errors import ConfigError

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
"""Files in an annotation folder that are taken for a dataset's class names, in this order."""

_NUMBERED = re.compile(r"(.*?)\s*[,;\t]\s*(\d+)")


def read_class_names(file: Path) -> list[str]:
    """The names by label.

    Raises:
        ConfigError: not readable, or labels that are not 0, 1, 2 …
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text ({error}); it holds one class name a line") from error
    return _of_json(file, text) if file.suffix == ".json" else _of_lines(text)


def find_class_names(folder: Path, classes: int) -> list[str] | None:
    """The names in the first file of :data:`LOOKED_FOR` in `folder` that has `classes` of them; None without one."""
    for file in (folder / name for name in LOOKED_FOR):
        if file.is_file():
            try:
                names = read_class_names(file)
            except ConfigError:  # another file of that name; names are for display, and numbers do as well
                continue
            if len(names) == classes:
                return names
    return None


def _of_lines(text: str) -> list[str]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    labels = [int(m.group(2)) for m in numbered if m]
    if names and sorted(labels) == list(range(len(names))):
        return [name for _, name in sorted((int(m.group(2)), m.group(1)) for m in numbered if m)]
    return names


def _of_json(file: Path, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); use a list of names, or an object of name: label") from None
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return found
    if isinstance(found, dict) and (names := _of_object(found)) is not None:
        return names
    raise ConfigError(f"{file}: neither a list of names nor an object with the labels 0, 1, 2 …; correct the file")


def _of_object(found: Mapping[str, Any]) -> list[str] | None:
    """Names by label of ``{name: label}`` or ``{label: name}``, or None when the labels are not 0, 1, 2 …"""
    for pairs in (found.items(), ((v, k) for k, v in found.items())):
        by_label = {int(label): str(name) for name, label in pairs if str(label).isdigit()}
        if len(found) and sorted(by_label) == list(range(len(found))):
            return [by_label[label].strip().strip('"') for label in range(len(found))]
    return None


__all__ = ["LOOKED_FOR", "find_class_names", "read_class_names"]
