"""Which copies of videos are to be made, and where: the names in csv files, mapped from the folder of videos below another one.

A path belongs to the folder of videos (VIDEOS) in one of three ways: it is relative to VIDEOS; it is absolute and lies below
VIDEOS; or it lies below the folder that VIDEOS is reached over links. Any other path is refused: it is unknown where its copy
should go.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from multitrain.data.annotations import CatalogError, Line, Syntax, lines, read_annotations
from multitrain.data.packs import open_pack
from multitrain.data.prepare.importing import SPLITS, VIDEO_ENDINGS
from multitrain.text import quoted

PARTS = ".parts"
"""Folder below the copies for journals and for copies in the making."""


@dataclass(frozen=True)
class Copy:
    """One copy to make."""

    source: str
    """Relative to the folder of sources."""
    target: str
    """Relative to the folder of copies; ends with .mp4."""
    segment: tuple[float, float] | None = None
    """Seconds of the source, start and end; all of it when None."""


class Place(NamedTuple):
    """Where something is written: for error messages."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Listed(NamedTuple):
    """A path as written in a file, and the line."""

    path: str
    place: Place | None = None


class Layout:
    """Where videos lie, and where their copies go.

    Args:
        videos: the folder of videos.
        out: the folder of copies. It may lie inside `videos` (its files are no sources then) or around it.

    Raises:
        CatalogError: `videos` is no folder, or a pack.
    """

    def __init__(self, videos: Path, out: Path) -> None:
        if not videos.is_dir():
            raise CatalogError(f"{videos}: no such folder of videos")
        if open_pack(videos) is not None:
            raise CatalogError(f"{videos} is packed, and this works on files; write them with `multitrain data unpack`")
        self.videos = Path(os.path.abspath(videos))
        self._real, self._out = os.path.realpath(videos), os.path.realpath(out)
        self._folder = lru_cache(maxsize=4096)(os.path.realpath)

    def name(self, listed: Listed) -> str:
        """The path of a video relative to the folder of videos. Raises CatalogError for one that lies elsewhere."""
        where, shown = f"{listed.place}: " if listed.place else "", quoted(listed.path)
        if "\0" in listed.path:
            raise CatalogError(f"{where}{shown} holds a NUL character, which no file's name can; correct the line")
        path = os.path.normpath(os.path.join(self.videos, listed.path))
        name = self._below(path)
        if name is None:
            hint = f"give a folder that holds them all as VIDEOS, e.g. {os.path.commonpath([path, self.videos])}"
            raise CatalogError(f"{where}{shown} does not lie in {self.videos}; {hint}")
        if name == ".":
            raise CatalogError(f"{where}{shown} is no name of a video; correct the line")
        real = os.path.join(self._folder(os.path.dirname(os.path.join(self._real, name))), os.path.basename(name))
        if real.startswith(self._out + os.sep) and not self._real.startswith(self._out + os.sep):
            raise CatalogError(
                f"{where}{shown} lies in {self._out}, where the copies go; choose another folder for the copies"
            )
        return name

    def _below(self, path: str) -> str | None:
        physical = os.path.join(self._folder(os.path.dirname(path)), os.path.basename(path))
        for candidate, root in ((path, str(self.videos)), (physical, self._real)):
            if candidate == root or candidate.startswith(root.rstrip(os.sep) + os.sep):
                return os.path.relpath(candidate, root)
        return None

    def found(self) -> list[Listed]:
        """The video files below the folder of videos, by the ends of their names, in order; those of `out` are none."""
        return [Listed(path) for path in found_below(self.videos, Path(self._out))]


def target_of(name: str) -> str:
    """The name of a video's copy: it ends with .mp4."""
    return str(Path(name).with_suffix(".mp4"))


def copies(layout: Layout, listed: Iterable[Listed]) -> tuple[list[Copy], dict[str, str]]:
    """A copy for each video that is listed, however often and in whatever spelling.

    Returns:
        The copies, and the name of the copy by the path as it is listed.

    Raises:
        CatalogError: a path lies elsewhere, or two videos would have one copy.
    """
    made: dict[str, tuple[str, Listed]] = {}
    renamed: dict[str, str] = {}
    for entry in listed:
        if entry.path in renamed:
            continue
        name = layout.name(entry)
        target = renamed[entry.path] = target_of(name)
        other, first = made.setdefault(target, (name, entry))
        if other != name:
            where = f"{entry.place}: " if entry.place else ""
            also = f" ({first.place})" if first.place else ""
            raise CatalogError(
                f"{where}{other!r}{also} and {name!r} would both become {target!r}; rename one of them, or leave it out"
            )
    return [Copy(name, target) for target, (name, _) in made.items()], renamed


