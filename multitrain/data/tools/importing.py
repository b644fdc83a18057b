"""Convert official annotation files of datasets to ``path label`` lines and a list of class names.

Videos have the names of the usual downloads. Classes are numbered in alphabetical order, unless the dataset's own
list numbers them.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from multitrain.config import ConfigError, nearest
from multitrain.config.boundary import in_words
from multitrain.config.class_names import class_list_text, read_class_names, repeated_name
from multitrain.config.reading import as_text, read_json
from multitrain.data.annotations import CatalogError, read_annotations
from multitrain.files import OutputFolder
from multitrain.text import printable, quoted

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validate": "val",
    "validation": "val",
    "valid": "val",
    "test": "test",
    "testing": "test",
}
"""The split that a word stands for, in the name of a file, a folder or a cell."""


@dataclass(frozen=True)
class Sample:
    """One line of an annotation file."""

    split: str
    path: str
    labels: tuple[str, ...]
    """Class names."""
    folder: str = ""
    """The split's folder in the usual download, tried first when looking for videos."""
    segment: tuple[str, float, float] | None = None
    """(file to cut from, start and end in seconds)."""


@dataclass
class Imported:
    """The annotations of a dataset."""

    classes: list[str]
    """Class names in label order."""
    samples: list[Sample]
    notes: list[str] = field(default_factory=list)
    """Notes about what was left out, and why."""
    multi_label: bool = False
    videos: Path | None = None
    """The folder that the paths start from, if it is known."""
    groups: dict[str, str] = field(default_factory=dict)
    """What a video comes from (a person, a recording), by path; see :mod:`multitrain.data.tools.splitting`."""
    may_cut: bool = False
    """Whether val and test may be cut from train where there are none."""
    cut: bool = False
    """Whether the lines of segments name copies to cut, instead of the video with start and end."""

    @property
    def has_segment_lines(self) -> bool:
        """Whether annotation files have ``video start end label`` lines."""
        return not self.cut and any(s.segment for s in self.samples)


Reader = Callable[[list[Path], Path | None], Imported]


def read(
    form: str,
    files: list[Path],
    classes: Path | None = None,
    formats: Mapping[str, tuple[Reader, str]] | None = None,
) -> Imported:
    """Read the official annotation `files` of a dataset.

    Args:
        form: a name in `formats`.
        classes: the dataset's own list of classes, if it has one.
        formats: default: :data:`FORMATS`.

    Raises:
        ConfigError: a file cannot be read, or is not of this format.
    """
    formats = FORMATS if formats is None else formats
    if form not in formats:
        raise CatalogError(f"no format {form!r}; {nearest(form, formats)}")
    try:
        found = formats[form][0](files, classes)
    except ConfigError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, csv.Error) as error:
        raise CatalogError(
            f"{files[0]}: not the annotation file of {form} ({in_words(error)}); restore the official file"
        ) from error
    for sample in found.samples:
        for path in (sample.path, *((sample.segment[0],) if sample.segment else ())):
            _check_path(path, files)
    if not found.samples:
        raise CatalogError(f"{files[0]}: no labelled video in it; is it the annotation file of {form}?")
    return found


# ------------------------------------------------------------------------------------------------------------ formats


def kinetics(files: list[Path], classes: Path | None) -> Imported:
    """``label,youtube_id,time_start,time_end,split`` with a header line (K400, K600, K700).

    Video names are ``SPLIT/ID_SSSSSS_EEEEEE.mp4``, as in the usual download; see :data:`LAYOUTS` for other trees.
    """
    out = Imported([], [])
    for file in files:
        unlabelled = 0
        for number, row in _rows_with_header(file, ("youtube_id", "time_start", "time_end")):
            split = split_of(row.get("split") or file.stem, file, number)
            if not row.get("label"):
                unlabelled += 1
                continue
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except ValueError:
                raise CatalogError(
                    f"{file}:{number}: times {row['time_start']!r}, {row['time_end']!r} are no numbers"
                ) from None
            name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
            out.samples.append(Sample(split, name, (row["label"],), folder=split))
        _note_unlabelled(out, file, unlabelled)
    return named(out, classes)


