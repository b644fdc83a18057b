"""``multitrain data check``: decode every file and write a table of all problems."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from multitrain.commands.common import StopSignals, configured
from multitrain.commands.data_resize import add_work_options
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.files import OutputFolder


def main(arguments: Arguments) -> int:
    """``multitrain data check``; returns the exit status: 0, 1 if there are findings, 75 if interrupted."""
    parser = Parser(
        "data check",
        "Decode every file and compare all lines: list videos that are missing, broken (with the reason), too short, duplicates,\n"
        "labelled twice, or in both training and test. Run the same command again to resume after an interruption.",
        "multitrain data check data=k400_mit_ssv2 data.root=/datasets --out checked --write-clean clean",
        "multitrain data check /data/downloads",
        "sbatch --array=0-15 slurm/prepare.sh check data=ssv2 data.root=/datasets --out checked",
    )
    parser.add_argument(
        "--run", metavar="DIR", help="a run's folder or its config.yaml, instead of the shipped configuration"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("checked"),
        metavar="DIR",
        help="folder for check.csv and the journal (default: checked)",
    )
    parser.add_argument(
        "--min-frames", type=whole_number, default=8, metavar="N", help="videos with fewer frames are short (default 8)"
    )
    parser.add_argument(
        "--write-clean", type=Path, metavar="DIR", help="write DIR/DATASET/*.csv without the lines that have findings"
    )
    add_work_options(parser)
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER | KEY=VALUE", help="folders of videos, or datasets, e.g. data=ssv2"
    )
    parser.set_defaults(overrides=[])
    given = parser.parse_with_overrides(arguments)
    from multitrain.data.prepare import check as c
    from multitrain.data.prepare.parallel_map import (
        FINAL,
        INTERRUPTED,
        Journal,
        ProgressBar,
        Shard,
        map_resumable,
        version,
    )
    from multitrain.data.prepare.scan import ScanFile

    shard = Shard.parse(given.shard)
    if given.folders and (given.overrides or given.run or given.write_clean):
        raise ConfigError("folders hold no annotations; give folders, or datasets as key=value, not both")
    datasets = {} if given.folders else configured(given.run, given.overrides, given.config_dir).data.datasets
    entries = (
        [e for f in given.folders for e in c.entries_in_folder(Path(f))] if given.folders else c.list_entries(datasets)
    )
    files = sorted({str(Path(e.file).absolute()) for e in entries})
    entries = [e._replace(file=str(Path(e.file).absolute())) for e in entries]
    out = OutputFolder(given.out, "data check")
    out.check(c.TABLE, recognise=c.is_table)
    clean = c.clean_folder(datasets, given.write_clean) if given.write_clean else None
    journal = Journal(out.root, "check", shard)
    mine = shard.of(files)
    todo = [f for f in mine if not journal.settled(f, version(Path(f)))]
    if todo:
        journal.claim()
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} are done already", file=sys.stderr)
    stop = StopSignals()
    bar: ProgressBar[str] = ProgressBar("check", len(todo))
    for file, record in map_resumable(todo, ScanFile(), workers=given.workers, timeout=given.timeout, stop=stop):
        journal.add(file, version(Path(file)), {FINAL: True, **record} if "error" in record else record)
        bar.add(bad="error" in record)
    bar.close()
    if stop():
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    journal.refresh()
    scans = {f: r for f in files if (r := journal.get(f, version(Path(f)))) is not None}
    if len(scans) < len(files):
        print(
            f"{len(scans)} of {len(files)} files are checked; the table is written when all shards are done",
            file=sys.stderr,
        )
        return 0
    report = c.find_problems(entries, scans, given.min_frames)
    table = out.write_text(c.TABLE, report.csv(), recognise=c.is_table)
    if clean:
        for name, count in c.write_clean(report, datasets, clean).items():
            print(f"{name}: {count} lines left out", file=sys.stderr)
    if given.json:
        counts = [{"dataset": d, "split": s, **n} for (d, s), n in report.counts().items()]
        print(json.dumps({"counts": counts, "findings": len(report.findings), "csv": str(table)}))
    else:
        print(report.table())
        print(f"all findings: {table}")
    return 1 if report.findings else 0
