"""``multitrain data import``: official annotation files as `path label` files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.config.arguments import Arguments, Parser

if TYPE_CHECKING:
    from multitrain.data.tools.importing import Imported


def _parser() -> Parser:
    from multitrain.data.tools.importing import FORMATS

    parser = Parser(
        "data import",
        "Official annotation files as train.csv, val.csv, test.csv (`path label` lines) and classes.txt.\n\nformats and their files:\n"
        + "\n".join(f"  {name:<14} {files}" for name, (_, files) in FORMATS.items()),
        "multitrain data import kinetics train.csv validate.csv --videos /data/k400 --out k400",
        "multitrain data import something train.json validation.json --classes labels.json --out ssv2",
        "multitrain data import activitynet activity_net.v1-3.min.json --out anet",
    )
    parser.add_argument("format", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="official annotation files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the annotation files")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data import``; returns the exit status."""
    from multitrain.data.tools.import_segments import located as located_segments
    from multitrain.data.tools.importing import find, read, write

    parser = _parser()
    given = parser.parse_args(list(arguments))
    if given.present and not given.videos:
        parser.error("--present needs --videos")
    found = read(given.format, given.files, given.classes)
    missing, found.cut = None, given.cut
    if given.videos:
        if not given.cut and any(s.segment for s in found.samples):
            found.samples, missing = located_segments(found.samples, given.videos)
            if given.present:
                found.samples = [s for s in found.samples if s.segment and (given.videos / s.segment[0]).is_file()]
        sources = [s for s in found.samples if s.segment is None]
        if sources:
            located, missing = find(sources, given.videos)
            if given.present:
                located = [s for s in located if (given.videos / s.path).is_file()]
            found.samples = [*located, *(s for s in found.samples if s.segment)]
    written = write(found, given.out, [*given.files, *filter(None, [given.classes])])
    if given.json:
        print(json.dumps({"classes": len(found.classes), "videos": written, "missing": missing, "notes": found.notes}))
        return 0
    for split, count in written.items():
        print(f"{given.out}/{split}.csv: {count} videos" if count else f"{split}: nothing in the given files")
    print(f"{given.out}/classes.txt: {len(found.classes)} classes")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if missing:
        print(f"note: {missing} of the listed videos are not below {given.videos}", file=sys.stderr)
    if given.cut and any(s.segment for s in found.samples):
        print(f"cut the segments: multitrain data resize VIDEOS COPIES --segments {given.out}/segments.csv")
    print(_entry(given.out, found))
    return 0


def _entry(out: Path, found: Imported) -> str:
    """The lines of configuration that add this dataset to a run."""
    name = out.resolve().name
    lines = [f"as a dataset of a run (configs/data/{name}.yaml):", "  datasets:", f"    {name}:"]
    lines += [f"      annotations: {out.resolve()}", "      videos: FOLDER OF VIDEOS"]
    lines += [
        f"      class_names: {out.resolve()}/classes.txt",
        *(["      multi_label: true"] if found.multi_label else []),
    ]
    lines += ["      segments: true"] if not found.cut and any(s.segment for s in found.samples) else []
    return "\n".join(lines)
