"""Submit many runs that differ in a few options, as one SLURM array; print their results as a table.

python launch/sweep.py name=lr experiment=k400 optim.lr=1e-4,2e-4 seed=0,1
python launch/sweep.py lr                        state of the runs lr-0 … lr-3; exit status 1 when one has failed
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import time
from typing import Any

import yaml

from launch import checks, run_folder
from launch.run_folder import Run
from multitrain.config import ConfigError, load
from multitrain.config.arguments import OneLineParser, answered, piped, typed_words, whole_number
from multitrain.config.overrides import alternatives, combinations, split
from multitrain.config.reading import read_yaml
from multitrain.config.typed import equal_pair
from multitrain.report.status import status
from multitrain.text import table

FAILED_STATES = ("failed", "cancelled", "interrupted", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline")
"""Final states of a run that did not succeed."""
SHARED_OPTIONS = ("nodes", "gpus", "cluster", "name", "runs")
"""Options that all runs of an array share."""


def main(arguments: list[str] | None = None) -> int:
    """Submit a sweep or show one; the exit code: 0 submitted, or no run has failed; 1 a run has failed; 2 refused."""
    parser = OneLineParser("python launch/sweep.py", __doc__, usage="python launch/sweep.py NAME | name=NAME key=a,b …")
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="DIR", help="folder with config groups of your own"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait until all runs have ended; exit status 1 when one has failed"
    )
    parser.add_argument(
        "--parallel", type=whole_number, default=0, metavar="N", help="runs at once (default: as many as SLURM allows)"
    )
    parser.add_argument("--json", action="store_true", help="the table as one JSON object")
    options, words = parser.parse_known_args(arguments)
    return answered(lambda: _main(words, options))


def _main(words: list[str], options: argparse.Namespace) -> int:
    words = typed_words(words)
    if len(words) == 1 and "=" not in words[0]:
        folder = _existing_sweep(words[0])
    else:
        submitted = _submit(words, options.config_dir, options.parallel)
        if submitted is None or not (options.wait or _is_local(submitted)):
            return 0
        folder = submitted
    while options.wait and not _ended(folder):
        time.sleep(2)
    return _show(folder, as_json=options.json)


def grid(words: list[str]) -> list[list[str]]:
    """The overrides of each run: every combination of the values of options that have several (``key=a,b``, ``range(…)``).

    Raises:
        ConfigError: nothing to sweep over, or an option that all runs must share.
    """
    for word in words:
        key = split(word).key
        if key.split(".")[0] in SHARED_OPTIONS and len(alternatives(word)) > 1:
            raise ConfigError(f"{word}: all runs of a sweep share {key}; submit one sweep for each value")
    listed = combinations(words)
    if len(listed) == 1:
        raise ConfigError("nothing to sweep over; give an option several values, e.g. optim.lr=1e-4,2e-4")
    return listed


def _submit(words: list[str], config_dirs: list[str], parallel: int) -> Path | None:
    """The sweep's folder; None when a dry run has printed all there is to say."""
    given = {w.partition("=")[0]: w.partition("=")[2] for w in words}
    name = given.get("name") or f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    rest = [w for w in words if w.partition("=")[0] != "name"]
    listed = grid(rest)
    runs = [run_folder.compose_run([*p, f"name={name}-{i}"], config_dirs=config_dirs) for i, p in enumerate(listed)]
    run_folder.tell_idle(runs)
    for line in runs[0].chosen:
        if all(line in run.chosen for run in runs):
            print(f"# auto   {line}")
    folder = runs[0].path.parent / ".sweeps" / name
    known = [r.name for r in runs if r.exists]
    if known or folder.exists():
        raise ConfigError(f"sweep {name!r} exists already ({folder}); give this one another name: name=…")
    _refuse_equal_runs(runs)
    swept = [[o for o in p if o not in set.intersection(*map(set, listed))] for p in listed]
    listing = [{"run": str(r.path), "overrides": o} for r, o in zip(runs, swept)]
    if runs[0].config.dry_run:
        for row in listing:
            print(f"# {row['run']}: {' '.join(row['overrides'])}")
        sys.stdout.flush()
        checks.refuse_unstartable(runs, keep_index=False)
        return None
    checks.refuse_unstartable(runs, keep_index=True)
    for run in runs:
        run_folder.write(run)
    _write_listing(folder, listing)
    if runs[0].config.cluster.kind == "local":
        _run_here(runs)
    else:
        _to_slurm(folder, name, runs, parallel)
    return folder


