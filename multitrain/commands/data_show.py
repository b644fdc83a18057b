"""``multitrain data show``: a picture of training clips as the model receives them."""

from __future__ import annotations

import json
from pathlib import Path

from multitrain.commands.common import configured
from multitrain.commands.data_work import add_index_option, add_run_option
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.files import check_output


def _parser() -> Parser:
    parser = Parser(
        "data show",
        "A picture of an update's augmented training clips with their labels and mixing weights. It shows a wrong label map, or\n"
        "mirrored clips of a class whose direction matters.",
        "multitrain data show experiment=k400_mit_ssv2 data.root=/datasets --out clips.png",
        "multitrain data show --run runs/first --update 1200 --videos 16",
    )
    add_run_option(parser)
    add_index_option(parser)
    parser.add_argument("--update", type=int, default=0, metavar="N", help="update to show, counted from 0 (default 0)")
    parser.add_argument(
        "--videos",
        type=whole_number,
        default=8,
        metavar="N",
        help="videos to show, each with all its copies (default 8)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("clips.png"), metavar="FILE", help="the picture (default clips.png)"
    )
    parser.add_argument("--json", action="store_true", help="print what is in the picture as one JSON object")
    parser.add_overrides("data=ssv2 augment.mix_probability=0")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data show``; returns the exit status."""
    parser = _parser()
    given = parser.parse_with_overrides(arguments)
    if given.update < 0:
        parser.error("--update is a number from 0 up")
    from multitrain.data.catalog import open_catalogs, plan_of
    from multitrain.data.clips import UnreadableError
    from multitrain.data.show import clips_of, write
    from multitrain.evaluation.output_folders import index_folder

    check_output(given.out, "data show")
    config = configured(given.run, given.overrides, given.config_dir)
    index = index_folder(config, given.index)
    catalogs = open_catalogs(config.data, "train", index)
    try:
        shown = clips_of(config, catalogs, plan_of(config, catalogs), given.update, given.videos)
    except UnreadableError as error:
        raise ConfigError(str(error)) from None
    write(
        given.out,
        shown,
        f"update {given.update}, seed {config.seed}, {config.data.mixture}: clips as the model receives them",
    )
    if given.json:
        clips = [
            {"dataset": s.dataset, "path": s.path, "labels": s.labels, "weights": s.weights, "note": s.note}
            for s in shown
        ]
        print(json.dumps({"picture": str(given.out), "clips": clips}))
    else:
        print(f"{given.out}: {len(shown)} clips")
    return 0
