"""Find problems of a dataset: decode every listed file, and compare every line with every other.

There are seven kinds of findings:

missing       the file does not exist
broken        it cannot be decoded to its end; the reason is given
short         it has fewer frames than the minimum
outside       no frame is shown in the line's segment, or the segment ends more than a second after the video
duplicate     an earlier line of the same file has the same path or the same video, with the same segment and labels
labelled twice   the same path or the same video, with the same segment, has other labels in another line of the dataset
leak          a training video is also a test or validation video, of this or another dataset; of segments, one that overlaps
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from multitrain.config import DatasetConfig
from multitrain.config.class_names import LARGEST
from multitrain.config.reading import read_bytes
from multitrain.data.annotations import CatalogError, Syntax, line_text, lines, read_annotations
from multitrain.data.presence import segment_columns
from multitrain.data.segment import Segment, named
from multitrain.data.tools.listing import found_below
from multitrain.files import OutputFolder
from multitrain.text import csv_text, printable, table

KINDS = ("missing", "broken", "short", "outside", "duplicate", "labelled twice", "leak")
SPLITS = ("train", "val", "test")
TABLE = "check.csv"
_LATE = 1.0  # seconds by which a segment may end after the video, as the rounded times of many annotation files do
_LOOKS_LIKE_SEGMENT = "no such file; for 'path start end label' lines set data.datasets.{}.segments=true"
_COLUMNS = ["dataset", "split", "annotations", "line", "path", "labels", "kind", "detail"]


class Entry(NamedTuple):
    """One line of an annotation file, or one file of a folder."""

    dataset: str
    split: str
    """``train``, ``val`` or ``test``; empty for a folder without annotations."""
    csv: str
    line: int
    path: str
    """The path as written in the file."""
    file: str
    """The file that the path names."""
    labels: tuple[int, ...]
    segment: Segment | None = None
    """The part of the file; None for the complete file."""

    @property
    def name(self) -> str:
        """The path with the segment."""
        return named(self.path, self.segment)

    @property
    def place(self) -> str:
        """The annotation file and line, for messages."""
        return f"{os.path.basename(self.csv)}:{self.line}" if self.line else self.path


class Finding(NamedTuple):
    """A problem of an entry."""

    entry: Entry
    kind: str
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """All entries, and the problems found."""

    entries: Sequence[Entry]
    findings: Sequence[Finding]

    def counts(self) -> dict[tuple[str, str], Counter[str]]:
        """Counts by dataset and split: ``videos``, ``good``, and the entries of each kind."""
        out: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for e in self.entries:
            out[e.dataset, e.split]["videos"] += 1
        for key, number in Counter((f.entry.dataset, f.entry.split, f.kind) for f in self.findings).items():
            out[key[:2]][key[2]] += number
        bad = {f.entry for f in self.findings}
        for key2, number in Counter((e.dataset, e.split) for e in self.entries if e not in bad).items():
            out[key2]["good"] = number
        return dict(out)

    def table(self, shown: int = 20) -> str:
        """A text table of the counts, and the first findings."""
        header = ["dataset", "split", "videos", "good", *KINDS]
        rows = [[d, s or "-", *(str(c[k]) for k in header[2:])] for (d, s), c in self.counts().items()]
        text = [table(header, rows, left=2)]
        list_entries = [
            printable(f"{f.kind}: {named(f.entry.file, f.entry.segment)} ({f.entry.place}): {f.detail}")
            for f in self.findings[:shown]
        ]
        more = len(self.findings) - len(list_entries)
        return "\n".join(
            [*text, *([""] if list_entries else []), *list_entries, *([f"… and {more} more"] if more > 0 else [])]
        )

    def csv(self) -> str:
        """All findings as csv: dataset, split, annotations, line, path, labels, kind, detail."""
        rows: list[list[object]] = [list(_COLUMNS)]
        for f in self.findings:
            e = f.entry
            labels = " ".join(map(str, e.labels))
            rows.append([e.dataset, e.split, e.csv, e.line or "", e.name, labels, f.kind, f.detail])
        return csv_text(rows)


# ---------------------------------------------------------------------------------------------------------- entries


def list_entries(datasets: Mapping[str, DatasetConfig]) -> list[Entry]:
    """The lines of all annotation files of `datasets`. Raises CatalogError: a dataset has none, or one cannot be read."""
    out = []
    for name, dataset in datasets.items():
        folder = Path(dataset.annotations)
        files = {split: folder / f"{split}.csv" for split in SPLITS}
        there = {split: file for split, file in files.items() if os.path.lexists(file)}
        if not there:
            raise CatalogError(f"{folder}: no train.csv, val.csv or test.csv; set data.datasets.{name}.annotations")
        for split, file in there.items():
            out += [
                Entry(name, split, str(file), number, path, os.path.join(dataset.videos, path), labels, segment)
                for number, path, labels, segment in _read(file, Syntax.of(dataset, file))
            ]
    return out


def entries_in_folder(folder: Path) -> list[Entry]:
    """All video files below a folder, without labels. Raises CatalogError."""
    return [Entry(folder.name, "", "", 0, path, str(folder / path), ()) for path in found_below(folder)]


def _read(file: Path, syntax: Syntax) -> Iterator[tuple[int, str, tuple[int, ...], Segment | None]]:
    for line in lines(read_annotations(file), file, syntax):
        yield line.number, os.fsdecode(line.path), tuple(line.labels), line.segment


# ---------------------------------------------------------------------------------------------------------- findings


def find_problems(entries: Sequence[Entry], scans: Mapping[str, Mapping[str, Any]], min_frames: int) -> CheckReport:
    """Find the problems of `entries`.

    Args:
        scans: the record of `multitrain.data.tools.scan.ScanFile` by file.
        min_frames: videos with fewer frames are short.
    """
    found = [f for e in entries if (f := _problem_of(e, scans[e.file], min_frames)) is not None]
    found += _duplicates_and_leaks(entries, _contents({e.file: scans[e.file] for e in entries}))
    order = {entry: number for number, entry in enumerate(entries)}
    return CheckReport(entries, sorted(found, key=lambda f: (order[f.entry], KINDS.index(f.kind))))


def _contents(scans: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A key by file that is equal for the same video under two names; the key of an unreadable file is its path.

    Records of earlier versions hold the number of shown frames, not which frames are hidden. Such a record gets the key of a
    newer record with the same frames.
    """
    same = {file: f"{scan['digest']} {scan['frames']}" for file, scan in scans.items() if "digest" in scan}
    told = {same[file]: str(scans[file]["hidden"]) for file in same if "hidden" in scans[file]}
    return {
        file: f"{same[file]} {scan.get('hidden', told.get(same[file], ''))}" if file in same else os.path.normpath(file)
        for file, scan in scans.items()
    }


