"""``multitrain nearest``: the most similar classes of other datasets for each class."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from multitrain.commands.common import MODEL
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, pair, whole_number


def _parser() -> Parser:
    parser = Parser(
        "nearest",
        "Related classes of different datasets, by the weights of the learned projections; strongest pairs first.",
        "multitrain nearest runs/k400_mit_ssv2 --pair ssv2=kinetics --top 3 --plot heat.png",
    )
    parser.add_model(MODEL)
    parser.add_argument(
        "--pair", action="append", default=[], metavar="SOURCE=TARGET", help="datasets to compare (default: all pairs)"
    )
    parser.add_argument(
        "--top", type=whole_number, default=1, metavar="N", help="target classes per source class (default 1)"
    )
    parser.add_argument(
        "--rows", type=whole_number, default=20, metavar="N", help="lines of the table per pair (default 20)"
    )
    parser.add_argument(
        "--classes", action="append", default=[], metavar="DATASET=FILE", help="class names, one a line"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="heat maps of the strongest classes, as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all matches")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain nearest``; returns the exit status."""
    parser = _parser()
    given = parser.parse_args(list(arguments))
    given.model, _ = parser.model_and_words(given, [])
    from multitrain.evaluation import nearest as n
    from multitrain.evaluation.embed import MAKER
    from multitrain.evaluation.predictor import load
    from multitrain.files import check_output, output_file
    from multitrain.text import table

    if given.plot:
        check_output(given.plot, MAKER, [given.model])
    model = load(given.model, class_names=dict(pair(text, "--classes") for text in given.classes))
    pairs = [pair(text, "--pair") for text in given.pair] or [
        (a, b) for a in model.datasets for b in model.datasets if a != b
    ]
    if not pairs:
        raise ConfigError("this model has one dataset; classes are compared across datasets")
    found = {(a, b): n.matches(model, a, b, given.top) for a, b in pairs}
    if given.plot:
        names = {d: [model.label(d, i) for i in range(k)] for d, k in model.datasets.items()}
        drawn = n.heat_map(model, pairs, names)
        with output_file(given.plot, MAKER, [given.model]) as temporary:
            temporary.write_bytes(drawn)
    if given.json:
        listed = [
            {**asdict(m), "source_name": model.label(a, m.source_class), "target_name": model.label(b, m.target_class)}
            for (a, b), ms in found.items()
            for m in ms
        ]
        print(json.dumps({"matches": listed}, ensure_ascii=False))
        return 0
    for (a, b), ms in found.items():
        rows = [
            [model.label(a, m.source_class), model.label(b, m.target_class), f"{m.score:.2f}", f"{m.weight:.3f}"]
            for m in ms[: given.rows]
        ]
        print(table([a, b, "std. deviations", "weight"], rows, left=2) + "\n")
    return 0
