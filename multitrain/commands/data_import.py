"""``multitrain data import``: a folder of videos, or official annotation files, as `path label` files and a dataset for ``data=NAME``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.config.machine import own_command
from multitrain.text import counted, printable, quoted

if TYPE_CHECKING:
    from multitrain.data.tools.importing import Imported


def _parser() -> Parser:
    from multitrain.data.tools.own_data import ALIASES, Options, readers

    formats = readers(Options())
    parser = Parser(
        "data import",
        "Videos in class folders, or annotation files, as train.csv, val.csv, test.csv (`path label` lines), classes.txt and\n"
        "data/NAME.yaml, the dataset for data=NAME. At its end it prints the command that trains on them.\n\nformats and their files:\n"
        + "\n".join(f"  {name:<14} {files}" for name, (_, files) in formats.items())
        + f"\nother names: {', '.join(f'{other} is {name}' for other, name in ALIASES.items())}",
        "multitrain data import folder clips --out mine",
        "multitrain data import folder clips --out mine --group-by '(person[0-9]+)'",
        "multitrain data import table videos.csv --path-column file --label-column action --out mine",
        "multitrain data import ucf101 ucfTrainTestlist --split 1 --videos UCF-101 --out ucf101",
        "multitrain data import kinetics train.csv validate.csv --videos /data/k400 --out k400",
        "multitrain data import something train.json validation.json --classes labels.json --out ssv2",
    )
    parser.add_argument("format", metavar="FORMAT", help=", ".join(formats))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the folder of videos, or annotation files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files that are written")
    parser.add_argument("--name", metavar="NAME", help="name of the dataset (default: that of --out)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the dataset's own list of classes or label map")
    parser.add_argument(
        "--videos", type=Path, metavar="DIR", help="look for the videos here, whatever the tree's layout"
    )
    parser.add_argument("--present", action="store_true", help="leave out videos that are not below --videos")
    parser.add_argument(
        "--cut",
        action="store_true",
        help="segments as copies that `data resize --segments` cuts, not as 'video start end label' lines",
    )
    _add_splits(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_splits(parser: Parser) -> None:
    parser.add_argument(
        "--val", type=float, default=0.15, metavar="SHARE", help="share of val where no split is given (default 0.15)"
    )
    parser.add_argument("--test", type=float, default=0.15, metavar="SHARE", help="share of test (default 0.15)")
    parser.add_argument(
        "--group-by",
        metavar="COLUMN|PATTERN",
        help="what a video comes from (person, recording), never in two splits: a column of a table, or a regular expression "
        "with one group, searched in the path",
    )
    parser.add_argument(
        "--split",
        type=whole_number,
        default=1,
        choices=(1, 2, 3),
        help="official split of ucf101 and hmdb51 (default 1)",
    )
    for name in ("path", "label", "split"):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"column of a table with the {name}")


def main(arguments: Arguments) -> int:
    """``multitrain data import``; returns the exit status."""
    from multitrain.data.tools.importing import kept_in_train
    from multitrain.data.tools.lists import Columns
    from multitrain.data.tools.own_data import Options, dataset_name, dataset_yaml, read_any
    from multitrain.data.tools.splitting import Division

    parser = _parser()
    given = parser.parse_args(list(arguments))
    if given.present and not given.videos:
        parser.error("--present needs --videos")
    columns = Columns(given.path_column, given.label_column, given.split_column)
    division = Division(given.val, given.test, frozenset(kept_in_train(given.out)))
    options = Options(division, given.group_by, given.split, columns, given.videos, given.out)
    found, kept = read_any(given.format, given.files, given.classes, options)
    found.cut = given.cut
    missing = _look_for(given, found)
    name = dataset_name(given.name or given.out.resolve().name)
    entry = dataset_yaml(name, given.out, found, shlex.join(["multitrain", "data", "import", *arguments]))
    to_cut = found.cut and any(s.segment for s in found.samples)
    ready = found.videos is not None and not to_cut
    home = Path(given.config_dir[0]) if given.config_dir else given.out
    written = _write(given, found, kept, home, {f"data/{name}.yaml": entry} if ready else {})
    if given.json:
        print(json.dumps({"classes": len(found.classes), "videos": written, "missing": missing, "notes": found.notes}))
        return 0
    _report(given, found, written, missing)
    if ready:
        print(f"{home}/data/{name}.yaml: the dataset {name}, for data={name}")
        print(f"next: {_next_command(home, name)}")
    else:
        print(f"as a dataset of a run (DIR/data/{name}.yaml, for --config-dir DIR data={name}):\n{entry}", end="")
    return 0


def _look_for(given: argparse.Namespace, found: Imported) -> int | None:
    """Replace the paths by those of the files below ``--videos``; the number of missing ones, None if they were not looked for."""
    from multitrain.data.tools.import_segments import located as located_segments
    from multitrain.data.tools.importing import find

    if not given.videos:
        return None
    found.videos, missing = given.videos, None
    if found.has_segment_lines:
        found.samples, missing = located_segments(found.samples, given.videos)
        if given.present:
            found.samples = [s for s in found.samples if s.segment and (given.videos / s.segment[0]).is_file()]
    if sources := [s for s in found.samples if s.segment is None]:
        located, missing = find(sources, given.videos)
        if given.present:
            located = [s for s in located if (given.videos / s.path).is_file()]
        found.samples = [*located, *(s for s in found.samples if s.segment)]
    return missing


def _write(
    given: argparse.Namespace, found: Imported, kept: Sequence[str], home: Path, entry: dict[str, str]
) -> dict[str, int]:
    """Write the annotation files, and the dataset's configuration to `home`; the number of lines by split."""
    from multitrain.data.tools.importing import KEPT, write
    from multitrain.files import OutputFolder

    sources = [*given.files, *filter(None, [given.classes])]
    more = {KEPT: "".join(f"{group}\n" for group in kept)} if kept else {}
    if home == given.out:
        return write(found, given.out, sources, more | entry)
    folder = OutputFolder(home, "data import", sources)
    for name in entry:
        folder.check(name)
    written = write(found, given.out, sources, more)
    for name, text in entry.items():
        folder.write_text(name, text)
    return written


def _report(given: argparse.Namespace, found: Imported, written: dict[str, int], missing: int | None) -> None:
    """Print what was found and written; what was left out goes to standard error."""
    from multitrain.data.tools.splitting import smallest_class

    name, count = smallest_class(found.samples)
    classes = f"{len(found.classes)} class{'' if len(found.classes) == 1 else 'es'}"
    print(f"{counted(len(found.samples), 'video')} of {classes}; the smallest is {quoted(name, 60)} with {count}")
    same = written["test"] and not any(s.split == "test" for s in found.samples)
    for split, lines in written.items():
        copy = " (the same as val.csv)" if split == "test" and same else ""
        print(
            f"{given.out}/{split}.csv: {counted(lines, 'video')}{copy}"
            if lines
            else f"{split}: nothing in the given files"
        )
    print(f"{given.out}/classes.txt: {classes}")
    for note in found.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    if missing:
        print(f"note: {missing} of the listed videos are not below {given.videos}", file=sys.stderr)
    if found.cut and any(s.segment for s in found.samples):
        print(f"cut the segments: multitrain data resize VIDEOS COPIES --segments {given.out}/segments.csv")


def _next_command(home: Path, name: str) -> str:
    """The command that trains on the dataset, as it can be pasted here."""
    words = ["submit", "--config-dir", str(home), "experiment=finetune", f"data={name}", f"name={name}"]
    return shlex.join([*own_command(), *words])
