"""Damaged and hostile input for every reader, as a table: reader × outcome.

python benchmarks/fuzz.py [--full] [--cases N] [READER …] [--show READER/NUMBER]

An input is accepted, or refused in one line. A traceback, a library's own words, no end after 10 s of the processor, or 1 GB more
memory is a fault; each is kept in results/fuzz.json with the number that makes it again. Case n of a reader is the same input in
every run. Functions and commands are called in one warm process; readers whose name begins with "$" start a Python for each
case as a shell does, some 0.5 % of all cases.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

import argparse
import itertools
import os
import shutil
import tempfile
from collections import Counter
from typing import Any

from benchmarks.fuzzing.judge import BAD, GOOD, Case, Outcome, Worker, content, judged, taking
from benchmarks.fuzzing.material import Material
from benchmarks.fuzzing.readers import REFUSALS, Reader, readers
from benchmarks.results import row, save

CASES = {"small": 1_000, "full": 20_000}
FAULTS_SHOWN = 5
"""Of a reader and kind, in the file of results."""


class Fuzz:
    """Cases of all readers, in a scratch folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.material = Material(folder / "material")
        self.readers: dict[str, Reader] = readers(self.material)
        self._scratch = folder / "case"
        self._captures = (folder / "out", folder / "err")
        self._said = taking(self._captures)
        self.worker = Worker(self._serve, self._captures)

    def judge(self, case: Case) -> Outcome:
        """The outcome of a case, in the worker's process."""
        return self.worker.judge(case)

    def content(self, case: Case) -> bytes:
        """What the case's reader is given."""
        return content(case, self.readers[case.reader].seeds)

    def _serve(self, case: Case) -> Outcome:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir()
        os.chdir(self._scratch)
        return judged(self.readers[case.reader].call, self._scratch, self.content(case), REFUSALS, self._said)


def table(outcomes: dict[str, Counter[str]]) -> str:
    """Readers × outcomes, as Markdown."""
    kinds = [*GOOD, *BAD]
    lines = ["| reader | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for reader, counts in outcomes.items():
        lines.append("| " + " | ".join([reader, *(str(counts[kind]) for kind in kinds)]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 when there were faults."""
    parser = argparse.ArgumentParser(prog="python benchmarks/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help="which; all when none is named")
    parser.add_argument("--full", action="store_true", help=f"{CASES['full']} cases instead of {CASES['small']}")
    parser.add_argument("--cases", type=int, metavar="N", help="in all")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of each reader's first case")
    parser.add_argument("--show", metavar="READER/NUMBER", help="one case: its input and its outcome")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        try:
            if given.show:
                return _show(fuzz, given.show)
            unknown = [name for name in given.readers if name not in fuzz.readers]
            if unknown:
                parser.error(f"no reader {unknown[0]!r}; there are {', '.join(fuzz.readers)}")
            size = "full" if given.full else "small"
            return _all(fuzz, given.readers or list(fuzz.readers), given.cases or CASES[size], given.first, size)
        finally:
            fuzz.worker.close()


def _show(fuzz: Fuzz, name: str) -> int:
    reader, _, number = name.rpartition("/")
    case = Case(reader, int(number))
    sys.stdout.buffer.write(fuzz.content(case) + b"\n")
    print(*fuzz.judge(case), sep=": ")
    return 0


def _all(fuzz: Fuzz, names: list[str], cases: int, first: int, size: Any) -> int:
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    faults: list[dict[str, str]] = []
    rounds = ((name, n) for n in itertools.count(first) for name in names if n % fuzz.readers[name].every == 0)
    turns = itertools.islice(rounds, cases)
    for done, (name, number) in enumerate(turns, 1):
        if not done % 1_000:
            print(f"{done} of {cases} cases", file=sys.stderr, flush=True)
        outcome = fuzz.judge(Case(name, number))
        outcomes[name][outcome.kind] += 1
        if outcome.kind in BAD and outcomes[name][outcome.kind] <= FAULTS_SHOWN:
            faults.append({"case": f"{name}/{number}", "kind": outcome.kind, "text": outcome.text[:500]})
            print(f"{name}/{number}: {outcome.kind}: {outcome.text[:300]!r}", flush=True)
    total = sum(outcomes.values(), Counter[str]())
    bad = sum(total[kind] for kind in BAD)
    print(table(outcomes))
    rows = [row(f"inputs {kind}", ours=total[kind], unit="inputs") for kind in GOOD]
    rows += [row(f"faults: {kind}", ours=total[kind], unit="inputs", target="<= 0 inputs") for kind in BAD]
    save("fuzz", rows, size, cases=cases, outcomes={k: dict(v) for k, v in outcomes.items()}, faults=faults)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
