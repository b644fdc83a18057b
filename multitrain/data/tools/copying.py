"""The job of `data resize`: selects the copies to make, keep or adopt, writes the journal, and the final tables."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitrain.config.class_names import LARGEST
from multitrain.config.reading import read_bytes
from multitrain.data.tools.listing import PARTS, AnnotationFiles, Copy, Layout, copies, located, segments
from multitrain.data.tools.parallel_map import FINAL, Journal, Shard, version
from multitrain.data.tools.resize import Encoding, Item, clean_parts, stamps
from multitrain.errors import ConfigError
from multitrain.files import InTheWayError, OutputFolder
from multitrain.text import csv_text

TABLE = "resize.csv"
COLUMNS = ["source", "copy", "state", "reason", "frames", "width", "height", "bytes"]
Record = dict[str, Any]


@dataclass(frozen=True)
class CopyOptions:
    """Options of the command."""

    videos: Path
    out: Path
    encoding: Encoding
    annotations: Path | None = None
    write_annotations: Path | None = None
    segments: Path | None = None
    separator: str = " "
    segment_lines: bool = False
    """Whether lines of annotation files may be ``path start end label``."""
    adopt: bool = False
    """Whether to adopt existing files of other origin if they are the requested copies."""


class CopyJob:
    """The copies of one command, or of one shard of it.

    Args:
        wanted: the options; folders are absolute.
        shard: the part of the copies to make.

    Raises:
        ConfigError: the job cannot start; nothing but journals was written.
    """

    def __init__(self, wanted: CopyOptions, shard: Shard) -> None:
        self.wanted, self._shard = wanted, shard
        layout = Layout(wanted.videos, wanted.out)
        self.annotations = None
        if wanted.annotations:
            self.annotations = AnnotationFiles(wanted.annotations, wanted.separator, segments=wanted.segment_lines)
        read = [*(self.annotations.files.values() if self.annotations else ()), *filter(None, [wanted.segments])]
        self.renamed: dict[str, str] = {}
        if wanted.segments:
            self.copies = segments(layout, wanted.segments)
            if self.annotations:
                self.renamed = {entry.path: os.path.normpath(entry.path) for entry in self.annotations.listed()}
        else:
            listed = self.annotations.listed() if self.annotations else layout.found()
            self.copies, self.renamed = copies(layout, listed)
        self.out = OutputFolder(wanted.out, "data resize", [wanted.videos, *read], known=self._known)
        self.annotations_out = self._annotations_out([*read, *filter(None, [wanted.annotations])])
        self._parts = self.out.folder(PARTS)
        self.journal = Journal(self._parts, "resize", shard)
        self._earlier: dict[str, int] = {}
        self._earlier = self._earlier_sizes()
        clean_parts(self._parts)
        self._versions: dict[str, list[object]] = {}
        self.before: Counter[str] = Counter()
        """Number of copies that `items` does not yield, by the message about them."""

    def _annotations_out(self, read: list[Path]) -> OutputFolder | None:
        if self.wanted.write_annotations is None or self.annotations is None:
            return None
        return annotations_folder(self.wanted.write_annotations, self.annotations, self.renamed, read)

    def _earlier_sizes(self) -> dict[str, int]:
        """Size in bytes by copy, from the table of an earlier version, which is saved before it is replaced."""
        table, kept = self.out.check(TABLE, recognise=_is_table), f"{PARTS}/earlier.csv"
        if table.is_file() and not self.out.is_own(TABLE):
            self.out.write_bytes(kept, table.read_bytes())
        try:
            text = self.out.target(kept).read_text(encoding="utf-8", errors="surrogateescape")
            rows = list(csv.DictReader(text.splitlines()))
            return {r["copy"]: int(r["bytes"]) for r in rows if (r["bytes"] or "").isdigit() and len(r["bytes"]) < 16}
        except (OSError, csv.Error):
            return {}

    def _known(self, target: str) -> list[Record]:
        """Records by which a copy is recognised: one for each time it was made, and that of an earlier version's table."""
        table = [{"bytes": self._earlier[target]}] if target in self._earlier else []
        return [*stamps(self.journal.all_of(target)), *table]

    # ------------------------------------------------------------------------------------------------------------ work

    def items(self) -> Iterator[Item]:
        """The copies that this shard has to make or check. Records a failure for each copy whose path is occupied."""
        self.before = Counter()
        for copy in self._shard.of(self.copies):
            at = self._versions[copy.target] = self._version(copy)
            record = self.journal.get(copy.target, at)
            if record is not None and self._is_done(copy, record):
                self.before["failed before" if "error" in record else "are done already"] += 1
                continue
            try:
                yield Item(copy, self._there(copy, record))
            except ConfigError as error:
                self._note(copy, {"error": str(error), FINAL: False})
                self.before["have another file in the place of the copy"] += 1

    def done(self, item: Item, answer: Record) -> bool:
        """Record a worker's result in the journal and move the copy to its path; return whether it succeeded."""
        record, part = dict(answer), answer.get("part")
        if "error" in record:
            record.setdefault(FINAL, True)
        if part is None:
            self._note(
                item.copy, {**record, "adopted": True} if item.there == "foreign" and "bytes" in record else record
            )
            return "error" not in record
        del record["part"]
        try:
            self._refuse_source(item.copy)
            self.out.place(self._parts / part, item.copy.target, note=lambda _: self._note(item.copy, record))
        except InTheWayError as error:
            (self._parts / part).unlink(missing_ok=True)
            self._note(item.copy, {"error": str(error), FINAL: False})
            return False
        return True

    def _note(self, copy: Copy, record: Record) -> None:
        self.journal.add(copy.target, self._versions[copy.target], {"source": copy.source, **record})

    def _version(self, copy: Copy) -> list[object]:
        """The version of a copy: its source and encoding. A copy of another version is made again."""
        source = version(located(self.wanted.videos / copy.source))
        return [source, self.wanted.encoding.version(), copy.segment and list(copy.segment)]

    def _is_done(self, copy: Copy, record: Record) -> bool:
        """Whether a copy is complete. Failures and copies of earlier versions, whose records lack a field, are checked again."""
        if "error" in record:
            return bool(record.get(FINAL, False))
        return "digest" in record and _size(self.out.root / copy.target) == record["bytes"]

    def _there(self, copy: Copy, record: Record | None) -> str:
        """The value of `Item.there`. Raises ConfigError if something is in the way."""
        self._refuse_source(copy)
        try:
            if not os.path.lexists(path := self.out.check(copy.target)):
                return ""
        except InTheWayError:
            if self.wanted.adopt and self.out.target(copy.target).is_file():
                return "foreign"
            raise
        earlier = record is not None and "digest" not in record and "error" not in record
        return "ours" if earlier or (not self.journal.all_of(copy.target) and self._is_younger(copy, path)) else ""

    def _is_younger(self, copy: Copy, path: Path) -> bool:
        source = located(self.wanted.videos / copy.source)
        return os.path.exists(source) and source.stat().st_mtime_ns < path.stat().st_mtime_ns

    def _refuse_source(self, copy: Copy) -> None:
        source, path = located(self.wanted.videos / copy.source), self.out.target(copy.target)
        if os.path.exists(source) and os.path.exists(path) and os.path.samefile(source, path):
            raise InTheWayError(
                f"{path} is the video itself, under another name; move it away, or choose another folder"
            )

    # ---------------------------------------------------------------------------------------------------------- tables

    def results(self) -> dict[str, Record | None]:
        """The record by copy, of all shards; None for a copy that is not made yet."""
        self.journal.refresh()
        return {c.target: self.journal.get(c.target, self._version(c)) for c in self.copies}

    def write_table(self, results: dict[str, Record | None]) -> Path:
        """Write ``resize.csv``, with one row per video; return its path. Raises ConfigError."""
        rows: list[list[object]] = [list(COLUMNS)]
        for copy in self.copies:
            if (made := results[copy.target]) is not None:
                state = "failed" if "error" in made else "damaged" if "damage" in made else "good"
                reason = made.get("error") or made.get("damage", "")
                rows.append([copy.source, copy.target, state, reason, *(made.get(k, "") for k in COLUMNS[4:])])
        return self.out.write_text(TABLE, csv_text(rows), recognise=_is_table)

    def write_annotations(self, results: dict[str, Record | None]) -> list[str]:
        """Write the annotation files with the names of the copies; return one line per file. Raises ConfigError."""
        if self.annotations is None or self.annotations_out is None:
            return []
        good = {target for target, made in results.items() if made is not None and "error" not in made}
        made = {path: target if target in good else None for path, target in self.renamed.items()}
        return write_annotations(self.annotations, made, self.annotations_out)


