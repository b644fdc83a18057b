"""Import lists of videos as other projects and benchmarks keep them: UCF101, HMDB51, MMAction2, VideoMAE, PyTorchVideo, and tables."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multitrain.config import nearest
from multitrain.config.reading import as_text, parse_json, read_json
from multitrain.data.annotations import CatalogError, Syntax, lines, read_annotations
from multitrain.data.tools.importing import VIDEO_ENDINGS, Imported, Sample, class_list, named, split_of
from multitrain.data.tools.splitting import UNSPLIT
from multitrain.text import counted, quoted

PATH_COLUMNS = (
    "path",
    "video",
    "video_path",
    "video_name",
    "file",
    "filename",
    "file_name",
    "clip",
    "clip_path",
    "name",
)
LABEL_COLUMNS = ("label", "class", "label_name", "class_name", "action", "category", "label_id")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
"""Names of columns of a table, in any case, that are looked for when none is given."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table by name; None: looked for."""

    path: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    """The column that names what a video comes from; None, or no column of the table: none."""


# --------------------------------------------------------------------------------------------------- official splits


def ucf101(files: list[Path], classes: Path | None, split: int = 1) -> Imported:
    """``trainlist01.txt`` (``CLASS/FILE.avi number``) and ``testlist01.txt`` of a folder or as files; test is also validation."""
    given = _inside(files, f"*list{split:02d}.txt")
    out = Imported([], [])
    for file in given:
        side = "train" if file.name.startswith("train") else "val"
        for number, line in _text_lines(file):
            path = re.sub(r"\s+[0-9]+$", "", line)
            if "/" not in path:
                raise CatalogError(f"{file}:{number}: {quoted(line)} is not CLASS/FILE; give the official split file")
            out.samples.append(Sample(side, path, (path.split("/")[0],)))
    index = next((f for f in {file.parent / "classInd.txt" for file in given} if f.is_file()), None)
    if classes is None and index is not None:  # numbered from 1
        rows = [line.split(maxsplit=1) for _, line in _text_lines(index)]
        out.classes = [row[1] for row in sorted(rows, key=lambda row: int(row[0]))]
        return _known(out, index)
    return named(out, classes)


def hmdb51(files: list[Path], classes: Path | None, split: int = 1) -> Imported:
    """``CLASS_test_splitN.txt`` (``FILE.avi 1``: training, 2: test, 0: unused) of a folder or as files; test is also validation."""
    out = Imported([], [])
    unused = 0
    for file in _inside(files, f"*_test_split{split}.txt"):
        label = file.name.rpartition("_test_split")[0]
        for number, line in _text_lines(file):
            name, _, side = line.rpartition(" ")
            if side not in ("0", "1", "2") or not label:
                raise CatalogError(
                    f"{file}:{number}: {quoted(line)} is not 'FILE 0|1|2'; give the official split files"
                )
            unused += side == "0"
            if side != "0":
                out.samples.append(Sample("train" if side == "1" else "val", f"{label}/{name.strip()}", (label,)))
    if unused:
        out.notes.append(f"split {split} leaves {counted(unused, 'video')} unused")
    return named(out, classes)


def _inside(files: Sequence[Path], pattern: str) -> list[Path]:
    """The files of `pattern` in the given folders, and the given files that match it. Raises CatalogError: there is none."""
    found = [f for given in files for f in (sorted(given.glob(pattern)) if given.is_dir() else [given])]
    found = [f for f in found if f.match(pattern)]
    if not found:
        raise CatalogError(
            f"{files[0]}: no {pattern} in it; give the folder of the official splits, and --split 1, 2 or 3"
        )
    return found


def _known(found: Imported, file: Path) -> Imported:
    known = set(found.classes)
    for sample in found.samples:
        if sample.labels[0] not in known:
            raise CatalogError(f"{file}: class {quoted(sample.labels[0])} is not in it; restore the official file")
    return found


