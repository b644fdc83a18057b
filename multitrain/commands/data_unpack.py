"""``multitrain data unpack``: write the videos of a pack as files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import StopSignals
from multitrain.commands.data_work import add_work_options, interrupted
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser
from multitrain.text import printable


def _parser() -> Parser:
    parser = Parser(
        "data unpack",
        "Write the videos of a pack as files, and verify their checksums. Run the same command again to resume;\n"
        "existing files with the same bytes are kept. (Any tar program can extract the shards, too.)",
        "multitrain data unpack /data/k400_packed /data/k400_320p",
    )
    parser.add_argument("pack", type=Path, help="folder of shards")
    parser.add_argument("out", type=Path, help="folder for the files")
    add_work_options(parser)
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data unpack``; returns the exit status: 0, 1 if a video is damaged, 75 if interrupted."""
    parser = _parser()
    given = parser.parse_args(list(arguments))
    from multitrain.data.packs import INDEX, Stored, open_pack
    from multitrain.data.tools.packing import Unpack
    from multitrain.data.tools.parallel_map import Shard
    from multitrain.files import OutputFolder

    found = open_pack(given.pack)
    if found is None:
        raise ConfigError(f"{given.pack}: no pack, for there is no {INDEX} in it; `multitrain data pack` writes it")
    out = OutputFolder(given.out, "data unpack", [given.pack])
    shards = [list(group) for _, group in itertools.groupby(found, key=lambda video: video.shard)]
    mine = Shard.parse(given.shard).of(shards)
    failed: list[tuple[str, str]] = []
    counts = {"written": 0, "there": 0}
    limit = given.timeout * max((len(shard) for shard in mine), default=1)
    work = Unpack(given.pack.absolute(), out.root)

    def done(shard: list[Stored], record: dict[str, Any]) -> bool:
        bad = record["unreadable"] if "unreadable" in record else [(shard[0].shard.name, record["error"])]
        counts.update({kind: number + record.get(kind, 0) for kind, number in counts.items()})
        failed.extend(bad)
        return not bad

    if interrupted("unpack", mine, work, given, done, timeout=limit, stop=StopSignals(), unit="shard"):
        return Exit.INTERRUPTED
    if given.json:
        print(json.dumps({**counts, "failures": dict(failed)}))
    else:
        for name, reason in failed:
            print(f"failed: {printable(name)}: {printable(reason)}")
        print(f"{counts['written']} written, {counts['there']} there already, {len(failed)} failed")
    return 1 if failed else 0
