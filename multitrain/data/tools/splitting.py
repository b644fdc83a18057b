"""Divide videos into train, val and test by a keyed hash of their names, so that an added file moves no other one.

The unit is a group of videos, by default each video alone: a person, a recording, a source video. All videos of a group are in one
split. A class without a training video gets its group nearest to the training share; the names of these groups are kept, so that
they stay there when videos are added.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from multitrain.data.annotations import CatalogError
from multitrain.data.tools.importing import SPLITS, Sample
from multitrain.text import counted, quoted

KEY = b"multitrain split"
"""Key of the hash. Another key would be another division of everybody's videos."""
UNSPLIT = ""
"""The split of a video that is still to be divided."""
_SHOWN = 5


@dataclass(frozen=True)
class Division:
    """How videos are divided."""

    val: float = 0.15
    """Share of the groups in val."""
    test: float = 0.15
    """Share of the groups in test."""
    kept: Collection[str] = ()
    """Groups that stay in train, from an earlier import into the same folder."""

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise CatalogError(
                f"--val {self.val:g} --test {self.test:g}: shares of 0 or more that leave some for training; e.g. 0.15 and 0.15"
            )

    def of(self, group: str) -> str:
        """The split of a group: a function of its name alone."""
        place = position(group)
        return "test" if place < self.test else "val" if place < self.test + self.val else "train"


@dataclass
class Divided:
    """Videos with their splits."""

    samples: list[Sample]
    kept: list[str] = field(default_factory=list)
    """Groups that are in train because a class had no other training video."""
    notes: list[str] = field(default_factory=list)


def position(group: str) -> float:
    """The place of a group in [0, 1): uniform, and a function of its name alone."""
    digest = hashlib.blake2b(group.encode("utf-8", "surrogateescape"), key=KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def by_pattern(pattern: str) -> Callable[[str], str]:
    """The group of a path by a regular expression with one group, searched in the path. Raises CatalogError."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CatalogError(
            f"--group-by {quoted(pattern)}: no regular expression ({error}); e.g. '(person[0-9]+)'"
        ) from None
    if compiled.groups != 1:
        raise CatalogError(
            f"--group-by {quoted(pattern)}: has {compiled.groups} groups in parentheses, not one; e.g. '(person[0-9]+)'"
        )

    def group(path: str) -> str:
        found = compiled.search(path)
        if found is None or found[1] is None:
            raise CatalogError(
                f"--group-by {quoted(pattern)}: nothing in {quoted(path)} matches it; write a pattern that fits every path"
            )
        return found[1]

    return group


def divide(samples: Sequence[Sample], division: Division, groups: Mapping[str, str] | None = None) -> Divided:
    """Give every sample of the split :data:`UNSPLIT` its split.

    Args:
        samples: those with a split keep it.
        groups: the group of a path; a path that is not in it is a group of its own.

    Raises:
        CatalogError: videos of one group have different splits already.
    """
    groups = groups or {}
    fixed = refuse_leaks(samples, groups)
    names = {s.path: groups.get(s.path, s.path) for s in samples}
    free = {names[s.path] for s in samples if s.split == UNSPLIT} - set(fixed)
    where = fixed | {g: "train" if g in division.kept else division.of(g) for g in free}
    trained = {label for s in samples if s.split == "train" for label in s.labels}
    for label, members in _by_class(samples, names).items():
        candidates = sorted(members & free)
        if candidates and label not in trained and not any(where[g] == "train" for g in members):
            where[max(candidates, key=position)] = "train"
    placed = [s if s.split != UNSPLIT else replace(s, split=where[names[s.path]]) for s in samples]
    kept = sorted(g for g in free if where[g] == "train" != division.of(g))
    return Divided(placed, kept, _notes(placed, kept))


def _by_class(samples: Sequence[Sample], names: Mapping[str, str]) -> dict[str, set[str]]:
    """The groups that have to be divided, by class."""
    found: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.split == UNSPLIT:
            for label in sample.labels:
                found[label].add(names[sample.path])
    return dict(sorted(found.items()))


def refuse_leaks(samples: Sequence[Sample], groups: Mapping[str, str]) -> dict[str, str]:
    """The splits of the groups that have one already. Raises CatalogError for a group that has two."""
    first: dict[str, Sample] = {}
    for sample in samples:
        if sample.split == UNSPLIT or sample.path not in groups:
            continue
        group = groups[sample.path]
        other = first.setdefault(group, sample)
        if other.split != sample.split:
            raise CatalogError(
                f"group {quoted(group)} is in {other.split} ({quoted(other.path)}) and in {sample.split} "
                f"({quoted(sample.path)}); move its videos to one of them"
            )
    return {group: sample.split for group, sample in first.items()}


def _without(samples: Sequence[Sample], split: str) -> list[str]:
    """The classes that have a video, and none in `split`."""
    there = {label for s in samples if s.split == split for label in s.labels}
    return sorted({label for s in samples for label in s.labels} - there)


def _notes(samples: Sequence[Sample], kept: Sequence[str]) -> list[str]:
    notes = []
    if kept:
        notes.append(
            f"in train because their class has no other training video: {_listed(kept)}; they stay there when you import again"
        )
    classes = len({label for s in samples for label in s.labels})
    for split in SPLITS:
        if any(s.split == split for s in samples) and (missing := _without(samples, split)):
            notes.append(f"{split} has no video of {counted_classes(len(missing))}: {_listed(missing)}")
        count = sum(s.split == split for s in samples)
        if split != "train" and 0 < count < 2 * classes and any(s.split == "train" for s in samples):
            notes.append(
                f"{split} has {counted(count, 'video')} for {counted_classes(classes)}, so its accuracy says little; "
                f"--{split} SHARE takes more"
            )
    return notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(quoted, names[:_SHOWN])) + more


def counted_classes(number: int) -> str:
    """``1 class``, ``2 classes``."""
    return f"{number} class{'' if number == 1 else 'es'}"


def group_names(samples: Sequence[Sample], group: Callable[[str], str] | None) -> dict[str, str]:
    """The group of each path; without `group`, none."""
    return {} if group is None else {s.path: group(s.path) for s in samples}


def smallest_class(samples: Sequence[Sample]) -> tuple[str, int]:
    """The class with the fewest videos, and their number."""
    counts: dict[str, int] = defaultdict(int)
    for sample in samples:
        for label in sample.labels:
            counts[label] += 1
    return min(counts.items(), key=lambda item: (item[1], item[0]))