# ---------------------------------------------------------------------------------------------- lists of other projects


def path_lists(files: list[Path], classes: Path | None) -> Imported:
    """Lines ``path label``, ``path frames label`` or ``path start frames label``, separated by blanks, tabs or commas, in files whose
    names say train, val or test."""
    out = Imported([], [], may_cut=True)
    labelled: list[tuple[Sample, int]] = []
    counts = bare = 0
    for file in files:
        split, content = split_of(file.stem, file, 0), read_annotations(file)
        for line in lines(content, file, Syntax(_separator(content), False)):
            path = line.path.decode("utf-8", "surrogateescape")
            short = re.sub(r"([\s,]+-?[0-9]+)+$", "", path)
            counts += short != path
            bare += not short.lower().endswith(VIDEO_ENDINGS)
            labelled.append((Sample(split, short, ()), line.labels[0]))
    if counts:
        out.notes.append(f"left out the columns of numbers between path and label of {counted(counts, 'line')}")
    if bare:
        out.notes.append(
            f"{counted(bare, 'path')} without a video's suffix: frames are not read; --videos DIR looks for videos of these names"
        )
    return _numbered(out, labelled, classes, files[0])


def _separator(content: bytes) -> bytes:
    """The separator before the label, from the first line."""
    first = next((line for line in content.splitlines() if line.strip()), b"")
    found = re.search(rb"([\t, ])\s*-?[0-9]+\s*$", first)
    return found[1] if found else b" "


def _numbered(out: Imported, labelled: Sequence[tuple[Sample, int]], classes: Path | None, file: Path) -> Imported:
    """The samples with the names of their labels: of the list `classes`, else the numbers themselves."""
    most = max((label for _, label in labelled), default=-1)
    out.classes = class_list(classes) if classes else [str(n) for n in range(most + 1)]
    if most >= len(out.classes):
        raise CatalogError(
            f"{file}: label {most}, and {classes} has {len(out.classes)} names; give the list of this dataset"
        )
    if not classes and most > 10 * len(labelled) + 1000:
        raise CatalogError(f"{file}: label {most} of {counted(len(labelled), 'video')}; is its last column the label?")
    out.samples = [replace(sample, labels=(out.classes[label],)) for sample, label in labelled]
    return out


# --------------------------------------------------------------------------------------------------------------- tables


