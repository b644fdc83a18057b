"""``multitrain embed``: features of videos."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from multitrain.commands.common import MODEL, device
from multitrain.config import ConfigError, RunConfig, nearest
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.config.reading import read_bytes, refuse_utf16
from multitrain.text import printable


def _parser() -> Parser:
    parser = Parser(
        "embed",
        "Features of videos, [N, channels], as .npz or .parquet, and a map of them coloured by dataset and class.",
        "multitrain embed runs/first clip.mp4 other.mp4 --out features.npz",
        "multitrain embed runs/first --list videos.txt --out features.parquet --plot map.png",
        "multitrain embed runs/first --dataset kinetics ssv2 --per-dataset 500 --out features.npz --plot map.png",
    )
    parser.add_model(MODEL)
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="video files")
    parser.add_argument(
        "--list",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file with more video files, one per line",
    )
    parser.add_argument(
        "--dataset",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="videos that a dataset of the model lists",
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="split of these datasets (default test)"
    )
    parser.add_argument(
        "--per-dataset", type=whole_number, metavar="N", help="at most N videos of each dataset, spread evenly"
    )
    parser.add_argument(
        "--views", default="centre", choices=("centre", "test"), help="one clip, or the mean over the multi-view test"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("features.npz"), metavar="FILE", help=".npz or .parquet (default features.npz)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a map of two principal components, as PNG")
    parser.add_argument(
        "--index", type=Path, default=Path(".index"), metavar="DIR", help="folder for the index of annotation files"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(overrides=[])
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain embed``; returns the exit status: 0, or 1 if a video could not be read."""
    parser = _parser()
    given = parser.parse_with_overrides(arguments)
    given.checkpoint, given.videos = parser.model_and_words(given, given.videos)
    if given.out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"--out {given.out}: features are written as .npz or .parquet")
    from multitrain.evaluation import embed as e
    from multitrain.evaluation.predictor import load
    from multitrain.evaluation.settings import with_overrides
    from multitrain.files import check_output, output_file, refuse_same

    refuse_same({"--out": given.out, "--plot": given.plot})
    for target in filter(None, (given.out, given.plot)):
        check_output(target, e.MAKER, [given.checkpoint, *given.videos])
    model = load(given.checkpoint)
    config = with_overrides(model.run, given.overrides, config_dirs=given.config_dir)
    model.run = config
    items = [e.Item(v) for v in given.videos]
    for file in given.list:
        items += map(e.Item, _lines(file))
    for name in given.dataset:
        if name not in model.datasets:
            raise ConfigError(f"--dataset {name!r} is no dataset of this model; {nearest(name, model.datasets)}")
        items += _listed(config, name, given.split, given.index, given.per_dataset, model.class_names.get(name))
    if not items:
        parser.error("no videos; give files, --list or --dataset")
    model.to(device(given.device))
    found = e.embed(model, items, views=given.views, progress=_progress)
    e.write(found, given.out)
    if given.plot:
        drawn = e.feature_map(found)
        with output_file(given.plot, e.MAKER, e.sources(found)) as temporary:
            temporary.write_bytes(drawn)
    for path, reason in found.unreadable.items():
        print(printable(f"multitrain: {path}: {reason}"), file=sys.stderr)
    if given.json:
        print(json.dumps({"out": str(given.out), "videos": len(found.items), "unreadable": found.unreadable}))
    else:
        print(f"{given.out}: {len(found.items)} videos × {found.features.shape[1]}")
    return 1 if found.unreadable else 0


def _lines(file: Path) -> list[str]:
    """The paths in a file, one per line; names may have any encoding."""
    content = read_bytes(file)
    refuse_utf16(content, file)
    if (nul := content.find(b"\0")) >= 0:
        number = content.count(b"\n", 0, nul) + 1
        raise ConfigError(f"{file}:{number}: a NUL byte in it, which no path can hold; it holds one video file a line")
    named = (line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    return [os.fsdecode(name) for name in named if name]


def _listed(config: RunConfig, name: str, split: str, index: Path, most: int | None, names: list[str] | None) -> list:  # type: ignore[type-arg]
    import numpy as np

    from multitrain.data.catalog import Catalog
    from multitrain.evaluation.embed import Item

    catalog = Catalog.open(config.data.datasets[name], name, split, index)  # type: ignore[arg-type]
    names = names or catalog.class_names
    count = min(most or len(catalog), len(catalog))
    chosen = np.unique(np.linspace(0, len(catalog) - 1, count).round().astype(int)).tolist()
    return [
        Item(str(catalog.path(i)), name, ", ".join(names[x] if names else str(x) for x in catalog.labels(i)))
        for i in chosen
    ]


def _progress(done: int, of: int) -> None:
    if done % 100 == 0:
        print(f"{done} of {of} videos", file=sys.stderr, flush=True)