def _problem_of(entry: Entry, scan: Mapping[str, Any], min_frames: int) -> Finding | None:
    if "error" in scan:
        if scan.get("kind") == "missing" and entry.path and segment_columns(entry.path, _folder_of(entry)) is not None:
            return Finding(
                entry,
                "missing",
                _LOOKS_LIKE_SEGMENT.format(entry.dataset),
            )
        return Finding(entry, str(scan.get("kind", "broken")), str(scan["error"]))
    frames = scan["frames"]
    if entry.segment is not None:
        outside, frames = _in_segment(entry.segment, scan)
        if outside:
            return Finding(entry, "outside", outside)
    if frames < min_frames:
        return Finding(entry, "short", f"{'1 frame' if frames == 1 else f'{frames} frames'}, not {min_frames} or more")
    return None


def _folder_of(entry: Entry) -> Path:
    return Path(entry.file[: -len(entry.path)] or "/")


def _in_segment(segment: Segment, scan: Mapping[str, Any]) -> tuple[str, int]:
    """(in what way the segment is outside the video, or an empty string; its number of frames at the average rate)."""
    begin, step = scan.get("begin", 0.0), 1 / scan["fps"]
    last = scan.get("last") or begin + (scan["frames"] - 1) * step
    if segment.start > last or segment.end <= begin:
        return f"the video's frames are shown at {begin:.2f} to {last:.2f} s", 0
    if segment.end > last + step + _LATE:
        return f"it ends at {segment.end:g} s, the video at {last + step:.2f} s", 0
    return "", max(1, round((min(segment.end, last + step) - max(segment.start, begin)) / step))


