"""`data resize --pack`: small copies of videos, written to tar shards directly, so that a second tree of files never exists.

A worker makes one copy after another and appends each to a shard that grows in a folder of its own below ``OUT/.parts``, with a log
that has a line per copy. When the shard is complete, its bytes are compared with the checksums, and the command moves it to its
place, as `data pack` does. After a kill at any moment, the next command continues the shard behind its last logged copy: it takes the
folder over by renaming it, so that only one process has it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from multitrain.data.packs import BLOCK
from multitrain.data.tools.copying import COLUMNS, TABLE, annotations_folder, write_annotations
from multitrain.data.tools.listing import AnnotationFiles, Copy, Layout, Listed, copies, located
from multitrain.data.tools.packing import Item, PackJob, PackOptions, SourceError, append, rows_of
from multitrain.data.tools.parallel_map import FINAL, Shard, version
from multitrain.data.tools.resize import Encoding, Resize, make_durable
from multitrain.data.tools.resize import Item as CopyItem
from multitrain.files import OutputFolder
from multitrain.records import jsonl
from multitrain.text import csv_text, printable

Record = dict[str, Any]
_GROWING = re.compile(r"growing@(?P<shard>[^@]+)@(?P<host>[^@]*)@(?P<pid>\d+)@(?P<job>[^@]*)@[0-9a-f]{8}")
_ABANDONED = 1800.0
"""Seconds without a new copy after which a growing shard of another machine is taken over."""
_TAR, _LOG = "shard.tar", "copies.jsonl"
_KEPT = ("frames", "width", "height", "damage")
"""Values of a copy's record that are kept for the table."""


@dataclass(frozen=True)
class PackedCopyOptions(PackOptions):
    """Options of the command; folders are absolute."""

    encoding: Encoding = field(default_factory=Encoding)
    write_annotations: Path | None = None


class Job(NamedTuple):
    """A shard to write."""

    item: Item
    sources: tuple[str, ...]
    """The video of each copy, relative to the folder of videos."""
    version: object
    """What decides the content of the shard, other than the files."""


class Growing:
    """A shard that grows, in a folder that belongs to this process.

    Another process may take the folder over, if it seems abandoned: `check` finds that, and `finish` whatever was written twice.

    Attributes:
        done: the log's records, by copy.
        end: bytes of the shard up to the last logged copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.tar = folder, folder / _TAR
        self.done: dict[str, Record] = {}
        self.end = 0

    @classmethod
    def open(cls, parts: Path, job: Job, sources: dict[str, list[int]]) -> Growing:
        """The shard that an ended process left, if it has these copies of these files; else a new one."""
        head = {"shard": job.version}
        for folder in sorted(_left(parts, job.item.target)):
            mine = parts / _folder_name(job.item.target)
            try:
                os.rename(folder, mine)
            except OSError:
                continue  # another process was faster
            found = cls(mine)
            if found._resume(head, sources):
                return found
            shutil.rmtree(mine, ignore_errors=True)
        new = cls(parts / _folder_name(job.item.target))
        new.folder.mkdir()
        new.tar.touch()
        jsonl.append(new.folder / _LOG, head)
        return new

    def _resume(self, head: Record, sources: dict[str, list[int]]) -> bool:
        """Read the log, and drop what was not logged; whether it is of this shard."""
        try:
            if not all(_is_plain(file) for file in self.folder.iterdir()):
                return False
            first, *logged = jsonl.read(self.folder / _LOG)
            if {key: first.get(key) for key in head} != head:
                return False
            size = self.tar.stat().st_size
        except (OSError, ValueError):
            return False
        for record in logged:
            name = record.get("name")
            if record.get("source") != sources.get(str(name)):
                return False
            if "error" not in record or record.get(FINAL):
                self.done[str(name)] = record
            self.end = max(self.end, int(record.get("end", 0)))
        if size < self.end:
            return False
        with open(self.tar, "r+b") as file:
            file.truncate(self.end)
        return True

    def add(self, name: str, copy: Path, record: Record) -> None:
        """Append a copy and log it. Raises OSError, SourceError."""
        with open(self.tar, "r+b") as file:
            file.seek(self.end)
            offset, size, crc = append(file, copy, name)
            file.flush()
            os.fsync(file.fileno())
            self.end = file.tell()
        self.log(name, {**record, "offset": offset, "size": size, "crc": crc, "end": self.end})

    def log(self, name: str, record: Record) -> None:
        """Log the outcome of a copy. Raises OSError."""
        self.check()
        self.done[name] = {"name": name, **record}
        jsonl.append(self.folder / _LOG, self.done[name])

    def check(self) -> None:
        """Raise FileNotFoundError if another process took the folder over."""
        self.folder.stat()

    def finish(self) -> bool:
        """Write the end of the shard; whether all bytes are those that were logged."""
        with open(self.tar, "r+b") as file:
            for record in self.done.values():
                if "crc" in record:
                    file.seek(record["offset"])
                    if zlib.crc32(file.read(record["size"])) != record["crc"]:
                        return False
            file.seek(self.end)
            file.write(bytes(2 * BLOCK))
            file.truncate()
        make_durable(self.tar)
        return True


def _is_plain(file: Path) -> bool:
    """Whether this is a file without other names, which writing to it would change."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _folder_name(target: str) -> str:
    job = "-".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_PROCID"))
    return f"growing@{target}@{platform.node()}@{os.getpid()}@{job}@{os.urandom(4).hex()}"


