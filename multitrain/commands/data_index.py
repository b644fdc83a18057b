"""``multitrain data index``: read and index the annotation files of a run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from multitrain.commands.common import configured
from multitrain.commands.data_work import add_index_option, add_run_option
from multitrain.config.arguments import Arguments, Parser


def main(arguments: Arguments) -> int:
    """``multitrain data index``; returns the exit status."""
    parser = Parser(
        "data index",
        "Check and index the annotation files of a run.",
        "multitrain data index experiment=k400_mit_ssv2 data.root=/datasets",
    )
    add_run_option(parser)
    add_index_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_overrides("data=ssv2 data.root=/datasets")
    given = parser.parse_with_overrides(arguments)
    from multitrain.config import dump
    from multitrain.data.catalog import main as check
    from multitrain.evaluation.output_folders import index_folder

    config = configured(given.run, given.overrides, given.config_dir)
    index = index_folder(config, given.index)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(config))
        return check([str(file), "--index", str(index), *(["--json"] if given.json else [])])
