"""Import a folder of videos in class folders: ``DIR/CLASS/*.mp4``, with or without train, val and test folders on top.

The class of a video is the first folder on its path (below the split's folder); deeper folders belong to that class. A folder is a
split's when there is a train folder with class folders in it, and nothing else beside the splits.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from multitrain.data.annotations import CatalogError
from multitrain.data.tools.importing import SPLIT_NAMES, Imported, Sample, named
from multitrain.data.tools.listing import found_below
from multitrain.data.tools.splitting import UNSPLIT
from multitrain.text import counted, printable, quoted


def folder(files: list[Path], classes: Path | None, out: Path | None = None) -> Imported:
    """The videos below one folder, by class folder.

    Args:
        files: the folder.
        classes: a list of the classes, which numbers them; by default they are in alphabetical order.
        out: a folder of this import's own, whose files are not videos of it.

    Raises:
        CatalogError: it is not one folder, or no video in it is in a class folder.
    """
    if len(files) != 1:
        raise CatalogError(f"folder takes one folder of class folders, not {len(files)}; give the folder above them")
    top = files[0]
    listed = found_below(top, None if out is None else Path(os.path.realpath(out)))
    odd = [name for name in listed if not _fits_a_line(name)]
    empty = [name for name in listed if not _has_bytes(top / name)]
    unusable = {*odd, *empty}
    names = [name for name in listed if name not in unusable]
    splits = _split_folders(names)
    found = Imported([], [], videos=top, may_cut=True)
    loose = []
    for name in names:
        split, *rest = name.split(os.sep) if splits else (UNSPLIT, *name.split(os.sep))
        if len(rest) < 2:
            loose.append(name)
        else:
            found.samples.append(Sample(SPLIT_NAMES[split.lower()] if splits else UNSPLIT, name, (rest[0],)))
    _note(found, odd, "with control characters, blanks at an end, or bytes that are not UTF-8, in the path")
    _note(found, empty, "without content")
    _note(found, loose, "in no class folder (DIR/CLASS/VIDEO)")
    if not found.samples:
        raise CatalogError(
            f"{printable(str(top))}: {counted(len(listed), 'video')}, none usable in a class folder; put the videos of each class "
            "into a folder of its name: DIR/CLASS/VIDEO"
        )
    if not splits and "train" in {SPLIT_NAMES.get(label.lower()) for s in found.samples for label in s.labels}:
        found.notes.append("the folder train is taken as a class, since other folders than splits lie beside it")
    return named(found, classes)


def _fits_a_line(name: str) -> bool:
    """Whether a line of an annotation file can hold the path."""
    return printable(name) == name and all(part == part.strip() for part in name.split(os.sep))


def _has_bytes(file: Path) -> bool:
    try:
        return file.stat().st_size > 0
    except OSError:  # a broken link
        return False


def _split_folders(names: Sequence[str]) -> bool:
    """Whether the folders at the top are splits: all have a split's name, and one with class folders in it is that of training."""
    depths: dict[str, int] = defaultdict(int)
    for name in names:
        parts = name.split(os.sep)
        if len(parts) > 1:
            depths[parts[0].lower()] = max(depths[parts[0].lower()], len(parts))
    if not depths or not set(depths) <= set(SPLIT_NAMES):
        return False
    return any(SPLIT_NAMES[top] == "train" and depth > 2 for top, depth in depths.items())


def _note(found: Imported, names: Sequence[str], why: str) -> None:
    if names:
        found.notes.append(f"passed over {counted(len(names), 'video')} {why} (first: {quoted(names[0], 80)})")