def _left(parts: Path, target: str = "") -> Iterator[Path]:
    """The folders of growing shards whose process has ended."""
    job = _folder_name("").split("@")[4]
    for folder in parts.iterdir():
        found = _GROWING.fullmatch(folder.name)
        if found is None or (target and found["shard"] != target) or folder.is_symlink() or not folder.is_dir():
            continue
        if found["host"] == platform.node():
            ended = not Path(f"/proc/{found['pid']}").exists()
        else:  # a job that was requeued has ended on its earlier node
            ended = (job not in ("", "-") and found["job"] == job) or _age(folder) > _ABANDONED
        if ended:
            yield folder


def _age(folder: Path) -> float:
    try:
        return time.time() - max((folder / _LOG).stat().st_mtime, folder.stat().st_mtime)
    except OSError:
        return 0.0


@dataclass(frozen=True)
class ResizeShard:
    """Writes one shard of copies; a function for `map_resumable` whose item is a :class:`Job`.

    Returns:
        As `multitrain.data.tools.packing.PackShard`, and ``made``: the values `_KEPT` of each copy.
    """

    resize: Resize
    parts: Path
    leave_out: bool

    def __call__(self, job: Job) -> Record:
        found = {name: located(self.resize.videos / source) for name, source in zip(job.item.names, job.sources)}
        versions = {name: version(path) for name, path in found.items()}
        if job.item.known is not None and job.item.known["sources"] == [versions[name] for name in job.item.names]:
            return job.item.known
        try:
            growing = Growing.open(self.parts, job, versions)
            for name, source in zip(job.item.names, job.sources):
                if name not in growing.done:
                    self._one(growing, name, source, versions[name])
            return self._finished(growing, job, versions)
        except FileNotFoundError as error:
            return {"error": f"another process continues {job.item.target} ({error.filename})", "unreadable": []}
        except OSError as error:
            return {"error": f"{printable(str(self.parts))}: cannot be written ({error.strerror})", "unreadable": []}

    def _one(self, growing: Growing, name: str, source: str, at: list[int]) -> None:
        growing.check()
        jsonl.append(growing.folder / "now.jsonl", {"name": name, "source": at})  # which copy a crash belongs to
        record = self.resize(CopyItem(Copy(source, name)))
        part = self.parts / str(record.pop("part", ""))
        if "error" in record:
            growing.log(name, {"source": at, FINAL: True, **record})
            return
        try:
            growing.add(name, part, {"source": at, **{k: record[k] for k in _KEPT if k in record}})
        except SourceError as error:
            growing.log(name, {"source": at, "error": str(error), FINAL: False})
        finally:
            part.unlink(missing_ok=True)

    def _finished(self, growing: Growing, job: Job, versions: dict[str, list[int]]) -> Record:
        records = [growing.done[name] for name in job.item.names]
        failed = [[r["name"], r["error"]] for r in records if "error" in r]
        if failed and not self.leave_out:
            return {"error": f"{len(failed)} of its videos cannot be copied", "unreadable": failed}
        growing.check()
        if not growing.finish():
            shutil.rmtree(growing.folder, ignore_errors=True)
            return {
                "error": f"{job.item.target}: was changed while it was written; run the command again",
                "unreadable": [],
            }
        columns = {column: [r.get(key) for r in records] for column, key in _COLUMNS}
        made = [{key: r[key] for key in _KEPT if key in r} for r in records]
        sources = [versions[name] for name in job.item.names]
        part = f"{growing.folder.name}/{_TAR}"
        return {**columns, "left_out": failed, "made": made, "sources": sources, "part": part}


