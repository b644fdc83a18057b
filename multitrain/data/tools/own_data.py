"""Import any format, divide its videos into splits, and write the dataset's configuration: ``multitrain data import``."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from multitrain.data.annotations import CatalogError
from multitrain.data.tools import folders, lists
from multitrain.data.tools.importing import FORMATS, Imported, Reader, read
from multitrain.data.tools.lists import Columns
from multitrain.data.tools.splitting import UNSPLIT, Division, by_pattern, divide, group_names, refuse_leaks
from multitrain.text import quoted

ALIASES = {"mit": "moments", "ssv2": "something", "k400": "kinetics"}
"""Other names of formats."""

SIDES = re.compile(r"\b(left|right|clockwise|counterclockwise|anticlockwise)\b", re.IGNORECASE)
"""Words in the name of a class whose videos have another class when mirrored."""


@dataclass(frozen=True)
class Options:
    """Options of an import."""

    division: Division = field(default_factory=Division)
    group_by: str | None = None
    """A column of a table, or a regular expression with one group, searched in the path."""
    split: int = 1
    """Number of the official split."""
    columns: Columns = field(default_factory=Columns)
    videos: Path | None = None
    out: Path | None = None


def readers(options: Options) -> Mapping[str, tuple[Reader, str]]:
    """By format: its reader, and the files that it takes."""
    columns = replace(options.columns, group=options.group_by)
    listed = (lists.path_lists, "train.txt val.txt [test.txt] [--classes FILE]")
    return {
        "folder": (functools.partial(folders.folder, out=options.out), "DIR, with DIR/CLASS/*.mp4 or DIR/{train,val,test}/CLASS/*.mp4"),
        "table": (functools.partial(lists.table, columns=columns), "videos.csv|tsv|jsonl, with named columns"),
        "ucf101": (functools.partial(lists.ucf101, split=options.split), "ucfTrainTestlist/ --split 1 --videos UCF-101"),
        "hmdb51": (functools.partial(lists.hmdb51, split=options.split), "testTrainMulti_7030_splits/ --split 1 --videos hmdb51"),
        "mmaction2": listed,
        "videomae": listed,
        "pytorchvideo": listed,
        **FORMATS,
    }  # fmt: skip


def read_any(form: str, files: list[Path], classes: Path | None, options: Options) -> tuple[Imported, list[str]]:
    """The annotations of a dataset, with every video in a split; and the groups that were kept in train.

    Raises:
        ConfigError: a file cannot be used, or one group has videos in two splits.
    """
    form = ALIASES.get(form, form)
    found = read(form, files, classes, _relative(readers(options), options, files))
    if found.may_cut:
        _refuse_two_labels(found, files[0])
    groups = found.groups
    if options.group_by is not None and not groups:
        groups = group_names(found.samples, by_pattern(options.group_by))
    refuse_leaks(found.samples, groups)
    sides = {s.split for s in found.samples}
    cut = found.may_cut and "val" not in sides and UNSPLIT not in sides
    if cut:
        found.samples = [replace(s, split=UNSPLIT) if s.split == "train" else s for s in found.samples]
        found.notes.append(
            f"no val in it: its videos come from train{'' if 'test' in sides else ', as those of test do'}"
        )
    free = {"val", "test"} - sides
    division = replace(
        options.division,
        val=options.division.val if "val" in free else 0.0,
        test=options.division.test if "test" in free else 0.0,
    )
    divided = divide(found.samples, division, groups)
    found.samples = divided.samples
    found.notes += divided.notes
    return found, divided.kept


def _refuse_two_labels(found: Imported, near: Path) -> None:
    """Raise CatalogError for a video with two labels, which a run would refuse."""
    first: dict[str, tuple[str, ...]] = {}
    for sample in found.samples:
        if first.setdefault(sample.path, sample.labels) != sample.labels:
            labels = " and ".join(quoted(names[0], 60) for names in (first[sample.path], sample.labels))
            raise CatalogError(f"{near}: {quoted(sample.path)} has the labels {labels}; keep one")


def _relative(
    formats: Mapping[str, tuple[Reader, str]], options: Options, files: list[Path]
) -> dict[str, tuple[Reader, str]]:
    """The same formats; paths of own lists are made relative to the folder of videos before they are checked."""

    def of(reader: Reader) -> Reader:
        return lambda given, classes: lists.located(reader(given, classes), options.videos, files[0])

    own = ("table", "mmaction2", "videomae", "pytorchvideo")
    return {name: (of(reader) if name in own else reader, text) for name, (reader, text) in formats.items()}


def dataset_yaml(name: str, out: Path, found: Imported, command: str) -> str:
    """The content of ``data/NAME.yaml``: the dataset for ``data=NAME``."""
    sides = [label for label in found.classes if SIDES.search(label)]
    mirrored = f"{sides[0]!r} mirrored is another class" if sides else "false where left and right matter"
    lines = {
        "annotations": json.dumps(_plain(out), ensure_ascii=False),
        "videos": json.dumps(_plain(found.videos) if found.videos else "FOLDER OF VIDEOS", ensure_ascii=False),
        "class_names": json.dumps(_plain(out / "classes.txt"), ensure_ascii=False),
        "sampling": "segment  # one frame from each of equal parts of the video; stride: a window at a fixed frame rate",
        "flip": f"{str(not sides).lower()}  # whether a mirrored video keeps its class: {mirrored}",
        **({"multi_label": "true"} if found.multi_label else {}),
        **({"segments": "true"} if found.has_segment_lines else {}),
    }
    body = "".join(f"    {key}: {value}\n" for key, value in lines.items())
    return f"# Written by: {command}\ndatasets:\n  {json.dumps(name)}:\n{body}"


def _plain(path: Path) -> str:
    """An absolute path as a value in which ``${`` names no option."""
    return str(path.expanduser().absolute()).replace("${", "\\${")


def dataset_name(text: str) -> str:
    """A name for ``data=NAME``: letters, digits, ``_`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "mine"
