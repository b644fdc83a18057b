"""Interrupt runs at random moments, at least `--count` times, and check that the results do not change.

python benchmarks/drills/campaign.py                         100 interruptions of local processes
python benchmarks/drills/campaign.py --backend controller    each kind twice, on a real SLURM controller
python benchmarks/drills/campaign.py --only "in a save"      kinds whose name holds these words
python benchmarks/drills/campaign.py --seed 7 --run 3        one run of a local campaign once more
python benchmarks/drills/campaign.py --backend controller --nodes 4 --gpus 4 --only evicted,killed

Runs are tiny, but real: the user's own commands, processes, signals, video files, checkpoints. `kinds.py` has the kinds and what
each may cost on which backend; `local.py` and `controller.py` say what is compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[2])]

import argparse
import contextlib
import shutil
import tempfile
import time
from types import ModuleType
from typing import Any

from benchmarks import results
from benchmarks.drills import controller, local
from benchmarks.drills.kinds import BACKENDS, matching
from benchmarks.drills.strikes_controller import WAYS

MODULES: dict[str, ModuleType] = {"local": local, "controller": controller}


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign and print the table; 0 when every run ended like the uninterrupted one and kept every guarantee."""
    given = _parser().parse_args(arguments)
    backend = MODULES[given.backend]
    if reason := backend.refusal():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    kinds = matching(given.backend, given.only)
    if not kinds:
        listed = ", ".join(k.name for k in matching(given.backend))
        print(f"error: no kind holds {given.only!r}; there are: {listed}", file=sys.stderr)
        return 2
    given.count = backend.COUNT if given.count is None else given.count
    out = given.out or backend.RESULTS
    print(f"seed {given.seed}: {given.count} interruptions of {len(kinds)} kinds", flush=True)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="drills-"))
    began = time.monotonic()

    def keep(outcome: Any) -> None:
        rows = backend.summary(outcome)
        with contextlib.redirect_stdout(None):
            results.save(out.stem, rows, folder=out.parent, seconds=round(time.monotonic() - began), **outcome.facts())

    try:
        outcome = backend.campaign(folder, kinds, given, keep)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    keep(outcome)
    print(f"\n{backend.table(outcome.records)}\n")
    print("\n".join(outcome.lines(given.seed)))
    print(f"{out}; {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if outcome.good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where the runs run (default local)")
    parser.add_argument(
        "--count", type=int, metavar="N", help="interruptions (default: local 100, controller two a kind)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of kinds, moments and shapes (default 0)")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="only kinds whose name holds one of these, with commas"
    )
    parser.add_argument("--run", type=int, metavar="I", help="local: only run number I of the campaign with this seed")
    parser.add_argument("--world", type=int, choices=(1, 2, 4), help="local: ranks of every run, at every start")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="local: work in DIR and leave all runs there")
    parser.add_argument(
        "--way", choices=WAYS, help="controller: how the run is submitted (default: the first half so, the second so)"
    )
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="controller: nodes of the run (default 2)")
    parser.add_argument("--gpus", type=int, default=1, metavar="G", help="controller: ranks a node (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (default benchmarks/results/drills….json)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
