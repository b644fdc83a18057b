"""``multitrain data pack``: write videos to tar shards with one index, with many processes or jobs; resumable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import StopSignals
from multitrain.commands.data_work import add_segment_option, add_work_options, interrupted
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.order.windows import SHARD_VIDEOS
from multitrain.text import printable

if TYPE_CHECKING:
    from multitrain.data.tools.packing import Item, PackJob

_SHOWN = 20


def _parser() -> Parser:
    parser = Parser(
        "data pack",
        "Write videos to plain tar shards with a fixed number of videos each, and one index. OUT then replaces VIDEOS in a dataset's\n"
        "`videos:`; nothing else changes, also for a run in progress. A shard is complete or absent; run the same command again\n"
        "to resume after an interruption. VIDEOS is only read.",
        "multitrain data pack /data/k400_320p /data/k400_packed --annotations k400",
        "sbatch --array=0-15 slurm/prepare.sh pack /data/k400_320p /data/k400_packed --annotations k400",
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("out", type=Path, help="folder for the shards and their index")
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="the videos that DIR/{train,val,test}.csv list (default: all)"
    )
    parser.add_argument("--separator", default=" ", help="separator of path and label (default: a blank)")
    add_shard_options(parser)
    add_segment_option(parser)
    add_work_options(parser)
    return parser


def add_shard_options(parser: Parser) -> None:
    """Add ``--shard-videos`` and ``--leave-out``."""
    parser.add_argument(
        "--shard-videos",
        type=whole_number,
        default=SHARD_VIDEOS,
        metavar="N",
        help=f"videos per shard (default {SHARD_VIDEOS}); must equal data.shard_videos for data.shuffle_window",
    )
    parser.add_argument("--leave-out", action="store_true", help="pack without the videos that cannot be read")


def main(arguments: Arguments) -> int:
    """``multitrain data pack``; returns the exit status: 0, 1 if videos could not be read, 75 if interrupted."""
    parser = _parser()
    given = parser.parse_args(list(arguments))
    from multitrain.data.tools.packing import PackJob, PackOptions, PackShard
    from multitrain.data.tools.parallel_map import Shard

    wanted = PackOptions(
        given.videos.absolute(), given.out.absolute(), given.annotations, given.separator, given.segment_lines,
        given.shard_videos, given.leave_out,
    )  # fmt: skip
    task = PackJob(wanted, Shard.parse(given.shard))
    stop, items = StopSignals(), list(task.items())
    task.journal.claim()
    failed: list[tuple[str, str]] = []
    work = PackShard(wanted.videos, task.parts, wanted.leave_out)
    limit = given.timeout * wanted.shard_videos

    def done(item: Item, record: dict[str, Any]) -> bool:
        return note_failures(failed, item, task.done(item, record), record)

    if interrupted("pack", items, work, given, done, timeout=limit, stop=stop, unit="shard"):
        return Exit.INTERRUPTED
    return report(task, failed, as_json=given.json)


def note_failures(failed: list[tuple[str, str]], item: Item, reason: str, record: dict[str, Any]) -> bool:
    """Add what failed in a shard, for `reason`, to `failed`; whether nothing did."""
    if reason:
        failed.extend([(name, why) for name, why in record.get("unreadable", [])] or [(item.target, reason)])
    return not reason


def report(task: PackJob, failed: list[tuple[str, str]], *, as_json: bool) -> int:
    """Write the index if all shards are there, print a summary, and return the exit status."""
    missing, packed, left_out = task.write_index()
    failed += [(name, why) for name, why in left_out]
    counts = {"shards": len(task.shards), "waiting": missing, "videos": packed, "left_out": len(left_out)}
    if as_json:
        print(json.dumps({**counts, "failures": dict(failed)}))
    else:
        for name, reason in failed[:_SHOWN]:
            print(f"failed: {printable(name)}: {printable(reason)}")
        if len(failed) > _SHOWN:
            print(f"… and {len(failed) - _SHOWN} more")
        print(", ".join(f"{n} {k.replace('_', ' ')}" for k, n in counts.items()))
    if missing:
        why = "repair these videos, or pack without them: --leave-out" if failed else "another task writes them"
        print(f"{missing} shards are missing, so there is no index yet; {why}", file=sys.stderr)
    elif not as_json:
        print(f"for a dataset's configuration: videos: {printable(str(task.out.root))}")
    return 1 if failed else 0
