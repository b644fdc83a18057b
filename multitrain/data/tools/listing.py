"""Map the video paths of csv files to the paths of their copies, from the folder of videos to the folder of copies.

A path is in the folder of videos (VIDEOS) if it is relative to VIDEOS, absolute and below VIDEOS, or below the folder to which VIDEOS
resolves through symbolic links. Any other path is an error, because the path of its copy is undefined.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from multitrain.data.annotations import CatalogError, Line, Syntax, line_text, lines, read_annotations
from multitrain.data.packs import open_pack
from multitrain.data.tools.importing import SPLITS, VIDEO_ENDINGS
from multitrain.text import counted, printable, quoted

_log = logging.getLogger(__name__)
_SHOWN_KINDS = 4

PARTS = ".parts"
"""Folder below the copies for journals and temporary files."""


@dataclass(frozen=True)
class Copy:
    """One copy to make."""

    source: str
    """Path relative to the folder of videos."""
    target: str
    """Path relative to the folder of copies; ends with .mp4."""
    segment: tuple[float, float] | None = None
    """Start and end in the source, in seconds; None for the full video."""


class Place(NamedTuple):
    """A file and line, for error messages."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Listed(NamedTuple):
    """A path as written in a file, and its line."""

    path: str
    place: Place | None = None


class Layout:
    """The folders of videos and copies.

    Args:
        videos: the folder of videos.
        out: the folder of copies. It may be inside `videos` (its files are then not sources) or contain it.

    Raises:
        CatalogError: `videos` is not a folder, or is a pack.
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
        """The path of a video relative to the folder of videos. Raises CatalogError for a video outside it."""
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
        """The video files (by suffix) below the folder of videos, in order, without those in `out`."""
        return [Listed(path) for path in found_below(self.videos, Path(self._out))]


def target_of(name: str) -> str:
    """The name of a video's copy, which ends with .mp4."""
    return str(Path(name).with_suffix(".mp4"))


def copies(layout: Layout, listed: Iterable[Listed]) -> tuple[list[Copy], dict[str, str]]:
    """One copy per listed video, also if it is listed several times or with different spellings.

    Returns:
        (the copies, the name of the copy by listed path).

    Raises:
        CatalogError: a path is outside the folder of videos, or two videos would have the same copy.
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
    """The copies of ``segments.csv``, whose lines are ``source,start,end,path`` with times in seconds.

    Raises:
        CatalogError: in a line (named), the source or the copy is outside its folder, a time is invalid, or the copy's name is used twice.
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
    """The video files (by suffix) below a folder, or the videos of a pack, as relative paths in order.

    Hidden files and folders are not looked at. A warning says how many other files, and links to folders, were passed over.

    Args:
        without: a folder to skip (its path without symbolic links).

    Raises:
        CatalogError: there are no videos, or a folder cannot be read.
    """
    if not folder.is_dir():
        what = "is a file, not a folder of videos" if folder.exists() else "no such folder of videos"
        raise CatalogError(f"{folder}: {what}")
    if (pack := open_pack(folder)) is not None:
        return sorted(video.name for video in pack)
    found: list[str] = []
    others: list[str] = []
    linked: list[str] = []
    for at, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if without is not None:
            folders[:] = [f for f in folders if os.path.realpath(os.path.join(at, f)) != str(without)]
        linked += [os.path.relpath(os.path.join(at, f), folder) for f in folders if os.path.islink(os.path.join(at, f))]
        for name in names:
            if name[0] != ".":
                is_video = name.lower().endswith(VIDEO_ENDINGS)
                (found if is_video else others).append(os.path.relpath(os.path.join(at, name), folder))
    if not found:
        raise CatalogError(f"{folder}: no video files in it ({' '.join(VIDEO_ENDINGS)})")
    if passed := passed_over(sorted(others), linked):
        _log.warning("note: %s: passed over %s", printable(str(folder)), passed)
    return sorted(found)


def _refuse_unreadable(error: OSError) -> None:
    raise CatalogError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def passed_over(others: Sequence[str], linked: Sequence[str] = ()) -> str:
    """Names what a search for videos left out: ``3 files that are no videos by their suffix (2 .jpg, 1 .txt; first: a/b.jpg)``.

    Args:
        others: files without a suffix of :data:`VIDEO_ENDINGS`.
        linked: links to folders.
    """
    parts = []
    if others:
        kinds = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in others).most_common()
        shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:_SHOWN_KINDS])
        shown += f", {sum(count for _, count in kinds[_SHOWN_KINDS:])} others" if len(kinds) > _SHOWN_KINDS else ""
        what = counted(len(others), "file")
        parts.append(f"{what} without a video's suffix ({printable(shown)}; first: {quoted(others[0], 80)})")
    if linked:
        parts.append(f"{counted(len(linked), 'linked folder')} (first: {quoted(linked[0], 80)})")
    return " and ".join(parts)


class AnnotationFiles:
    """The lines of ``train.csv``, ``val.csv`` and ``test.csv`` in a folder; labels are not checked.

    Args:
        segments: whether lines may be ``path start end label``; the segments of a video are then lines of the same video.

    Raises:
        CatalogError: there is no such file, or one cannot be read.
    """

    def __init__(self, folder: Path, separator: str = " ", *, segments: bool = False) -> None:
        self.folder, self._separator = folder, separator
        self._syntax = Syntax(separator.encode(), separator != ",", segments)
        self.files = {s: f for s in SPLITS if os.path.lexists(f := folder / f"{s}.csv")}
        if not self.files:
            raise CatalogError(f"{folder}: no train.csv, val.csv or test.csv; `multitrain data import` writes them")
        self._lines = {split: list(self._read(file)) for split, file in self.files.items()}

    @property
    def class_names(self) -> Path | None:
        """``classes.txt``, if it exists."""
        file = self.folder / "classes.txt"
        return file if file.is_file() else None

    def listed(self) -> Iterator[Listed]:
        """All paths of all files, with their lines."""
        for split, file in self.files.items():
            for line in self._lines[split]:
                yield Listed(os.fsdecode(line.path), Place(file, line.number))

    def rewritten(self, split: str, made: Mapping[str, str | None]) -> tuple[str, int]:
        """(lines of a file with the names of the copies, number of lines left out because they have no copy).

        made: the name of the copy by listed path; None if there is no copy.
        """
        kept = []
        for line in self._lines[split]:
            if (name := made.get(os.fsdecode(line.path))) is not None:
                kept.append(line_text(name, line.segment, line.labels, self._separator))
        return "".join(kept), len(self._lines[split]) - len(kept)

    def _read(self, file: Path) -> Iterator[Line]:
        yield from lines(read_annotations(file), file, self._syntax)


def located(source: Path) -> Path:
    """The source, or a file of the same name with another suffix (downloads are mp4, mkv or webm)."""
    others = (source.with_suffix(ending) for ending in (".mkv", ".webm", ".mp4"))
    return source if os.path.exists(source) else next((p for p in others if os.path.exists(p)), source)
