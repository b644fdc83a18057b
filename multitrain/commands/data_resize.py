"""``multitrain data resize``: small copies of videos, by many processes or jobs, resumed where they were interrupted."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

from multitrain.commands.common import StopSignals
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.files import replace_text


def main(arguments: Arguments) -> int:
    """``multitrain data resize``; returns the exit status: 0, 1 when a copy could not be made, 75 when interrupted."""
    parser = Parser(
        "data resize",
        "Copies of videos with a short side of 320 pixels: H.264 in MP4, without sound. A copy is there whole or not at all;\n"
        "the same command goes on where it was interrupted, and makes copies of changed videos anew.",
        "multitrain data resize /data/k400 /data/k400_320p --annotations k400",
        "multitrain data resize /data/anet /data/anet_320p --segments anet/segments.csv",
        "sbatch --array=0-15 slurm/prepare.sh resize /data/k400 /data/k400_320p --fast-decode",
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("out", type=Path, help="folder for the copies, and for resize.csv, which tells of every video")
    parser.add_argument(
        "--annotations", type=Path, metavar="DIR", help="only videos that DIR/{train,val,test}.csv list"
    )
    parser.add_argument(
        "--write-annotations",
        type=Path,
        metavar="DIR",
        help="the same files with the names of the copies, failures left out",
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
    parser.add_argument("--salvage", action="store_true", help="keep what can be decoded of damaged videos")
    add_work_options(parser)
    given = parser.parse_args(list(arguments))
    if given.write_annotations and not given.annotations:
        parser.error("--write-annotations needs --annotations")
    from multitrain.data.prepare import resize as r
    from multitrain.data.prepare.crew import INTERRUPTED, Bar, Journal, Shard, version, work_through

    encoding = r.Encoding(given.short_side, given.crf, given.preset, given.fast_decode, given.salvage)
    copies = _copies(given.videos, given.annotations, given.segments)
    shard = Shard.parse(given.shard)
    work = r.Resize(given.videos.absolute(), given.out.absolute(), encoding, given.timeout)
    journal = Journal(given.out / r.PARTS, "resize", shard)
    r.clean_parts(given.out)

    def stamp(copy: r.Copy) -> list[object]:
        return [version(r.located(given.videos / copy.source)), encoding.version(), copy.segment and list(copy.segment)]

    def is_done(copy: r.Copy) -> bool:
        record = journal.get(copy.target, stamp(copy))
        return record is not None and ("error" in record or (given.out / copy.target).is_file())

    mine = shard.of(copies)
    todo = [c for c in mine if not is_done(c)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} are done already", file=sys.stderr)
    stop = StopSignals()
    bar: Bar[r.Copy] = Bar("resize", len(todo))
    for copy, record in work_through(todo, work, workers=given.workers, timeout=given.timeout + 30, stop=stop):
        journal.add(copy.target, stamp(copy), {"source": copy.source, **record})
        bar.add(bad="error" in record)
    bar.close()
    if stop():
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    journal.refresh()
    done = {c.target: journal.get(c.target, stamp(c)) for c in copies}
    waiting = sum(record is None for record in done.values())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["source", "copy", "state", "reason", "frames", "width", "height", "bytes"])
    for copy in copies:
        if (made := done[copy.target]) is not None:
            state = "failed" if "error" in made else "damaged" if "damage" in made else "good"
            reason = made.get("error") or made.get("damage", "")
            sizes = [made.get(k, "") for k in ("frames", "width", "height", "bytes")]
            writer.writerow([copy.source, copy.target, state, reason, *sizes])
    replace_text(given.out / "resize.csv", table.getvalue())
    failed = {c.source: str(d["error"]) for c in copies if (d := done[c.target]) is not None and "error" in d}
    counts = {
        "videos": len(copies),
        "copies": len(copies) - len(failed) - waiting,
        "failed": len(failed),
        "waiting": waiting,
    }
    if given.json:
        print(json.dumps({**counts, "failures": failed}))
    else:
        for source, reason in list(failed.items())[:20]:
            print(f"failed: {given.videos / source}: {reason}")
        print(", ".join(f"{n} {k}" for k, n in counts.items()) + f"; every video: {given.out / 'resize.csv'}")
    if given.write_annotations and not waiting:
        _rewrite(given.annotations, given.write_annotations, {c.source: c.source not in failed for c in copies})
    return 1 if failed else 0


def add_work_options(parser: Parser) -> None:
    """Options of commands that work through many files."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        type=whole_number,
        default=cores,
        metavar="N",
        help=f"processes (default: one a core, here {cores})",
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="do every N-th file only, beginning with number I (0 to N-1)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds after which a file is given up (default 600)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _copies(videos: Path, annotations: Path | None, segments: Path | None) -> list:  # type: ignore[type-arg]
    from multitrain.data.prepare import resize as r

    if segments:
        return r.segments(segments)
    if annotations is None:
        return r.copies(r.found_below(videos))
    texts = [f.read_text() for s in ("train", "val", "test") if (f := annotations / f"{s}.csv").is_file()]
    if not texts:
        raise ConfigError(f"{annotations}: no train.csv, val.csv or test.csv; `multitrain data import` writes them")
    paths = [line.rpartition(" ")[0].rstrip() for text in texts for line in text.splitlines() if line.strip()]
    return r.copies(list(dict.fromkeys(paths)))


def _rewrite(annotations: Path, out: Path, made: dict[str, bool]) -> None:
    from multitrain.data.prepare.resize import rewritten

    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        if (file := annotations / f"{split}.csv").is_file():
            text, lost = rewritten(file.read_text(), made)
            replace_text(out / file.name, text)
            print(f"{out / file.name}: {text.count(chr(10))} videos, {lost} left out", file=sys.stderr)
    if (names := annotations / "classes.txt").is_file():
        replace_text(out / "classes.txt", names.read_text())
