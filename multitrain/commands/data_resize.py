"""``multitrain data resize``: make small copies of videos, with many processes or jobs; resumable."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import StopSignals
from multitrain.commands.data_pack import add_shard_options, note_failures, report
from multitrain.commands.data_work import add_segment_option, add_work_options, interrupted
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.text import printable

if TYPE_CHECKING:
    from multitrain.data.tools.copying import CopyJob


def _parser() -> Parser:
    parser = Parser(
        "data resize",
        "Copy videos with a short side of 320 pixels: H.264 in MP4, without audio. A copy is complete or absent.\n"
        "Run the same command again to resume, and to copy changed videos again. It replaces and deletes only files that it\n"
        "made, and writes no copy outside OUT. Paths in annotation files may be absolute: the\n"
        "copy of VIDEOS/a/b.avi is OUT/a/b.mp4, whatever the spelling of its path; videos outside VIDEOS are an error.",
        "multitrain data resize /data/k400 /data/k400_320p --annotations k400",
        "multitrain data resize /data/k400 /data/k400_packed --annotations k400 --pack",
        "multitrain data resize /data/anet /data/anet_320p --segments anet/segments.csv",
        "sbatch --array=0-15 slurm/prepare.sh resize /data/k400 /data/k400_320p --fast-decode",
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("out", type=Path, help="folder for the copies, and for resize.csv, which lists every video")
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="only videos that DIR/{train,val,test}.csv list"
    )
    parser.add_argument(
        "--write-annotations",
        type=Path,
        metavar="DIR",
        help="write the same files with the names of the copies, without failures",
    )
    parser.add_argument(
        "--segments", type=Path, metavar="FILE", help="cut these: source,start,end,path (data import writes it)"
    )
    parser.add_argument(
        "--short-side", type=whole_number, default=320, metavar="N", help="pixels (default 320); never enlarges"
    )
    parser.add_argument(
        "--fast-decode", action="store_true", help="-g 32 -tune fastdecode: half the decoding for a third more bytes"
    )
    parser.add_argument("--crf", type=int, default=23, help="x264's quality, lower is better (default 23)")
    parser.add_argument("--preset", default="medium", help="x264's preset (default medium)")
    parser.add_argument(
        "--adopt",
        action="store_true",
        help="keep existing files in OUT that another program made, if they are these copies",
    )
    parser.add_argument(
        "--separator",
        default=" ",
        metavar="TEXT",
        help="separator of path and label in annotation files (default: a blank)",
    )
    add_segment_option(parser)
    parser.add_argument(
        "--pack",
        action="store_true",
        help="write the copies to tar shards, as data pack does; no copy is ever a file of its own",
    )
    add_shard_options(parser)
    parser.add_argument("--salvage", action="store_true", help="keep the decodable part of damaged videos")
    add_work_options(parser)
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data resize``; returns the exit status: 0, 1 if a copy could not be made, 75 if interrupted."""
    parser = _parser()
    given = parser.parse_args(list(arguments))
    if given.write_annotations and not given.annotations:
        parser.error("--write-annotations needs --annotations")
    if given.pack and (given.segments or given.adopt):
        parser.error(
            "--pack takes complete videos, without --segments and --adopt; segments: data.datasets.NAME.segments"
        )
    if given.leave_out and not given.pack:
        parser.error("--leave-out needs --pack")
    if given.pack:
        return _pack(given)
    from multitrain.data.tools.copying import CopyJob, CopyOptions
    from multitrain.data.tools.parallel_map import Shard
    from multitrain.data.tools.resize import Encoding, Resize

    encoding = Encoding(given.short_side, given.crf, given.preset, given.fast_decode, given.salvage)
    videos, out = given.videos.absolute(), given.out.absolute()
    wanted = CopyOptions(
        videos, out, encoding, given.annotations, given.write_annotations, given.segments, given.separator,
        given.segment_lines, given.adopt,
    )  # fmt: skip
    work = Resize(videos, out, encoding, given.timeout)
    shard = Shard.parse(given.shard)
    task = CopyJob(wanted, shard)
    stop = StopSignals()
    items, mine = list(task.items()), len(shard.of(task.copies))
    if items:
        task.journal.claim()
    if task.before:
        print(", ".join(f"{n} of {mine} {what}" for what, n in task.before.items()), file=sys.stderr)
    if interrupted("resize", items, work, given, task.done, timeout=3 * given.timeout + 30, stop=stop):
        return Exit.INTERRUPTED
    return _report(task, as_json=given.json)


def _pack(given: argparse.Namespace) -> int:
    """``--pack``: write the copies to shards."""
    from multitrain.data.tools.packed_copies import Job, PackedCopyJob, PackedCopyOptions, ResizeShard
    from multitrain.data.tools.parallel_map import Shard
    from multitrain.data.tools.resize import Encoding, Resize

    encoding = Encoding(given.short_side, given.crf, given.preset, given.fast_decode, given.salvage)
    videos, out = given.videos.absolute(), given.out.absolute()
    wanted = PackedCopyOptions(
        videos, out, given.annotations, given.separator, given.segment_lines, given.shard_videos, given.leave_out, encoding,
        given.write_annotations,
    )  # fmt: skip
    task = PackedCopyJob(wanted, Shard.parse(given.shard))
    work = ResizeShard(Resize(videos, out, encoding, given.timeout), task.parts, wanted.leave_out)
    failed: list[tuple[str, str]] = []

    def done(job: Job, record: dict[str, Any]) -> bool:
        return note_failures(failed, job.item, task.done(job.item, record), record)

    stop, jobs = StopSignals(), list(task.jobs())
    task.journal.claim()
    limit = (3 * given.timeout + 30) * wanted.shard_videos
    if interrupted("resize --pack", jobs, work, given, done, timeout=limit, stop=stop, unit="shard"):
        return Exit.INTERRUPTED
    task.write_tables()
    return report(task, failed, as_json=given.json)


def _report(task: CopyJob, *, as_json: bool) -> int:
    """Write the tables, print a summary of the copies, and return the exit status."""
    results = task.results()
    table = task.write_table(results)
    failed = {c.source: str(d["error"]) for c in task.copies if (d := results[c.target]) is not None and "error" in d}
    waiting = sum(record is None for record in results.values())
    made = len(task.copies) - len(failed) - waiting
    counts = {"videos": len(task.copies), "copies": made, "failed": len(failed), "waiting": waiting}
    if as_json:
        print(json.dumps({**counts, "failures": failed}))
    else:
        for source, reason in list(failed.items())[:20]:
            print(f"failed: {printable(str(task.wanted.videos / source))}: {printable(reason)}")
        print(", ".join(f"{n} {k}" for k, n in counts.items()) + f"; every video: {table}")
    if not waiting:
        for line in task.write_annotations(results):
            print(line, file=sys.stderr)
    return 1 if failed else 0