def moments(files: list[Path], classes: Path | None) -> Imported:
    """``CLASS/FILE,CLASS,votes,votes`` without a header (trainingSet.csv, validationSet.csv); videos in training/, validation/."""
    out = Imported([], [])
    for file in files:
        split = split_of(file.stem, file, 0)
        for number, row in _rows(file, at_least=2):
            if number == 1 and not row[0].lower().endswith(VIDEO_ENDINGS):
                continue  # a header
            out.samples.append(
                Sample(split, row[0], (row[1],), folder={"train": "training", "val": "validation"}.get(split, split))
            )
    return named(out, classes)


def multi_moments(files: list[Path], classes: Path | None) -> Imported:
    """``FILE,LABEL,LABEL,…``: names, or numbers of the dataset's list of classes (``name,number`` lines)."""
    out = Imported([], [], multi_label=True)
    for file in files:
        split = split_of(file.stem, file, 0)
        for _, row in _rows(file, at_least=2):
            labels = tuple(dict.fromkeys(label.strip() for label in row[1:] if label.strip()))
            out.samples.append(
                Sample(split, row[0], labels, folder={"train": "training", "val": "validation"}.get(split, split))
            )
    if any(_is_number(label) for s in out.samples for label in s.labels):
        if classes is None:
            raise CatalogError(
                f"{files[0]}: labels are numbers; give the dataset's list of classes with --classes FILE"
            )
        names = class_list(classes)
        out.samples = [_with_names(s, names, classes) for s in out.samples]
    return named(out, classes)


def something(files: list[Path], classes: Path | None) -> Imported:
    """``[{"id", "template", …}]`` and the label map ``{"name": "number"}``; video names are ``ID.webm``.

    A test set without labels takes them from ``test-answers.csv`` (``id;label``), if given.
    """
    if classes is None:
        raise CatalogError("something needs its label map; give something-something-v2-labels.json with --classes FILE")
    names = class_list(classes)
    numbers = frozenset(names)
    out = Imported(names, [])
    answers = {row[0]: row[1] for f in files if f.suffix == ".csv" for _, row in _rows(f, 2, delimiter=";")}
    for file in (f for f in files if f.suffix != ".csv"):
        unlabelled, split = 0, split_of(file.stem, file, 0)
        for place, video in enumerate(read_json(file)):
            if not isinstance(video, dict) or "id" not in video:
                raise CatalogError(f"{file}: entry {place} has no 'id'; it is something-something-v2-{split}.json")
            template = video.get("template") or answers.get(str(video["id"]))
            if template is None:
                unlabelled += 1
                continue
            label = re.sub(r"[\[\]]", "", template)
            if label not in numbers:
                raise CatalogError(
                    f"{file}: {label!r} of video {video['id']} is not in {classes}; {nearest(label, numbers)}"
                )
            out.samples.append(Sample(split, f"{video['id']}.webm", (label,)))
        _note_unlabelled(out, file, unlabelled)
    return out


def activitynet(files: list[Path], classes: Path | None) -> Imported:
    """``{"database": {ID: {"subset", "annotations": [{"label", "segment": [s, e]}]}}}``: one line per segment.

    File names are ``v_ID.mp4``, those of segments that are cut ``v_ID/START_END.mp4`` (hundredths of a second).
    """
    out = Imported([], [])
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or "database" not in content:
            raise CatalogError(f"{file}: no 'database' in it; it is activity_net.v1-3.min.json")
        unlabelled = useless = 0
        for name, video in content["database"].items():
            split = split_of(video.get("subset", ""), file, 0)
            unlabelled += not video.get("annotations")
            for annotation in video.get("annotations", ()):
                start, end = (float(t) for t in annotation["segment"])
                if "duration" in video:
                    end = min(end, float(video["duration"]))
                if end - start < 0.1:
                    useless += 1
                    continue
                path = f"v_{name}/{round(start * 100):07d}_{round(end * 100):07d}.mp4"
                out.samples.append(Sample(split, path, (annotation["label"],), segment=(f"v_{name}.mp4", start, end)))
        _note_unlabelled(out, file, unlabelled)
        if useless:
            out.notes.append(f"{file.name}: {useless} segments shorter than 0.1 s left out")
    return named(out, classes)


def _in_segments(form: str) -> Reader:
    """A reader of `multitrain.data.tools.import_segments`, which imports this module."""

    def reader(files: list[Path], classes: Path | None) -> Imported:
        from multitrain.data.tools import import_segments

        found: Imported = getattr(import_segments, form)(files, classes)
        return found

    return reader