def table(files: list[Path], classes: Path | None, columns: Columns | None = None) -> Imported:
    """A csv, tsv, jsonl or JSON file with a row per video, and named columns for path and label, and for split if there is one."""
    wanted = columns or Columns()
    out = Imported([], [], may_cut=True)
    rows = [(file, number, row) for file in files for number, row in _table_rows(file)]
    if not rows:
        raise CatalogError(f"{files[0]}: no row in it; it has a row per video, with a header line")
    names = list(rows[0][2])
    path = _column(names, wanted.path, PATH_COLUMNS, "--path-column", files[0])
    label = _column(names, wanted.label, LABEL_COLUMNS, "--label-column", files[0])
    split = wanted.split or next((n for n in names if n.lower() in SPLIT_COLUMNS), None)
    if wanted.split:
        _column(names, wanted.split, (), "--split-column", files[0])
    group = wanted.group if wanted.group in names else None
    for file, number, row in rows:
        values = {name: _cell(row, name, file, number) for name in filter(None, (path, label, split, group))}
        if not values[path] or not values[label]:
            raise CatalogError(f"{file}:{number}: no {path if not values[path] else label} in the row; complete it")
        side = values[split] if split else ""
        out.samples.append(Sample(split_of(side, file, number) if side else UNSPLIT, values[path], (values[label],)))
        if group:
            out.groups[values[path]] = values[group]
    used = {"path": path, "label": label, "split": split, "group": group}
    out.notes.append("columns: " + ", ".join(f"{what} is {quoted(name)}" for what, name in used.items() if name))
    if all(s.labels[0].isascii() and s.labels[0].isdigit() and len(s.labels[0]) < 10 for s in out.samples):
        return _numbered(out, [(s, int(s.labels[0])) for s in out.samples], classes, files[0])
    return named(out, classes)


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], option: str, file: Path) -> str:
    """The column of this purpose. Raises CatalogError: it is not in the table, or none is given and none has a usual name."""
    if given is not None:
        if given not in names:
            raise CatalogError(f"{file}: no column {quoted(given)}; {option}: {nearest(given, names)}")
        return given
    lower = {name.lower(): name for name in reversed(names)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None:
        raise CatalogError(f"{file}: columns {', '.join(map(quoted, names[:12]))}; say which one with {option} NAME")
    return found


def _cell(row: Mapping[str, Any], name: str, file: Path, number: int) -> str:
    value = row.get(name)
    if value is None or isinstance(value, bool):
        return ""
    if not isinstance(value, (str, int, float)):
        raise CatalogError(f"{file}:{number}: {quoted(name)} is no text or number; write one value")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _table_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row) of a table."""
    if file.suffix.lower() == ".json":
        found = read_json(file)
        if not isinstance(found, list):
            raise CatalogError(f'{file}: no list of objects; write [{{"path": …, "label": …}}, …]')
        yield from ((n, _object(row, file, n)) for n, row in enumerate(found, start=1))
        return
    text = as_text(read_annotations(file), file)
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield number, _object(parse_json(line, f"{file}:{number}"), file, number)
        return
    head = text.split("\n", 1)[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max("\t,;", key=head.count), restkey="", restval=None)
    names = [(name or "").strip() for name in reader.fieldnames or ()]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise CatalogError(f"{file}:1: two columns are called {quoted(twice)}; rename one")
    for row in reader:
        if "" in row and any(row.pop("") or []):
            raise CatalogError(
                f"{file}:{reader.line_num}: more cells than columns; quote cells that hold the separator"
            )
        yield reader.line_num, {(name or "").strip(): value for name, value in row.items()}


def _object(row: Any, file: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise CatalogError(f'{file}:{number}: no object; write {{"path": …, "label": …}} per row')
    return row


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a text file with their numbers, without blanks at their ends."""
    for number, line in enumerate(as_text(read_annotations(file), file).splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


# ---------------------------------------------------------------------------------------------------------------- paths


def located(found: Imported, given: Path | None, near: Path) -> Imported:
    """The samples with paths relative to a folder that holds all their videos, and that folder.

    Args:
        given: the folder, or None: that of absolute paths, else the folder of the list or the working folder, if a video is there.
        near: the list.

    Raises:
        CatalogError: a path is absolute and outside the given folder.
    """
    paths = [s.path for s in found.samples]
    base: Path | None
    if any(map(os.path.isabs, paths)):
        if not all(map(os.path.isabs, paths)):
            raise CatalogError(f"{near}: some paths are absolute and some are not; write all of them in one way")
        base = Path(os.path.abspath(given)) if given else Path(os.path.commonpath([os.path.dirname(p) for p in paths]))
        renamed = {p: _below(p, base, near) for p in paths}
        found.samples = [replace(s, path=renamed[s.path]) for s in found.samples]
        found.groups = {renamed.get(p, p): group for p, group in found.groups.items()}
    else:
        base = given or next((d for d in (near.parent, Path()) if any((d / p).is_file() for p in paths[:20])), None)
        if base is None:
            found.notes.append("none of its first videos lies beside it or here; --videos DIR says where they are")
    return replace(found, videos=base)


def _below(path: str, base: Path, near: Path) -> str:
    relative = os.path.relpath(os.path.normpath(path), base)
    if relative.split(os.sep)[0] == os.pardir:
        raise CatalogError(
            f"{near}: {quoted(path)} does not lie in {base}; give a folder that holds all videos: --videos DIR"
        )
    return relative
