"""`data pack` and `data unpack`: write videos to tar shards with one index, and back to files.

A worker writes a shard under a temporary name below ``OUT/.parts``. The command then records it in its journal and renames it, as
`data resize` does with copies. The index is written after the last shard, so that a folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from multitrain.data.annotations import CatalogError
from multitrain.data.packs import (
    BLOCK,
    INDEX,
    DamagedError,
    Stored,
    forget,
    header,
    index_parts,
    os_error_text,
    read_stored,
)
from multitrain.data.tools.listing import PARTS, AnnotationFiles, Layout, Listed
from multitrain.data.tools.parallel_map import Journal, Shard
from multitrain.data.tools.resize import clean_parts, make_durable, stamps
from multitrain.errors import ConfigError
from multitrain.files import InTheWayError, OutputFolder
from multitrain.order.windows import scatter
from multitrain.text import printable, quoted

Record = dict[str, Any]
_AT_ONCE = 8 << 20  # bytes


class Item(NamedTuple):
    """A shard to write."""

    target: str
    names: tuple[str, ...]
    """Video paths relative to their folder."""
    known: Record | None
    """The journal's record of the shard, if the shard exists."""


@dataclass(frozen=True)
class PackShard:
    """Writes one shard; a function for `map_resumable` whose item is an :class:`Item`.

    Returns:
        ``part``: name of the finished shard below `PARTS`; ``offsets``, ``sizes``, ``crcs`` of its videos (None for those left out);
        ``left_out``: [name, reason] of each; ``sources``: a digest of the names, sizes and times of the files. Or the existing
        record, if nothing changed. Or ``error`` and ``unreadable``: [name, reason] of each.
    """

    videos: Path
    parts: Path
    leave_out: bool

    def __call__(self, item: Item) -> Record:
        unreadable = {name: why for name in item.names if (why := _unreadable(self.videos / name))}
        if unreadable and not self.leave_out:
            return {"error": f"{len(unreadable)} of its videos cannot be read", "unreadable": [*unreadable.items()]}
        sources = self._sources(item.names)
        if item.known is not None and item.known["sources"] == sources:
            return item.known
        part = self.parts / f"part-{platform.node()}-{os.getpid()}-{os.urandom(4).hex()}.tar"
        try:
            with open(part, "xb") as file:
                record = self._write(file, item.names, unreadable)
            if "error" in record:
                part.unlink()
                return record
            make_durable(part)
        except OSError as error:  # an error of the output; errors of sources are in the record
            part.unlink(missing_ok=True)
            return {"error": f"{printable(str(part.parent))}: cannot be written ({error.strerror})", "unreadable": []}
        return {**record, "sources": sources, "part": part.name}

    def _write(self, file: BinaryIO, names: Sequence[str], unreadable: Mapping[str, str]) -> Record:
        record: Record = {"offsets": [], "sizes": [], "crcs": [], "left_out": []}
        for name in names:
            begin = file.tell()
            try:
                if name in unreadable:
                    raise SourceError(unreadable[name])
                found: tuple[int | None, ...] = append(file, self.videos / name, name)
            except SourceError as error:
                record["left_out"].append([name, str(error)])
                file.seek(begin)
                file.truncate()
                found = (None, None, None)
            for column, value in zip(("offsets", "sizes", "crcs"), found):
                record[column].append(value)
        file.write(bytes(2 * BLOCK))
        if record["left_out"] and not self.leave_out:
            many = len(record["left_out"])
            return {"error": f"{many} of its videos cannot be read", "unreadable": record["left_out"]}
        return record

    def _sources(self, names: Sequence[str]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            try:
                found = os.stat(self.videos / name)
                state = f"{found.st_size} {found.st_mtime_ns}"
            except (OSError, ValueError):
                state = "-"
            digest.update(os.fsencode(f"{name}\n{state}\n"))
        return digest.hexdigest()


class SourceError(Exception):
    """A video cannot be read; the message is the reason."""


def append(file: BinaryIO, source: Path, name: str) -> tuple[int, int, int]:
    """Append a video; return (offset, size, CRC-32). Raises SourceError for the video, OSError for the output."""
    try:
        handle = open(source, "rb", buffering=0)  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise SourceError(getattr(error, "strerror", None) or str(error)) from error
    with handle:
        size = os.fstat(handle.fileno()).st_size
        file.write(header(name, size))
        offset, crc, left = file.tell(), 0, size
        while left:
            try:
                content = handle.read(min(left, _AT_ONCE))
            except OSError as error:
                raise SourceError(error.strerror or str(error)) from error
            if not content:
                raise SourceError("became shorter while it was read")
            file.write(content)
            crc, left = zlib.crc32(content, crc), left - len(content)
        file.write(bytes(-size % BLOCK))
    return offset, size, crc


def _unreadable(source: Path) -> str:
    try:
        found = os.stat(source)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    if not stat.S_ISREG(found.st_mode):
        return "not a file of bytes but a folder, pipe or device"
    if not found.st_size:
        return "empty file"
    return "" if os.access(source, os.R_OK) else "Permission denied"


# -------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class PackOptions:
    """Options of the command; folders are absolute."""

    videos: Path
    out: Path
    annotations: Path | None = None
    separator: str = " "
    segment_lines: bool = False
    """Whether lines may be ``path start end label``."""
    shard_videos: int = 1000
    """Number of videos per shard."""
    leave_out: bool = False
    """Whether to leave out videos that cannot be read."""


class PackJob:
    """The shards of one command, or of one part of it.

    Raises:
        ConfigError: the job cannot start; nothing but journals was written.
    """

    COMMAND, KIND = "data pack", "pack"

    def __init__(self, wanted: PackOptions, part: Shard) -> None:
        self.wanted, self._part = wanted, part
        layout = Layout(wanted.videos, wanted.out)
        annotations = None
        if wanted.annotations:
            annotations = AnnotationFiles(wanted.annotations, wanted.separator, segments=wanted.segment_lines)
        read = list(annotations.files.values()) if annotations else []
        self.rows = self._rows(layout, annotations)
        self.shards = shards(self.rows, wanted.shard_videos)
        self.out = OutputFolder(wanted.out, self.COMMAND, [wanted.videos, *read], known=self._known)
        self.parts = self.out.folder(PARTS)
        self.journal = Journal(self.parts, self.KIND, part)
        clean_parts(self.parts)
        self.out.check(INDEX)

    def _rows(self, layout: Layout, annotations: AnnotationFiles | None) -> dict[str, list[str]]:
        """The name in the pack of each line, by split."""
        return rows_of(layout, annotations)

    def version(self, names: Sequence[str]) -> object:
        """What decides the content of a shard with these videos, other than the files."""
        return _version(names)

    def _known(self, target: str) -> list[Record]:
        return stamps(self.journal.all_of(target))

    def items(self) -> Iterator[Item]:
        """The shards that this part has to write or check. Raises ConfigError if something is in the way."""
        for target in self._part.of(sorted(self.shards)):
            self.out.check(target)
            yield Item(target, self.shards[target], self._record(target))

    def done(self, item: Item, answer: Record) -> str:
        """Record a worker's result in the journal and move the shard to its path; return the error, or an empty string."""
        if "error" in answer or "part" not in answer:
            return str(answer.get("error", ""))
        part = self.parts / answer["part"]
        record = {k: v for k, v in answer.items() if k != "part"}
        try:
            self.out.place(part, item.target, note=lambda made: self._note(item, {**record, **made}))
        except InTheWayError as error:
            part.unlink(missing_ok=True)
            return str(error)
        return ""

    def _note(self, item: Item, record: Record) -> None:
        self.journal.add(item.target, self.version(item.names), record)

    def _record(self, target: str) -> Record | None:
        """The record of a shard, if the shard exists, is complete and has these videos; else None."""
        record = self.journal.get(target, self.version(self.shards[target]))
        if record is None or (record["left_out"] and not self.wanted.leave_out):
            return None
        try:
            return record if (self.out.root / target).lstat().st_size == record["bytes"] else None
        except OSError:
            return None

    def write_index(self) -> tuple[int, int, list[list[str]]]:
        """Write the index if all shards exist; return (missing shards, videos in the others, [name, reason] of those left out)."""
        self.journal.refresh()
        records = {target: self._record(target) for target in sorted(self.shards)}
        videos, left_out, missing = [], [], 0
        for target, record in records.items():
            if record is None:
                missing += 1
                continue
            left_out += record["left_out"]
            shard = self.out.root / target
            columns = zip(self.shards[target], record["offsets"], record["sizes"], record["crcs"])
            videos += [Stored(shard, at, size, crc, name) for name, at, size, crc in columns if at is not None]
        if not missing:
            about = {"shard_videos": self.wanted.shard_videos, "rows": {s: len(r) for s, r in self.rows.items()}}
            parts = index_parts(videos, list(records), about)
            self.out.write_bytes(INDEX, b"".join(bytes(p) for p in parts))
            forget()
        return missing, len(videos), left_out


def shards(rows: dict[str, list[str]], shard_videos: int) -> dict[str, tuple[str, ...]]:
    """The videos of each shard, by shard name: of each split, those that `multitrain.order.windows.scatter` assigns to it.

    A video of several splits is in the shard that comes first; a shard without videos is not written.
    """
    out: dict[str, tuple[str, ...]] = {}
    seen: set[str] = set()
    for listed in rows.values():
        order = scatter(np.arange(len(listed)), len(listed))
        for first in range(0, len(listed), shard_videos):
            names = dict.fromkeys(listed[int(row)] for row in order[first : first + shard_videos])
            here = tuple(name for name in names if name not in seen)
            seen.update(here)
            if here:
                out[f"shard-{len(out):06d}.tar"] = here
    return out


def rows_of(layout: Layout, annotations: AnnotationFiles | None) -> dict[str, list[str]]:
    """The video of each line, by split. Raises CatalogError for a path that cannot be in a pack."""
    if annotations is None:
        return {"": [layout.name(listed) for listed in layout.found()]}
    split_of = {file: split for split, file in annotations.files.items()}
    rows: dict[str, list[str]] = {split: [] for split in annotations.files}
    for listed in annotations.listed():
        assert listed.place is not None  # set for lines of files
        rows[split_of[listed.place.file]].append(_relative(layout, listed))
    return rows


def _relative(layout: Layout, listed: Listed) -> str:
    if os.path.isabs(listed.path):
        raise CatalogError(
            f"{listed.place}: {quoted(listed.path)} is an absolute path, so it names a file and nothing in a pack; "
            f"write it relative to {layout.videos}"
        )
    return layout.name(listed)


def _version(names: Sequence[str]) -> str:
    return hashlib.blake2b(os.fsencode("\n".join(names)), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------------ unpacking


class Unpack:
    """Writes the videos of one shard as files; a function for `map_resumable` whose item is the shard's videos.

    Returns:
        ``written``: number of files written; ``there``: number of files that existed; ``unreadable``: [name, reason] of each.
    """

    def __init__(self, pack: Path, out: Path) -> None:
        self.pack, self.out = pack, out

    def __call__(self, videos: list[Stored]) -> Record:
        folder = OutputFolder(self.out, "data unpack", [self.pack])
        counts: Record = {"written": 0, "there": 0, "unreadable": []}
        for video in videos:
            try:
                counts[self._one(folder, video)] += 1
            except (DamagedError, ConfigError) as error:
                counts["unreadable"].append([video.name, str(error)])
            except OSError as error:
                counts["unreadable"].append([video.name, os_error_text(error)])
        return counts

    @staticmethod
    def _one(folder: OutputFolder, video: Stored) -> str:
        content, path = read_stored(video), folder.target(video.name)
        there = path.is_file() and path.stat().st_size == video.size
        if there and path.read_bytes() == content:
            return "there"
        folder.write_bytes(video.name, content)
        return "written"