FORMATS: dict[str, tuple[Reader, str]] = {
    "kinetics": (kinetics, "train.csv validate.csv [test.csv]"),
    "moments": (moments, "trainingSet.csv validationSet.csv --classes moments_categories.txt"),
    "multi-moments": (multi_moments, "trainingSet.csv validationSet.csv --classes moments_categories.txt"),
    "something": (something, "…-train.json …-validation.json [test.json test-answers.csv] --classes …-labels.json"),
    "activitynet": (activitynet, "activity_net.v1-3.min.json"),
    "epic": (
        _in_segments("epic"),
        "EPIC_100_train.csv EPIC_100_validation.csv --classes EPIC_100_{verb,noun}_classes.csv",
    ),
    "charades": (
        _in_segments("charades"),
        "Charades_v1_train.csv Charades_v1_test.csv --classes Charades_v1_classes.txt",
    ),
    "diving48": (
        _in_segments("diving48"),
        "Diving48_V2_train.json Diving48_V2_test.json [--classes Diving48_vocab.json]",
    ),
}
"""By format: its reader, and the files that it takes."""

# fmt: off
VIDEO_ENDINGS = (
    ".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts", ".ogv", ".mts",
    ".m2ts", ".m2t", ".vob", ".mxf", ".asf", ".f4v", ".3g2", ".ogm", ".divx", ".qt", ".mpe", ".m1v", ".m2v", ".dv",
    ".rm", ".gif", ".mjpeg", ".mjpg", ".264", ".h264", ".265", ".h265", ".hevc", ".ivf", ".obu", ".y4m", ".dav", ".nut",
)
# fmt: on
"""Suffixes of video files."""

LAYOUTS: tuple[Callable[[Sample], str], ...] = (
    lambda s: s.path,
    lambda s: f"{s.folder}/{s.path}",
    lambda s: f"{s.split}/{s.path}",
    lambda s: f"{s.labels[0]}/{s.path}",
    lambda s: f"{s.split}/{s.labels[0]}/{s.path}",
    lambda s: f"{s.split}/{s.labels[0].replace(' ', '_')}/{s.path}",
    lambda s: f"{s.labels[0].replace(' ', '_')}/{s.path}",
    lambda s: os.path.basename(s.path),
)
"""Common layouts of a dataset's videos below its folder."""


def find(samples: list[Sample], videos: Path) -> tuple[list[Sample], int]:
    """(samples with the paths of their files below `videos`, number of missing files).

    The tree may have any layout of :data:`LAYOUTS`, and suffixes may be mp4, webm, mkv or avi.
    """
    ways = [(layout, ending) for layout in LAYOUTS for ending in ("", ".mp4", ".webm", ".mkv", ".avi")]
    out, missing = [], 0
    for sample in samples:
        for place, (layout, ending) in enumerate(ways):
            path = layout(sample)
            path = os.path.splitext(path)[0] + ending if ending else path
            if (videos / path).is_file():
                ways.insert(0, ways.pop(place))  # the next file most likely has the same layout
                out.append(replace(sample, path=path))
                break
        else:
            missing += 1
            out.append(sample)
    return out, missing