def annotations_folder(
    folder: Path, annotations: AnnotationFiles, renamed: Mapping[str, str], read: Iterable[Path | None]
) -> OutputFolder:
    """The folder for `write_annotations`. Raises ConfigError if a file is in the way that no earlier call made.

    Args:
        renamed: the name of the copy by listed path.
        read: what is only read.
    """
    inputs = [*annotations.files.values(), *filter(None, read)]
    out = OutputFolder(folder, "data resize --write-annotations", inputs)
    for split in annotations.files:
        whole = annotations.rewritten(split, renamed)[0].encode(errors="surrogateescape")
        out.check(f"{split}.csv", recognise=whole.__eq__)
    return out


def write_annotations(annotations: AnnotationFiles, made: dict[str, str | None], out: OutputFolder) -> list[str]:
    """Write annotation files with the names of copies; return one line per file. `made` as for `AnnotationFiles.rewritten`."""
    said = []
    for split in annotations.files:
        text, lost = annotations.rewritten(split, made)
        file = out.write_text(f"{split}.csv", text)
        said.append(f"{file}: {text.count(chr(10))} videos, {lost} left out")
    if (names := annotations.class_names) is not None:
        out.write_bytes("classes.txt", read_bytes(names, LARGEST))
    return said


def _is_table(content: bytes) -> bool:
    """Whether a file is a table by an earlier version, which kept no record of its files."""
    return content.startswith(",".join(COLUMNS).encode() + b"\n")


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return -1