def _duplicates_and_leaks(entries: Iterable[Entry], content: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about entries that are the same video, by path or by content."""
    same: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        same[content[entry.file]].append(entry)
    for group in (g for g in same.values() if len(g) > 1):
        firsts: dict[tuple[str, str, Segment | None], Entry] = {}
        for entry in group:
            first = firsts.setdefault(
                (*((entry.dataset, entry.split) if entry.split else ("", "")), entry.segment), entry
            )
            if first is not entry and first.labels == entry.labels:
                yield Finding(entry, "duplicate", _as(entry, first))
            twins = (e for e in group if (e.dataset, e.segment) == (entry.dataset, entry.segment))
            other = next((e for e in twins if e.labels != entry.labels), None)
            if other is not None:
                yield Finding(entry, "labelled twice", f"label {_shown(entry)} here, {_shown(other)} as {other.place}")
            seen = next((e for e in group if e.split in ("val", "test") and _overlap(e.segment, entry.segment)), None)
            if entry.split == "train" and seen is not None:
                yield Finding(entry, "leak", f"{_as(entry, seen)} of {seen.dataset}'s {seen.split} set")


def _overlap(one: Segment | None, other: Segment | None) -> bool:
    return one is None or other is None or (one.start < other.end and other.start < one.end)


def _as(entry: Entry, other: Entry) -> str:
    return (
        f"the same line as {other.place}"
        if entry.file == other.file
        else f"the same video as {other.name} ({other.place})"
    )


def _shown(entry: Entry) -> str:
    return ",".join(map(str, entry.labels))


def clean_folder(datasets: Mapping[str, DatasetConfig], out: Path) -> OutputFolder:
    """The folder for :func:`write_clean`. Raises ConfigError if a file is in the way that no earlier call made."""
    names = [f"{split}.csv" for split in SPLITS] + ["classes.txt"]
    read = [Path(d.annotations) / name for d in datasets.values() for name in names]
    folder = OutputFolder(out, "data check --write-clean", [*read, *(d.annotations for d in datasets.values())])
    for dataset, name in itertools.product(datasets, names[:3]):
        folder.check(f"{dataset}/{name}")
    return folder


def write_clean(report: CheckReport, datasets: Mapping[str, DatasetConfig], out: OutputFolder) -> dict[str, int]:
    """Write ``OUT/DATASET/{train,val,test}.csv`` without the lines that have a problem, and the class names.

    The first of several duplicates is kept. All lines of a video that is labelled twice are left out, because the right label is unknown. A
    leak is removed from the training set.

    Returns:
        Number of lines left out, by file.
    """
    bad = {f.entry for f in report.findings}
    left_out = {}
    for name, dataset in datasets.items():
        for split in SPLITS:
            listed_here = [e for e in report.entries if (e.dataset, e.split) == (name, split)]
            if not listed_here:
                continue
            kept = [e for e in listed_here if e not in bad]
            text = "".join(line_text(e.path, e.segment, e.labels, dataset.separator) for e in kept)
            left_out[str(out.write_text(f"{name}/{split}.csv", text))] = len(listed_here) - len(kept)
        names = Path(dataset.annotations) / "classes.txt"
        if names.is_file():
            out.write_bytes(f"{name}/classes.txt", read_bytes(names, LARGEST))
    return left_out


def is_table(content: bytes) -> bool:
    """Whether a file is a table of findings by an earlier version, which kept no record of its files."""
    return content.startswith(",".join(_COLUMNS).encode() + b"\n")