def write(
    found: Imported, out: Path, sources: Iterable[Path] = (), more: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write ``{train,val,test}.csv`` and ``classes.txt`` to `out`, and ``segments.csv`` if segments are to be cut (`Imported.cut`).

    Without test lines, ``test.csv`` is a copy of ``val.csv``: published work tests datasets without public test labels on their
    validation videos. A file of an earlier import that this one does not write is removed.

    Args:
        sources: the official files, which are not written to.
        more: other files to write, by name.

    Returns:
        Number of lines by split.

    Raises:
        ConfigError: a file that `data import` did not write is in the way; nothing was written.
    """
    folder = OutputFolder(out, "data import", sources)
    texts = {split: _rows_of(found, split) for split in SPLITS}
    if not texts["test"]:
        texts["test"] = texts["val"]
    wanted = {"classes.txt": class_list_text(found.classes)}
    wanted |= {f"{split}.csv": "".join(rows) for split, rows in texts.items() if rows}
    if found.cut and (cut := [s for s in found.samples if s.segment]):
        wanted["segments.csv"] = _segments(cut)
    wanted |= more or {}
    for name, text in wanted.items():
        folder.check(name, recognise=text.encode("utf-8", "surrogateescape").__eq__)
    for name, text in wanted.items():
        folder.write_text(name, text)
    for name in {*(f"{split}.csv" for split in SPLITS), "segments.csv", KEPT} - set(wanted):
        if folder.is_own(name):
            folder.remove(name)
    return {split: len(rows) for split, rows in texts.items()}


KEPT = "kept_in_train.txt"
"""The groups of videos that an import put into train because a class had no other training video."""


def kept_in_train(out: Path) -> list[str]:
    """The content of :data:`KEPT` in `out`, if an earlier import wrote it."""
    folder = OutputFolder(out, "data import")
    return as_text(read_annotations(out / KEPT), out / KEPT).splitlines() if folder.is_own(KEPT) else []


# ------------------------------------------------------------------------------------------------------------- parts


def _rows_of(found: Imported, split: str) -> list[str]:
    """The lines of a split's annotation file."""
    from multitrain.data.tools.import_segments import annotation_line

    number = {name: i for i, name in enumerate(found.classes)}
    return [
        annotation_line(s, sorted(number[x] for x in s.labels), cut=found.cut)
        for s in found.samples
        if s.split == split
    ]


def _segments(samples: Iterable[Sample]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["source", "start", "end", "path"])
    for sample in samples:
        if sample.segment:
            source, start, end = sample.segment
            writer.writerow([source, f"{start:.3f}", f"{end:.3f}", sample.path])
    return text.getvalue()


def _check_path(path: str, files: list[Path]) -> None:
    """Raise CatalogError for a name that leaves the folder of videos, or that a line cannot hold."""
    if os.path.isabs(path) or os.path.normpath(path) == "." or ".." in path.split(os.sep):
        raise CatalogError(f"{files[0]}: video {quoted(path)} leads out of the folder of videos; correct its entry")
    if printable(path) != path or path != path.strip():
        raise CatalogError(
            f"{files[0]}: video {quoted(path)} has control characters, or blanks at its ends, in its name; correct its entry"
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _with_names(sample: Sample, names: list[str], file: Path) -> Sample:
    wrong = [x for x in sample.labels if not _is_number(x) or int(x) >= len(names)]
    if wrong:
        raise CatalogError(f"{sample.path}: label {wrong[0]!r} is not one of the {len(names)} in {file}")
    return replace(sample, labels=tuple(names[int(x)] for x in sample.labels))


def named(out: Imported, classes: Path | None) -> Imported:
    """Number the classes of `out`: as in the file `classes`, else the classes with a video in alphabetical order."""
    used = {label for s in out.samples for label in s.labels}
    out.classes = class_list(classes) if classes else sorted(used)
    unknown = sorted(used - set(out.classes))
    if unknown:
        raise CatalogError(
            f"{classes}: class {unknown[0]!r} is not in it (and {len(unknown) - 1} more); {nearest(unknown[0], out.classes)}"
        )
    return out


def class_list(file: Path) -> list[str]:
    """Class names in label order: see :mod:`multitrain.config.class_names`. Raises ConfigError, also for a repeated name."""
    names = read_class_names(file)
    if said := repeated_name(names):
        raise CatalogError(f"{file}: {said}; give each its own name")
    return names


def split_of(name: str, file: Path, line: int) -> str:
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    for word in words:
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    where = f"{file}:{line}" if line else str(file)
    raise CatalogError(f"{where}: {name!r} is no split; its name must say train, validation or test")


def _note_unlabelled(out: Imported, file: Path, count: int) -> None:
    if count:
        out.notes.append(f"{file.name}: {count} videos without a label left out")


def _rows(file: Path, at_least: int, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Non-blank rows with their line numbers."""
    for number, row in enumerate(
        csv.reader(as_text(read_annotations(file), file).splitlines(), delimiter=delimiter), start=1
    ):
        if not any(row):
            continue
        if len(row) < at_least:
            raise CatalogError(
                f"{file}:{number}: {len(row)} columns, not {at_least} or more; restore the official file"
            )
        yield number, [cell.strip() for cell in row]


def _rows_with_header(file: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    rows = _rows(file, 1)
    _, header = next(rows, (1, []))
    absent = [name for name in needed if name not in header]
    if absent:
        raise CatalogError(f"{file}:1: no column {absent[0]!r} in {','.join(header)!r}; restore the official file")
    for number, row in rows:
        if len(row) != len(header):
            raise CatalogError(f"{file}:{number}: {len(row)} columns, not {len(header)}; restore the official file")
        yield number, dict(zip(header, row))
