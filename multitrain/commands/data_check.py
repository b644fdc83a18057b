"""``multitrain data check``: decode every file and write a table of all problems."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.cluster import quota
from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import StopSignals, configured
from multitrain.commands.data_work import add_run_option, add_work_options, interrupted
from multitrain.config import ConfigError
from multitrain.config.arguments import Arguments, Parser, whole_number
from multitrain.config.paths import is_remote
from multitrain.files import OutputFolder

if TYPE_CHECKING:
    from multitrain.data.tools.check import CheckReport
    from multitrain.data.tools.parallel_map import Journal


def _parser() -> Parser:
    parser = Parser(
        "data check",
        "Decode every file and compare all lines: list videos that are missing, broken (with the reason), too short, duplicates,\n"
        "labelled twice, or in both training and test. Run the same command again to resume after an interruption.",
        "multitrain data check data=k400_mit_ssv2 data.root=/datasets --out checked --write-clean clean",
        "multitrain data check /data/downloads",
        "sbatch --array=0-15 slurm/prepare.sh check data=ssv2 data.root=/datasets --out checked",
    )
    add_run_option(parser)
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
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain data check``; returns the exit status: 0, 1 if there are findings, 75 if interrupted."""
    given = _parser().parse_with_overrides(arguments)
    from multitrain.data.tools import check as c
    from multitrain.data.tools.parallel_map import Journal, Shard, version

    shard = Shard.parse(given.shard)
    if given.folders and (given.overrides or given.run or given.write_clean):
        raise ConfigError("folders hold no annotations; give folders, or datasets as key=value, not both")
    datasets = {} if given.folders else configured(given.run, given.overrides, given.config_dir).data.datasets
    for name, dataset in datasets.items():
        if is_remote(dataset.videos):
            raise ConfigError(
                f"videos of {name!r}: {dataset.videos} is an address; check the pack before it is uploaded"
            )
    entries = (
        [e for f in given.folders for e in c.entries_in_folder(Path(f))] if given.folders else c.list_entries(datasets)
    )
    entries = [e._replace(file=str(Path(e.file).absolute())) for e in entries]
    files = sorted({e.file for e in entries})
    out = OutputFolder(given.out, "data check")
    out.check(c.TABLE, recognise=c.is_table)
    clean = c.clean_folder(datasets, given.write_clean) if given.write_clean else None
    journal = Journal(out.root, "check", shard)
    if _scan(journal, shard.of(files), given):
        return Exit.INTERRUPTED
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
    for name, count in c.write_clean(report, datasets, clean).items() if clean else ():
        print(f"{name}: {count} lines left out", file=sys.stderr)
    _print_report(report, table, as_json=given.json)
    places = given.folders or [d.videos for d in datasets.values()]
    for line in quota.lines([*places, out.root]):
        print(line, file=sys.stderr)
    return 1 if report.findings else 0


def _scan(journal: Journal, files: Sequence[str], given: argparse.Namespace) -> bool:
    """Decode the files that the journal does not have; whether a signal interrupted it."""
    from multitrain.data.tools.parallel_map import FINAL, version
    from multitrain.data.tools.scan import ScanFile

    todo = [f for f in files if not journal.settled(f, version(Path(f)))]
    if todo:
        journal.claim()
    if len(todo) < len(files):
        print(f"{len(files) - len(todo)} of {len(files)} are done already", file=sys.stderr)

    def done(file: str, record: dict[str, Any]) -> bool:
        journal.add(file, version(Path(file)), {FINAL: True, **record} if "error" in record else record)
        return "error" not in record

    return interrupted("check", todo, ScanFile(), given, done, timeout=given.timeout, stop=StopSignals())


def _print_report(report: CheckReport, table: Path, *, as_json: bool) -> None:
    if as_json:
        counts = [{"dataset": d, "split": s, **n} for (d, s), n in report.counts().items()]
        print(json.dumps({"counts": counts, "findings": len(report.findings), "csv": str(table)}))
    else:
        print(report.table())
        print(f"all findings: {table}")
