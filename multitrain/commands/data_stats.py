"""``multitrain data stats``: statistics of a run's datasets, and the samples that its mixture draws."""

from __future__ import annotations

import json
from pathlib import Path

from multitrain.commands.common import configured
from multitrain.commands.data_work import add_index_option, add_run_option
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.files import check_output, output_file


def _parser() -> Parser:
    parser = Parser(
        "data stats",
        "Sizes, class balance, durations and frame rates of each dataset, and the samples that the mixture draws from it.",
        "multitrain data stats experiment=k400_mit_ssv2 data.root=/datasets --plot stats.png",
        "multitrain data stats data=demo data.proportions=temperature data.temperature=2",
    )
    add_run_option(parser)
    add_index_option(parser)
    parser.add_argument(
        "--sample",
        type=whole_number,
        default=100,
        metavar="N",
        help="videos of each dataset to examine (default 100)",
    )
    parser.add_argument(
        "--checked",
        type=Path,
        metavar="DIR",
        help="take lengths from the results of `data check --out DIR`, without opening files",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the distributions as a PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_overrides("data=ssv2 data.root=/datasets")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data stats``; returns the exit status."""
    parser = _parser()
    given = parser.parse_with_overrides(arguments)
    from multitrain.data.tools import stats
    from multitrain.data.tools.parallel_map import Journal
    from multitrain.evaluation.output_folders import index_folder

    if given.plot:
        check_output(given.plot, "data stats")
    config = configured(given.run, given.overrides, given.config_dir)
    index = index_folder(config, given.index)
    scans = Journal.records(given.checked, "check") if given.checked else {}
    found, measured = stats.collect(config, index, given.sample, scans)
    if given.plot:
        with output_file(given.plot, "data stats") as temporary:
            temporary.write_bytes(stats.picture(found, measured))
    print(json.dumps(found) if given.json else stats.text(found))
    return 0