def _refuse_equal_runs(runs: list[Run]) -> None:
    """Raises ConfigError for two runs that would be the same: an option that is swept has no effect, or a value stands twice."""
    if pair := equal_pair([run.config for run in runs]):
        names = " and ".join(runs[number].name for number in pair)
        raise ConfigError(f"{names} would be the same run; give each value once, and each option in one word")


def _write_listing(folder: Path, listing: list[dict[str, Any]]) -> None:
    (folder / "logs").mkdir(parents=True)
    (folder / "runs.txt").write_text("".join(f"{row['run']}\n" for row in listing))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(listing, sort_keys=False))


def _to_slurm(folder: Path, name: str, runs: list[Run], parallel: int) -> None:
    from launch import slurm

    slurm.check(runs[0].config)
    jobs = slurm.submit_array(folder, name, [(r.path, r.config) for r in runs], parallel)
    for run, job in zip(runs, jobs):
        slurm.write_script(run.path, run.config)
        run_folder.record(run, cluster="slurm", job=job)
    print(f"array   {jobs[0].partition('_')[0]}, {len(jobs)} runs")
    print(f"runs    {runs[0].path} … {runs[-1].path.name}")
    print(f"logs    {folder}/logs")
    print(f"table   python launch/sweep.py {name}")
    print(f"cancel  scancel {jobs[0].partition('_')[0]}", flush=True)


def _run_here(runs: list[Run]) -> None:
    from launch import local
    from launch.rank import training

    for run in runs:
        run_folder.record(run, cluster="local")
        code = local.run(run.path, run.config, training(run.path))
        if code == local.INTERRUPTED:
            return


def _is_local(folder: Path) -> bool:
    return load(Path(_rows(folder)[0]["run"])).cluster.kind == "local"


def _existing_sweep(word: str) -> Path:
    for folder in (Path(word), Path("runs") / ".sweeps" / word):
        if (folder / "sweep.yaml").is_file():
            return folder
    raise ConfigError(f"there is no sweep {word!r} in runs/.sweeps; name={word} key=a,b starts one")


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The status of each run. A run that never began and has no job any more was cancelled, or refused by SLURM."""
    from launch import slurm

    rows = [{**row, **status(row["run"])} for row in read_yaml(folder / "sweep.yaml")]
    jobs = {row["run"]: run_folder.jobs(Path(row["run"])) for row in rows}
    alive = {j for run, ids in jobs.items() for j in slurm.active(Path(run), ids)}
    for row in rows:
        if row["state"] in ("submitted", None, "") and jobs[row["run"]] and not set(jobs[row["run"]]) & set(alive):
            row["state"] = "cancelled"
    return rows


def _ended(folder: Path) -> bool:
    return all(row["state"] in ("finished", "stopped", *FAILED_STATES) for row in _rows(folder))


def _show(folder: Path, *, as_json: bool) -> int:
    """Print the table; 1 when a run has failed, else 0."""
    rows = _rows(folder)
    failed = [row for row in rows if row["state"] in FAILED_STATES]
    if as_json:
        kept = ("run", "overrides", "state", "update", "total_updates", "loss", "validation", "last_error")
        print(json.dumps({"runs": [{k: row.get(k) for k in kept} for row in rows], "failed": len(failed)}))
    else:
        header = ["run", "options", "state", "updates", "loss", "validation"]
        cells = [
            [
                os.path.basename(row["run"]),
                " ".join(row["overrides"]),
                row["state"] or "submitted",
                f"{row['update']} / {row['total_updates'] or '?'}",
                "-" if row["loss"] is None else f"{row['loss']:.4f}",
                ", ".join(f"{d} {m.get('top1', m.get('map', 0)):.1f}" for d, m in (row["validation"] or {}).items())
                or "-",
            ]
            for row in rows
        ]
        print(table(header, cells, left=3))
        for row in failed:
            print(f"{os.path.basename(row['run'])}: {row.get('last_error') or row['state']}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(piped(main))
