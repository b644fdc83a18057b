"""``multitrain compare RUN…``: runs side by side: the options in which they differ, their results, and whether these differ. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError, flat, load
from multitrain.config.arguments import Arguments, Parser
from multitrain.evaluation import metrics
from multitrain.evaluation.scored import Scored, read_evaluation
from multitrain.intervals import Difference, paired
from multitrain.records.results import FILE, MEASURE_NAMES, read_results
from multitrain.report.status import resolve, status
from multitrain.text import counted, printable, table

IGNORED_OPTIONS = ("name", "runs", "experiment_name", "dry_run", "then", "preflight")
"""Options that the comparison ignores."""

LONGEST_VALUE = 40
"""Characters of an option's value in the text; the middle of a longer one is left out."""


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare_runs`."""

    rows: list[dict[str, Any]]
    """See :func:`compare`."""
    differences: list[dict[str, Any]]
    """For each later run and dataset that the first run was tested on too: ``run``, ``first``, ``dataset``, ``videos`` (tested by
    both), and in percent points ``difference``, ``low`` and ``high`` (95 %), ``p`` of McNemar's test, ``real``."""
    notes: list[str]
    """Comparisons that cannot be made, and why."""


def compare(runs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """For each run: ``run``, ``differs`` (options with a value that not all runs have), ``state``, ``update``,
    ``total_updates``, ``loss``, and by dataset ``validation`` and ``test`` in percent and ``intervals`` of the tests (95 %).

    Paths below a run's own folder, such as those of its class names, are compared relative to it.

    Raises:
        ConfigError: a folder is not a run's.
    """
    flats = [_options(run) for run in runs]
    names = list(dict.fromkeys(n for options in flats for n in options))
    differing = [n for n in names if n not in IGNORED_OPTIONS and any(f.get(n) != flats[0].get(n) for f in flats)]
    rows = []
    for run, options in zip(runs, flats):
        found = status(run)
        tests = _tests(Path(run))
        rows.append(
            {
                "run": Path(run).resolve().name,
                "differs": {n: options.get(n) for n in differing},
                **{k: found[k] for k in ("state", "update", "total_updates", "loss")},
                "validation": {d: _accuracy(m) for d, m in (found["validation"] or {}).items()},
                "test": {d: _accuracy(m) for d, m in tests.items()},
                "intervals": {d: m["intervals"].get(_measure(m)) for d, m in tests.items()},
            }
        )
    return rows


def compare_runs(runs: Sequence[str | Path]) -> Comparison:
    """:func:`compare`, and how the tests of the later runs differ from those of the first one, on the same videos.

    Raises:
        ConfigError: a folder is not a run's, or the scores of a test are damaged.
    """
    rows = compare(runs)
    first, *others = ((Path(run).resolve().name, _scored(Path(run))) for run in runs)
    differences, notes = [], []
    for name, tests in others:
        for dataset in (d for d in first[1] if d in tests):
            words: dict[str, Any] = {"run": name, "first": first[0], "dataset": dataset}
            found = difference(first[1][dataset], tests[dataset])
            if isinstance(found, str):
                notes.append(f"{dataset}: {name} and {first[0]} cannot be compared video by video: {found}")
            else:
                videos, by = found
                real = by.p < 0.05
                points = {"difference": 100 * by.value, "low": 100 * by.low, "high": 100 * by.high}
                differences.append({**words, "videos": videos, **points, "p": by.p, "real": real})
    return Comparison(rows, differences, notes)


def difference(first: Scored, second: Scored) -> tuple[int, Difference] | str:
    """The top-1 accuracy of `second` less that of `first` on the videos that both scored, and their number; or why there is none."""
    place = {str(path): i for i, path in enumerate(first.paths)}
    if len(place) < len(first.paths) or len(set(map(str, second.paths))) < len(second.paths):
        return "a video is listed twice"
    pairs = [(place[str(path)], i) for i, path in enumerate(second.paths) if str(path) in place]
    if not pairs:
        return "they were tested on different videos"
    ours, theirs = (np.array(side) for side in zip(*pairs))
    if not np.array_equal(first.labels[ours], second.labels[theirs]):
        return "their labels differ"
    before, after = (
        metrics.topk_hits(s.scores[i], _label_sets(s.labels[i]), 1) for s, i in ((first, ours), (second, theirs))
    )
    return len(pairs), paired(int((before & ~after).sum()), int((after & ~before).sum()), len(pairs))


def _label_sets(labels: np.ndarray) -> Any:
    return [tuple(np.flatnonzero(row)) for row in labels] if labels.ndim == 2 else labels


def _options(run: str | Path) -> dict[str, Any]:
    """The options of a run by dotted name; paths in its own folder relative to it."""
    inside = f"{Path(run).resolve()}/"
    options = flat(load(run))
    return {n: str(v).removeprefix(inside) if isinstance(v, (str, Path)) else v for n, v in options.items()}


def _accuracy(measures: Mapping[str, Any]) -> float | None:
    value = measures.get(_measure(measures))
    return None if value is None else float(value)


def _measure(measures: Mapping[str, Any]) -> str:
    return "top1" if measures.get("map") is None else "map"


def _newest_test(run: Path) -> Path | None:
    """The folder of the newest checkpoint's multi-view test that is whole."""
    for file in sorted(run.glob(f"evaluation/update-*/test/{FILE}"), reverse=True):
        try:
            read_results(file.parent)
        except ConfigError:
            continue
        return file.parent
    return None


def _tests(run: Path) -> dict[str, dict[str, Any]]:
    """Results of the newest test, by dataset."""
    folder = _newest_test(run)
    results = read_results(folder) if folder else {}
    return {d: m for d, m in results.items() if _accuracy(m) is not None}


def _scored(run: Path) -> dict[str, Scored]:
    folder = _newest_test(run)
    return read_evaluation(folder) if folder else {}


def text(rows: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The comparison as a table, a line a run; where that is wider than `width` characters, a column a run."""
    columns = [(kind, d) for kind in ("validation", "test") for d in dict.fromkeys(d for r in rows for d in r[kind])]
    header = ["run", *rows[0]["differs"], "state", "updates", "loss", *(f"{kind} {d}" for kind, d in columns)]
    cells = []
    for row in rows:
        done = f"{row['update']}/{row['total_updates'] or '?'}"
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        options = [_short(str(value)) for value in row["differs"].values()]
        results = [_result(row, kind, dataset) for kind, dataset in columns]
        cells.append([row["run"], *options, row["state"] or "-", done, loss, *results])
    wide = table(header, cells)
    if width is None or max(map(len, wide.splitlines())) <= width:
        return wide
    first, *lines = zip(header, *cells, strict=True)
    return table(first, lines)


def _result(row: Mapping[str, Any], kind: str, dataset: str) -> str:
    value = row[kind].get(dataset)
    if value is None:
        return "-"
    ends = row["intervals"].get(dataset) if kind == "test" else None
    return f"{value:.2f}" + (f" ({ends[0]:.1f}–{ends[1]:.1f})" if ends else "")


def _short(value: str) -> str:
    half = LONGEST_VALUE // 2
    return value if len(value) <= LONGEST_VALUE else f"{value[:half]}…{value[1 - half :]}"


def difference_line(found: Mapping[str, Any]) -> str:
    """E.g. ``test ssv2: second − first = +1.20 points top-1 (95 %: 0.30 to 2.10; p = 0.0081, 24777 videos): …``."""
    outcome = "a real difference on these videos" if found["real"] else "no more than chance explains"
    return (
        f"test {found['dataset']}: {found['run']} − {found['first']} = {found['difference']:+.2f} points {MEASURE_NAMES['top1']} "
        f"(95 %: {found['low']:+.2f} to {found['high']:+.2f}; p = {found['p']:.2g}, {counted(found['videos'], 'video')}): {outcome}"
    )


def main(arguments: Arguments) -> int:
    """``multitrain compare``; returns the exit status."""
    parser = Parser(
        "compare",
        "Runs side by side: the options in which they differ, state, loss, validation and test accuracy in percent with 95 % "
        "intervals, and whether the tests of the later runs differ from those of the first.",
        "multitrain compare runs/first runs/second",
        "multitrain compare runs/lr-*",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or their names in runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(arguments))
    found = compare_runs([resolve(run, "runs") for run in given.runs])
    if given.json:
        print(json.dumps({"runs": found.rows, "differences": found.differences, "notes": found.notes}))
        return 0
    print(text(found.rows, shutil.get_terminal_size((120, 24)).columns))
    for line in (*map(difference_line, found.differences), *found.notes):
        print(printable(line))
    return 0
