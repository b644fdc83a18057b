"""``multitrain compare RUN…``: a table of runs, the options in which they differ and their results. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError, flat, load
from multitrain.config.arguments import Arguments, Parser
from multitrain.config.paths import find_run
from multitrain.records.results import FILE, read_results
from multitrain.report.status import status
from multitrain.text import table

IGNORED_OPTIONS = ("name", "runs", "experiment_name", "dry_run", "then", "preflight")
"""Options that the comparison ignores."""


def compare(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """For each run: ``run``, ``differs`` (options with a value that not all runs have), ``state``, ``update``,
    ``total_updates``, ``loss``, and by dataset ``validation`` and ``test`` in percent.

    Raises:
        ConfigError: a folder is not a run's.
    """
    flats = [flat(load(run)) for run in runs]
    names = list(dict.fromkeys(n for options in flats for n in options))
    differing = [n for n in names if n not in IGNORED_OPTIONS and any(f.get(n) != flats[0].get(n) for f in flats)]
    rows = []
    for run, options in zip(runs, flats):
        found = status(run)
        rows.append(
            {
                "run": Path(run).resolve().name,
                "differs": {n: options.get(n) for n in differing},
                **{k: found[k] for k in ("state", "update", "total_updates", "loss")},
                "validation": {d: _accuracy(m) for d, m in (found["validation"] or {}).items()},
                "test": _tests(Path(run)),
            }
        )
    return rows


def _accuracy(measures: dict[str, Any]) -> float | None:
    value = measures.get("top1", measures.get("map"))
    return None if value is None else float(value)


def _tests(run: Path) -> dict[str, float | None]:
    """Results of the newest checkpoint's multi-view test, by dataset."""
    for file in sorted(run.glob(f"evaluation/update-*/test/{FILE}"), reverse=True):
        try:
            results = read_results(file.parent)
        except ConfigError:
            continue
        return {d: _accuracy(m) for d, m in results.items() if "top1" in m or "map" in m}
    return {}


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a table."""
    differs = list(rows[0]["differs"])
    columns = [(kind, d) for kind in ("validation", "test") for d in dict.fromkeys(d for r in rows for d in r[kind])]
    header = ["run", *differs, "state", "updates", "loss", *(f"{kind} {d}" for kind, d in columns)]
    cells = []
    for row in rows:
        done = f"{row['update']}/{row['total_updates'] or '?'}"
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        scores = [row[kind].get(d) for kind, d in columns]
        shown = ["-" if s is None else f"{s:.2f}" for s in scores]
        cells.append([row["run"], *(str(v) for v in row["differs"].values()), row["state"] or "-", done, loss, *shown])
    return table(header, cells)


def main(arguments: Arguments) -> int:
    """``multitrain compare``; returns the exit status."""
    parser = Parser(
        "compare",
        "Runs side by side: the options in which they differ, state, loss, validation and test accuracy in percent.",
        "multitrain compare runs/first runs/second",
        "multitrain compare runs/lr-*",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or their names in runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(arguments))
    given.runs = [find_run(run) for run in given.runs]
    for run in given.runs:
        if not Path(run).is_dir():
            raise ConfigError(f"{run}: no such run folder; runs are under `runs` by name")
    rows = compare(given.runs)
    print(json.dumps({"runs": rows}) if given.json else text(rows))
    return 0