_COLUMNS = (("offsets", "offset"), ("sizes", "size"), ("crcs", "crc"))


class PackedCopyJob(PackJob):
    """The shards of one command, or of one part of it. Raises as `PackJob`."""

    COMMAND, KIND = "data resize --pack", "packed-copies"

    def __init__(self, wanted: PackedCopyOptions, part: Shard) -> None:
        self.encoding = wanted.encoding
        super().__init__(wanted, part)
        self.out.check(TABLE)
        self.annotations_out: OutputFolder | None = None
        if wanted.write_annotations is not None and self.annotations is not None:
            self.annotations_out = annotations_folder(
                wanted.write_annotations, self.annotations, self.renamed, [wanted.annotations]
            )
        for folder in list(_left(self.parts)):
            if not os.path.lexists(folder / _TAR):  # the shard is in its place
                shutil.rmtree(folder, ignore_errors=True)

    def _rows(self, layout: Layout, annotations: AnnotationFiles | None) -> dict[str, list[str]]:
        self.annotations = annotations
        rows = rows_of(layout, annotations)
        listed = annotations.listed() if annotations else [Listed(name) for name in rows[""]]
        made, self.renamed = copies(layout, listed)
        self.source_of = {copy.target: copy.source for copy in made}
        target_of = {copy.source: copy.target for copy in made}
        return {split: [target_of[name] for name in names] for split, names in rows.items()}

    def jobs(self) -> Iterator[Job]:
        """The shards that this part has to write or check. Raises ConfigError if something is in the way."""
        for item in self.items():
            sources = tuple(self.source_of[name] for name in item.names)
            yield Job(item, sources, self.version(item.names))

    def done(self, item: Item, answer: Record) -> str:
        said = super().done(item, answer)
        if "error" in answer and "unreadable" not in answer:
            self._note_crash(item, str(answer["error"]))
        if not said and "part" in answer:
            shutil.rmtree((self.parts / answer["part"]).parent, ignore_errors=True)
        return said

    def _note_crash(self, item: Item, reason: str) -> None:
        """Log that the copy that a worker was making when it crashed, or took too long, cannot be made."""
        for folder in _left(self.parts, item.target):
            try:
                *_, last = jsonl.read(folder / "now.jsonl")
                logged = {r.get("name") for r in jsonl.read(folder / _LOG)}
            except (OSError, ValueError):
                continue
            if last.get("name") not in logged:
                jsonl.append(folder / _LOG, {**last, "error": reason, FINAL: True})

    def version(self, names: Sequence[str]) -> object:
        return [super().version([*names, *(self.source_of[name] for name in names)]), self.encoding.version()]

    def write_tables(self) -> None:
        """Write ``resize.csv`` and the annotation files with the names of the copies, if all shards are there. Raises ConfigError."""
        self.journal.refresh()
        records = {target: self._record(target) for target in sorted(self.shards)}
        if any(record is None for record in records.values()):
            return
        rows: list[list[object]] = [list(COLUMNS)]
        lost: set[str] = set()
        for target, record in records.items():
            assert record is not None  # see above
            reasons = dict(record["left_out"])
            lost.update(reasons)
            for name, made, size in zip(self.shards[target], record["made"], record["sizes"]):
                state = "failed" if name in reasons else "damaged" if "damage" in made else "good"
                reason = reasons.get(name) or made.get("damage", "")
                rows.append(
                    [self.source_of[name], name, state, reason, *(made.get(k, "") for k in _KEPT[:3]), size or ""]
                )
        self.out.write_text(TABLE, csv_text(rows))
        if self.annotations_out is not None and self.annotations is not None:
            names = {path: None if name in lost else name for path, name in self.renamed.items()}
            write_annotations(self.annotations, names, self.annotations_out)
