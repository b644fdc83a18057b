"""A map from a head's classes to those of another dataset, to test a model on a dataset that it was not trained on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError, nearest
from multitrain.config.reading import read_text, shown
from multitrain.evaluation.shards import Scores

HEADER = ("head", "dataset")
LARGEST = 1 << 24


@dataclass(frozen=True)
class ClassMap:
    """For every class of a head the class of the dataset that it stands for; several may stand for one."""

    targets: np.ndarray
    """int64 [classes of the head]; -1 for a class that stands for none."""
    classes: int
    """Classes of the dataset."""

    def scores(self, scores: Scores) -> Scores:
        """float32 [N, classes of the head] → [N, classes of the dataset]: the sum over the classes that stand for one."""
        out = np.zeros((len(scores), self.classes), np.float64)
        for source in np.flatnonzero(self.targets >= 0):
            out[:, self.targets[source]] += scores[:, source]
        return out.astype(np.float32)

    @property
    def covered(self) -> np.ndarray:
        """bool [classes of the dataset]: whether a class of the head stands for it."""
        return np.isin(np.arange(self.classes), self.targets)

    def measured(self, labels: Sequence[tuple[int, ...]]) -> np.ndarray:
        """bool [N]: the videos all of whose labels are covered; only they can be right."""
        covered = self.covered
        return np.array([bool(row) and all(covered[label] for label in row) for row in labels], bool)

    def describe(self, names: Sequence[str] | None, measured: int) -> dict[str, Any]:
        """For the result file."""
        covered = self.covered
        missing = [names[i] if names else str(i) for i in np.flatnonzero(~covered).tolist()]
        return {"measured": measured, "covered_classes": int(covered.sum()), "unmapped_classes": missing}


def read_class_map(
    file: Path,
    head: str,
    head_names: Sequence[str] | None,
    head_classes: int,
    dataset: str,
    names: Sequence[str] | None,
    classes: int,
) -> ClassMap:
    """Read a csv or tsv with a line for each class of the head that has an equivalent: ``class of the head,class of the dataset``,
    each by name or number; the first line may be ``head,dataset``.

    Raises:
        ConfigError: the file cannot be read, or names a class that does not exist, or one of the head twice; with file and line.
    """
    text = read_text(file, LARGEST)
    rows = list(csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ","))
    targets = np.full(head_classes, -1, np.int64)
    for number, row in enumerate(rows, 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and tuple(cell.lower() for cell in cells) == HEADER):
            continue
        if len(cells) != 2:
            raise ConfigError(
                f"{file}:{number}: {len(cells)} columns; write `class of {head},class of {dataset}`, names with commas in quotation marks"
            )
        source = _label(cells[0], head_names, head_classes, f"{file}:{number}", head)
        target = _label(cells[1], names, classes, f"{file}:{number}", dataset)
        if targets[source] >= 0:
            raise ConfigError(
                f"{file}:{number}: class {shown(cells[0], 60)!r} of {head} is mapped twice; it can stand for one class only"
            )
        targets[source] = target
    if (targets < 0).all():
        raise ConfigError(f"{file}: maps no class; write `class of {head},class of {dataset}` lines")
    return ClassMap(targets, classes)


def _label(text: str, names: Sequence[str] | None, classes: int, where: str, of: str) -> int:
    if names and text in names:
        return names.index(text)
    if text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < classes:
        return int(text)
    hint = nearest(text, names) if names else f"its class names are not known here: use 0 to {classes - 1}"
    raise ConfigError(f"{where}: {of} has no class {shown(text, 60)!r}; {hint}")
