"""Annotation files as memory-mapped indexes, parsed once and shared by all processes of a node.

    python -m multitrain.data.catalog CONFIG.yaml --index DIR [--json]

checks all annotation files of a run and prints a summary. Imports neither torch nor OpenCV.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from multitrain.config import ConfigError, DataConfig, DatasetConfig, RunConfig, load, nearest
from multitrain.config.arguments import OneLineParser
from multitrain.config.class_names import find_class_names, read_class_names, repeated_name
from multitrain.config.paths import is_remote
from multitrain.config.reading import shown
from multitrain.data import remote, storage
from multitrain.data.annotations import CatalogError, Syntax, lines, read_annotations
from multitrain.data.index import ensure_index, read_index
from multitrain.data.packs import at_address
from multitrain.data.presence import PresenceCheck, absent, frames_column, segment_columns
from multitrain.data.segment import Segment, named
from multitrain.order import Plan, Source

Split = Literal["train", "val", "test"]

_PROBED = 4
"""Number of videos at the top of a csv, at least one of which must exist."""
_VIDEOS_CHECKED = 300
"""Number of videos, spread over a csv, whose files a submission looks for."""
_LOOK_SECONDS = 2.0
"""Maximum seconds per csv for this, on a slow disk; at least :data:`_PROBED` files are looked for."""

_log = logging.getLogger(__name__)


class Catalog:
    """The videos of one split of one dataset, in the order of the csv.

    A video may be a segment of a file (`data.datasets.NAME.segments`). Its name says so, and it is opened and scored under that name.

    Attributes:
        name: the dataset's name.
        csv: the annotation file.
        videos: the folder from which paths start; for a pack at an address, the folder with its index.
        address: the address of the pack, or None.
        classes: number of classes; labels are below it.
        class_names: one name per class, or None.
        multi_label: whether a video may have several labels.
        digest: hex digest of the paths and labels in order, the digest version and the stride; independent of line ends.
        duplicates: number of lines that repeat an earlier line.
    """

    def __init__(
        self,
        index: Path,
        *,
        name: str,
        csv: Path,
        videos: Path,
        classes: int,
        class_names: list[str] | None,
        stride: int = 1,
        address: str | None = None,
    ) -> None:
        self.name, self.csv, self.videos, self.address = name, csv, videos, address
        self.classes, self.class_names = classes, class_names
        self._index, self._stride = index, stride
        self._map()

    @staticmethod
    def open(dataset: DatasetConfig, name: str, split: Split, index_dir: Path | str, stride: int = 1) -> Catalog:
        """Open a split of a dataset, with all checks that need only a few file look-ups.

        Args:
            index_dir: folder for index files; created if missing; many processes and machines may share it.
            stride: keep every n-th line, starting with the first.

        Raises:
            CatalogError: the csv is missing, malformed or empty, has an invalid label, or one path with two labels; class
                names are missing; the video folder is missing, or paths do not start from it.
        """
        classes = resolve_classes(dataset)
        csv = _annotation_file(dataset, name, split)
        syntax = Syntax.of(dataset, csv)
        address = dataset.videos if is_remote(dataset.videos) else None
        videos = Path(os.path.abspath(dataset.videos if address is None else _mirror(address, Path(index_dir))))
        index = ensure_index(csv, syntax, Path(index_dir), videos)
        catalog = Catalog(
            index,
            name=name,
            csv=csv,
            videos=videos,
            address=address,
            classes=classes,
            class_names=_class_names(dataset, classes),
            stride=stride,
        )
        if catalog.class_names and split == "train" and (said := repeated_name(catalog.class_names)):
            _log.warning("%s: %s, so results do not tell them apart; give each its own name", csv.parent, said)
        catalog._check_labels(syntax)
        catalog._check_videos(name)
        if catalog.duplicates:
            _log.warning(
                "%s: %d lines repeat an earlier line; these videos count more than once", csv, catalog.duplicates
            )
        return catalog

    def _map(self) -> None:
        if self.address is not None:
            at_address(self.videos, self.address)
        try:
            header, arrays = read_index(self._index)
        except (OSError, ValueError) as error:
            raise CatalogError(
                f"{self._index}: index of {self.csv} cannot be read ({error}); open the dataset again"
            ) from error
        self._paths, self._starts, self._labels, self._label_starts = arrays[:4]
        self._segments = arrays[4] if len(arrays) > 4 else None
        self.multi_label: bool = header["multi_label"]
        self.duplicates: int = header["duplicates"]
        self._largest: int = header["largest_label"]
        self.digest: str = header["digest"] if self._stride == 1 else f"{header['digest']}/{self._stride}"

    def __len__(self) -> int:
        return -(-(len(self._starts) - 1) // self._stride)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for array in ("_paths", "_starts", "_labels", "_label_starts", "_segments"):
            del state[array]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def path(self, i: int) -> Path:
        """Video `i`, to open: a file, or a segment of one (`multitrain.data.segment`). Raises IndexError outside range(len(self))."""
        return self.videos / self.relative_path(i)

    def file(self, i: int) -> Path:
        """The file of video `i`, also if the video is a segment of it."""
        return self.videos / self.file_path(i)

    def relative_path(self, i: int) -> str:
        """The path of video `i` as written in the csv, with its segment, if it is one."""
        return named(self.file_path(i), self.segment(i))

    def segment(self, i: int) -> Segment | None:
        """The segment of its file that video `i` is; None for the complete file."""
        row = self._row(i)
        start, end = (np.nan, np.nan) if self._segments is None else self._segments[2 * row : 2 * row + 2].tolist()
        return None if math.isnan(start) else Segment(start, end)

    @property
    def has_segments(self) -> bool:
        """Whether a video may be a segment of its file."""
        return self._segments is not None

    def file_path(self, i: int) -> str:
        """The path of the file of video `i` as written in the csv."""
        row = self._row(i)
        return os.fsdecode(self._paths[self._starts[row] : self._starts[row + 1]].tobytes())

    def labels(self, i: int) -> tuple[int, ...]:
        """The labels of video `i`, each in range(classes): one, or for multi-label data one or more."""
        row = self._row(i)
        if not self.multi_label:
            return (int(self._labels[row]),)
        return tuple(self._labels[self._label_starts[row] : self._label_starts[row + 1]].tolist())

    def label_array(self) -> np.ndarray:
        """All labels: int64 [len]; for multi-label data bool [len, classes]."""
        if not self.multi_label:
            return self._labels[:: self._stride].astype(np.int64)
        hot = np.zeros((len(self), self.classes), dtype=bool)
        for i in range(len(self)):
            hot[i, self.labels(i)] = True
        return hot

    def _row(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.csv} has no video {i}; it has {len(self)}")
        return i * self._stride

    def _check_labels(self, syntax: Syntax) -> None:
        if self._largest < self.classes:
            return
        from_one = self._largest == self.classes and bool(self._labels.min() == 1)
        remedy = "labels seem to be numbered from 1: subtract 1 from each; else " if from_one else ""
        for line in lines(read_annotations(self.csv), self.csv, syntax):
            if line.labels[-1] >= self.classes:
                raise CatalogError(
                    f"{self.csv}:{line.number}: label {line.labels[-1]} of {shown(os.fsdecode(line.path))!r} with classes={self.classes}, "
                    f"whose labels are 0 to {self.classes - 1}; {remedy}correct the line, or the number of classes of {self.name!r}"
                )
        raise CatalogError(f"{self.csv}: changed while it was read; try again")

    def _check_videos(self, name: str) -> None:
        if not self.videos.is_dir():
            raise CatalogError(
                f"{self.videos}: no such folder of videos; set data.datasets.{name}.videos to the folder that "
                f"the paths in {self.csv} start from"
            )
        found = self.look(_PROBED, spread=False)
        if found.missing == found.looked:
            raise CatalogError(self._nothing_there(found, f"none of the first {found.looked} videos exists"))

    def look(
        self, most: int = _VIDEOS_CHECKED, *, spread: bool = True, seconds: float = _LOOK_SECONDS
    ) -> PresenceCheck:
        """Look for the files of up to `most` videos, spread evenly over the csv, for at most about `seconds` seconds."""
        count = min(most, len(self))
        rows = [i * len(self) // count for i in range(count)] if spread else list(range(count))
        rows = rows[::2] + rows[1::2]  # so that the first half is spread evenly, too
        deadline = time.monotonic() + seconds
        missing, example, looked = 0, None, 0
        for i in rows:
            if looked >= _PROBED and time.monotonic() > deadline:
                break
            looked += 1
            if (reason := absent(self.file(i))) is not None:
                missing += 1
                if example is None or i < example[0]:
                    example = (i, reason)
        return PresenceCheck(len(self), looked, missing, *(example or (0, "")))

    def refuse_missing(self, cap: float) -> None:
        """Warn about missing videos among those that were looked for.

        Raises:
            CatalogError: so many are missing that training would stop at `cap` (`data.skip_cap`).
        """
        found = self.look()
        if not found.missing:
            return
        many = f"{found.missing} of the {found.looked} videos looked at ({100 * found.missing / found.looked:.0f} %) are missing"
        if found.missing == found.looked:
            many = f"none of the {found.looked} videos looked at exists"
        if found.more_than(cap):
            raise CatalogError(
                self._nothing_there(found, many, f"; data.skip_cap={cap:g} lets no more than that share pass")
            )
        _log.warning(
            "%s: %s, e.g. %s; `multitrain data check` looks at all, and --write-clean leaves them out",
            self.csv, many, shown(self.file(found.example)),
        )  # fmt: skip

    def _nothing_there(self, found: PresenceCheck, what: str, why: str = "") -> str:
        what = what if len(self) > 1 else "the video does not exist"
        line = self._line(found.example)
        path, name = self.file(found.example), self.file_path(found.example)
        known = frames_column(name, self.videos)
        if name[:1] == name[-1:] and name[:1] in "'\"":
            return f"{self.csv}:{line}: {what}: {name[0]} stands around the path {shown(name)}; write it without"
        if known is not None:
            return f"{self.csv}:{line}: {what}: lines are 'path frames label', as {known} says; keep 'path label'"
        if (cut := segment_columns(name, self.videos)) is not None:
            return (
                f"{self.csv}:{line}: {what}: lines are 'path start end label', as {cut} says; "
                f"set data.datasets.{self.name}.segments=true"
            )
        if found.reason == "unreadable":
            return f"{self.csv}:{line}: {what}: {shown(path)} may not be read; check the permissions of its folders"
        if found.reason == "folder":
            return f"{self.csv}:{line}: {what}: {shown(path)} is a folder; pictures of frames are not read, name video files"
        return (
            f"{self.csv}:{line}: {what}, e.g. {shown(path)}{why}; set data.datasets.{self.name}.videos (now {self.address or self.videos}) "
            "to the folder that the paths start from, or leave the lines out (multitrain data check --write-clean)"
        )

    def _line(self, i: int) -> int:
        """Line number of video `i` in the csv; blank lines count."""
        row = self._row(i)
        with self.csv.open("rb") as file:
            numbers = (n for n, text in enumerate(file, start=1) if text.strip().removeprefix(b"\xef\xbb\xbf"))
            return next((n for place, n in enumerate(numbers) if place == row), row + 1)


def open_catalogs(data: DataConfig, split: Split, index_dir: Path | str, stride: int = 1) -> dict[str, Catalog]:
    """Open the split of all datasets, in head order. Raises CatalogError as `Catalog.open` does."""
    return {name: Catalog.open(dataset, name, split, index_dir, stride) for name, dataset in data.datasets.items()}


def sources(data: DataConfig, catalogs: Mapping[str, Catalog]) -> list[Source]:
    """The input of the sampling plan: one source per dataset, in head order."""
    return [
        Source(name=name, size=len(catalogs[name]), replicas=d.replicas, weight=d.weight, digest=catalogs[name].digest)
        for name, d in data.datasets.items()
    ]


def plan_of(config: RunConfig, catalogs: Mapping[str, Catalog]) -> Plan:
    """The sampling plan of a run with these training videos."""
    return Plan(
        sources(config.data, catalogs),
        seed=config.seed,
        effective_batch=config.effective_batch,
        mixture=config.data.mixture,
        proportions=config.data.proportions,
        temperature=config.data.temperature,
        group=config.group,
        shuffle_window=config.data.shuffle_window,
        shard_videos=config.data.shard_videos,
    )


def resolve_classes(dataset: DatasetConfig) -> int:
    """Number of classes: `classes`, or the number of lines of `class_names`.

    Raises:
        CatalogError: the file is missing or empty, or its number of names is not `classes`.
    """
    if dataset.class_names is None:
        if dataset.classes is None:  # the schema requires one of the two
            raise CatalogError(f"{dataset.annotations}: neither classes nor class_names is set; set one of them")
        return dataset.classes
    file = _class_file(dataset)
    count = len(_read_names(file))
    if count == 0:
        raise CatalogError(f"{file}: no class name in it; write one name a line, line n (from 0) naming label n")
    if dataset.classes not in (None, count):
        raise CatalogError(
            f"{file}: {count} class names but classes={dataset.classes}; correct the file, or leave classes out"
        )
    return count


def _class_file(dataset: DatasetConfig) -> Path:
    given = Path(dataset.class_names or "")
    places = [given, Path(dataset.annotations) / given]
    for file in places:
        if os.path.lexists(file) and not file.is_dir():
            return file
    looked = " nor ".join(str(p) for p in dict.fromkeys(places))
    raise CatalogError(
        f"{looked}: no such file of class names; write one name a line, or set classes=N instead of class_names"
    )


def _read_names(file: Path) -> list[str]:
    try:
        return read_class_names(file)
    except ConfigError as error:
        raise CatalogError(str(error)) from None


def _class_names(dataset: DatasetConfig, classes: int) -> list[str] | None:
    if dataset.class_names is not None:
        return _read_names(_class_file(dataset))
    names = find_class_names(Path(dataset.annotations), classes)
    file = Path(dataset.annotations) / "classes.txt"
    if names is None and file.is_file():
        try:
            _log.warning(
                "%s: %d names but classes=%d; classes are shown by number", file, len(_read_names(file)), classes
            )
        except CatalogError as error:
            _log.warning("%s; classes are shown by number", error)
    return names


def _mirror(address: str, folder: Path) -> Path:
    """The folder with the index of the pack at an address. Raises CatalogError."""
    try:
        return remote.mirror(address, folder)
    except ConfigError as error:
        raise CatalogError(str(error)) from None


def _annotation_file(dataset: DatasetConfig, name: str, split: Split) -> Path:
    folder = Path(os.path.abspath(dataset.annotations))
    csv = folder / f"{split}.csv"
    if os.path.lexists(csv):  # read_annotations reports what is not a readable file
        return csv
    option = f"data.datasets.{name}.annotations"
    if not folder.is_dir():
        raise CatalogError(
            f"{folder}: no such folder of annotations; set data.root (or export MULTITRAIN_DATA) to the folder of the datasets, "
            f"or {option} to the folder with {split}.csv ('path label' a line)"
        )
    found = [p.name for p in folder.iterdir() if p.suffix in (".csv", ".txt", ".tsv", ".json")]
    hint = f" ({nearest(csv.name, found)})" if found else ""
    raise CatalogError(
        f"{csv}: no such file{hint}; put it there ('path label' a line), or set {option} to the folder that has it"
    )


def summary(config: RunConfig, index_dir: Path | str) -> dict[str, Any]:
    """Summarise the data of a run: its datasets, the size of an epoch in videos, and the validation videos per dataset.

    Looks for the files of a few hundred videos, spread over each annotation file.

    Raises:
        CatalogError: an annotation file of the run cannot be used, or too many of its videos are missing.
    """
    train = open_catalogs(config.data, "train", index_dir)
    storage.warn(config.data, train)
    validation, tests = {}, {}
    val: dict[str, Catalog] = {}
    if config.eval.every is not None:
        val = open_catalogs(config.data, "val", index_dir, config.eval.val_stride)
        validation = {name: len(catalog) for name, catalog in val.items()}
    if config.then == "eval":
        tests = open_catalogs(config.data, "test", index_dir)
    for catalog in (*train.values(), *val.values(), *tests.values()):
        catalog.refuse_missing(config.data.skip_cap)
    listed = sources(config.data, train)
    return {
        "sources": [
            asdict(s) | {"classes": train[s.name].classes, "duplicates": train[s.name].duplicates} for s in listed
        ],
        "epoch_size": sum(s.draws for s in listed),
        "validation": validation,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 2 for annotations that cannot be used."""
    parser = OneLineParser("python -m multitrain.data.catalog", "Check the annotation files of a run.")
    parser.add_argument("config", type=Path, help="config.yaml of a run, or the run's folder")
    parser.add_argument("--index", type=Path, required=True, help="folder for the index files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--clips", type=float, help="print only what a node that trains on so many clips per second reads of packs"
    )
    given = parser.parse_args(arguments)
    try:
        config = load(given.config)
        found = summary(config, given.index)
        if given.clips is not None:
            catalogs = open_catalogs(config.data, "train", given.index)
            print("\n".join(storage.lines(config, catalogs, plan_of(config, catalogs), given.clips)))
            return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(found))
        return 0
    for source in found["sources"]:
        twice = f", {source['duplicates']} of them repeated lines" if source["duplicates"] else ""
        val = f", {found['validation'][source['name']]} for validation" if source["name"] in found["validation"] else ""
        print(
            f"{source['name']}: {source['size']} videos of {source['classes']} classes × {source['replicas']}{twice}{val}"
        )
    print(f"epoch: {found['epoch_size']} videos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