def segments(layout: Layout, file: Path) -> list[Copy]:
    """The copies that ``segments.csv`` asks for: ``source,start,end,path``, times in seconds.

    Raises:
        CatalogError: with the line: a source or a copy lies elsewhere, times are none, two copies have one name.
    """
    made: dict[str, Copy] = {}
    for place, row in _rows(file):
        try:
            source, start, end, target = (
                row["source"],
                float(row["start"]),
                float(row["end"]),
                os.path.normpath(row["path"]),
            )
        except (KeyError, TypeError, ValueError):
            raise CatalogError(f"{place}: not source,start,end,path; `multitrain data import` writes it") from None
        if not (0 <= start < end and math.isfinite(end)):
            raise CatalogError(f"{place}: {row['start']} to {row['end']} are no seconds of a video; correct the line")
        first, ending = target.split(os.sep)[0], os.path.splitext(target)[1]
        if os.path.isabs(target) or first in ("..", PARTS) or ending != ".mp4" or "\0" in target:
            shown = quoted(row["path"])
            raise CatalogError(
                f"{place}: {shown} is no name of a copy: one ends with .mp4 and lies inside the folder of copies"
            )
        copy = Copy(layout.name(Listed(source, place)), target, (start, end))
        if made.setdefault(target, copy) != copy:
            raise CatalogError(f"{place}: {target!r} is the copy of another line, too; correct one of them")
    return list(made.values())


def _rows(file: Path) -> Iterator[tuple[Place, dict[str, str]]]:
    text = read_annotations(file).decode("utf-8-sig", errors="surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            yield Place(file, reader.line_num), row
    except csv.Error as error:
        raise CatalogError(f"{file}:{reader.line_num + 1}: not lines of source,start,end,path ({error})") from None


def found_below(folder: Path, without: Path | None = None) -> list[str]:
    """The video files below a folder, by the ends of their names, or the videos of a pack: relative paths in order.

    Args:
        without: a folder (its path without links) that is not looked into.

    Raises:
        CatalogError: there is none, or a folder cannot be read.
    """
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder of videos")

    def refuse(error: OSError) -> None:
        raise CatalogError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")

    if (pack := open_pack(folder)) is not None:
        return sorted(video.name for video in pack)
    found = []
    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if without is not None:
            folders[:] = [f for f in folders if os.path.realpath(os.path.join(at, f)) != str(without)]
        found += [
            os.path.relpath(os.path.join(at, n), folder)
            for n in names
            if n.lower().endswith(VIDEO_ENDINGS) and n[0] != "."
        ]
    if not found:
        raise CatalogError(f"{folder}: no video files in it ({' '.join(VIDEO_ENDINGS)})")
    return sorted(found)


class AnnotationFiles:
    """The ``train.csv``, ``val.csv`` and ``test.csv`` of a folder, line by line; labels are not looked at.

    Raises:
        CatalogError: there is none, or one cannot be read.
    """

    def __init__(self, folder: Path, separator: str = " ") -> None:
        self.folder, self._separator = folder, separator
        self.files = {s: f for s in SPLITS if os.path.lexists(f := folder / f"{s}.csv")}
        if not self.files:
            raise CatalogError(f"{folder}: no train.csv, val.csv or test.csv; `multitrain data import` writes them")
        self._lines = {split: list(self._read(file)) for split, file in self.files.items()}

    @property
    def class_names(self) -> Path | None:
        """``classes.txt``, where there is one."""
        file = self.folder / "classes.txt"
        return file if file.is_file() else None

    def listed(self) -> Iterator[Listed]:
        """Every path of every file, with its line."""
        for split, file in self.files.items():
            for line in self._lines[split]:
                yield Listed(os.fsdecode(line.path), Place(file, line.number))

    def rewritten(self, split: str, made: Mapping[str, str | None]) -> tuple[str, int]:
        """A file's lines with the names of the copies, those without a copy left out; and how many those are.

        made: by path as it is listed, the name of the copy; None where there is none.
        """
        kept = []
        for line in self._lines[split]:
            if (name := made.get(os.fsdecode(line.path))) is not None:
                kept.append(f"{name}{self._separator}{','.join(map(str, line.labels))}\n")
        return "".join(kept), len(self._lines[split]) - len(kept)

    def _read(self, file: Path) -> Iterator[Line]:
        yield from lines(
            read_annotations(file), file, Syntax(self._separator.encode(), multi_label=self._separator != ",")
        )


def located(source: Path) -> Path:
    """The source, or the file of the same name that ends differently (downloads come as mp4, mkv or webm)."""
    others = (source.with_suffix(ending) for ending in (".mkv", ".webm", ".mp4"))
    return source if os.path.exists(source) else next((p for p in others if os.path.exists(p)), source)


__all__ = [
    "PARTS",
    "AnnotationFiles",
    "Copy",
    "Layout",
    "Listed",
    "copies",
    "found_below",
    "located",
    "segments",
    "target_of",
]
