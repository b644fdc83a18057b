"""Official annotation files of datasets whose lines are segments of long videos: EPIC-KITCHENS, Charades, Diving48.

`data import` writes ``video start end label`` lines for them (`data.datasets.NAME.segments`), or with ``--cut`` the names of copies that
`data resize --segments` cuts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from multitrain.config.reading import as_text, read_json
from multitrain.data.annotations import CatalogError, line_text, read_annotations
from multitrain.data.segment import Segment
from multitrain.data.tools.importing import Imported, Sample, _rows_with_header, find, named, split_of

_SHORTEST = 0.1
"""Seconds; shorter segments are left out."""


def segment_sample(split: str, video: str, start: float, end: float, label: str, folder: str = "") -> Sample:
    """A segment of a video; its copy, if it is cut, is ``VIDEO/START_END.mp4`` in hundredths of a second."""
    path = f"{Path(video).with_suffix('')}/{round(start * 100):07d}_{round(end * 100):07d}.mp4"
    return Sample(split, path, (label,), folder, segment=(video, start, end))


def annotation_line(sample: Sample, labels: Sequence[int], *, cut: bool) -> str:
    """The line of a sample in an annotation file; with `cut`, that of the copy of a segment."""
    if sample.segment is None or cut:
        return line_text(sample.path, None, labels, " ")
    video, start, end = sample.segment
    return line_text(video, Segment(round(start, 3), round(end, 3)), labels, " ")


def located(samples: list[Sample], videos: Path) -> tuple[list[Sample], int]:
    """(segments with the paths of their videos below a folder, number of missing videos)."""
    first = {s.segment[0]: replace(s, path=s.segment[0]) for s in reversed(samples) if s.segment}
    found, missing = find(list(first.values()), videos)
    path = {name: sample.path for name, sample in zip(first, found)}
    moved = [replace(s, segment=(path[s.segment[0]], *s.segment[1:])) if s.segment else s for s in samples]
    return moved, missing


def epic(files: list[Path], classes: Path | None) -> Imported:
    """EPIC_100_train.csv, EPIC_100_validation.csv: one segment a row. The classes are verbs or nouns, as the list of classes is.

    Video names are ``P01_101.MP4``; below ``--videos``, also ``P01/videos/P01_101.MP4``.
    """
    kind = next((k for k in ("verb", "noun") if classes is not None and k in classes.stem.lower()), None)
    if classes is None or kind is None:
        raise CatalogError(
            "epic has verbs and nouns; choose with --classes EPIC_100_verb_classes.csv or --classes EPIC_100_noun_classes.csv"
        )
    names = {row["id"]: row["key"] for _, row in _rows_with_header(classes, ("id", "key"))}
    out, useless = Imported([names[key] for key in sorted(names, key=int)], []), 0
    for file in files:
        split, column = split_of(file.stem, file, 0), f"{kind}_class"
        for number, row in _rows_with_header(file, ("video_id", "start_timestamp", "stop_timestamp", column)):
            if row[column] not in names:
                raise CatalogError(f"{file}:{number}: class {row[column]!r} is not in {classes}")
            start, end = (_clock(row[c], file, number) for c in ("start_timestamp", "stop_timestamp"))
            if end - start < _SHORTEST:
                useless += 1
                continue
            out.samples.append(
                segment_sample(
                    split, f"{row['video_id']}.MP4", start, end, names[row[column]], f"{row['video_id'][:3]}/videos"
                )
            )
    _note_useless(out, useless)
    return out


def charades(files: list[Path], classes: Path | None) -> Imported:
    """Charades_v1_train.csv, Charades_v1_test.csv (which is validated on): one segment an action. Video names are ``ID.mp4``."""
    if classes is None:
        raise CatalogError("charades needs its list of classes; give Charades_v1_classes.txt with --classes FILE")
    listed = (line.split(" ", 1) for line in as_text(read_annotations(classes), classes).splitlines() if line.strip())
    names = {code: " ".join(rest) for code, *rest in listed}
    out, useless, idle = Imported(list(names.values()), []), 0, 0
    for file in files:
        split = split_of(file.stem, file, 0).replace("test", "val")
        for number, row in _rows_with_header(file, ("id", "actions", "length")):
            idle += not row["actions"]
            for action in filter(None, row["actions"].split(";")):
                code, start, end = action.split()
                if code not in names:
                    raise CatalogError(f"{file}:{number}: class {code!r} is not in {classes}")
                begin, stop = float(start), min(float(end), float(row["length"] or math.inf))
                if stop - begin < _SHORTEST:
                    useless += 1
                    continue
                out.samples.append(segment_sample(split, f"{row['id']}.mp4", begin, stop, names[code]))
    _note_useless(out, useless)
    if idle:
        out.notes.append(f"{idle} videos without an action left out")
    return out


def diving48(files: list[Path], classes: Path | None) -> Imported:
    """Diving48_V2_train.json, Diving48_V2_test.json (which is validated on): one complete video, ``ID.mp4``, an entry.

    Its frame numbers are those of the official clips, which are cut already.
    """
    names = None if classes is None else [" ".join(map(str, parts)) for parts in read_json(classes)]
    out = Imported([], [])
    for file in files:
        split = split_of(file.stem, file, 0).replace("test", "val")
        for entry in read_json(file):
            label = int(entry["label"])
            if names is not None and not 0 <= label < len(names):
                raise CatalogError(f"{file}: label {label} of {entry['vid_name']} is not in {classes}")
            name = f"{label:02d}" if names is None else names[label]
            out.samples.append(Sample(split, f"{entry['vid_name']}.mp4", (name,), folder="rgb"))
    if names is None:
        return named(out, None)
    out.classes = names
    return out


def _clock(text: str, file: Path, line: int) -> float:
    """Seconds of ``hours:minutes:seconds``."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        raise CatalogError(f"{file}:{line}: {text!r} is no time like 00:01:02.50; restore the official file") from None
    return 3600 * hours + 60 * minutes + seconds


def _note_useless(out: Imported, count: int) -> None:
    if count:
        out.notes.append(f"{count} segments shorter than {_SHORTEST} s left out")
