"""Feed damaged and hostile input to every reader; print a table of readers × outcomes.

python benchmarks/fuzz.py [--full] [--cases N] [READER …] [--table] [--show READER/NUMBER]

A reader must accept an input or refuse it in one line. A traceback, a library's message, more than 10 s of CPU time, or 1 GB more
memory is a fault; it is recorded with the number that reproduces it. Case n of a reader is the same input in every run. Functions and
commands are called in one process with everything imported; readers whose name begins with "$" start Python for each case, as a shell
does (about 0.5 % of all cases).

The counts are in results/unfinished/fuzz-SIZE.json after each case: --table prints them at any time, and the same command resumes
after the last counted case. results/fuzz.json is written at the end.
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
from collections.abc import Iterator
from functools import partial

from benchmarks.fuzzing.judge import BAD, Case, Outcome, Serve, Worker, content, judged, taking
from benchmarks.fuzzing.material import Material
from benchmarks.fuzzing.progress import Progress
from benchmarks.fuzzing.readers import REFUSALS, Reader, readers
from benchmarks.results import FOLDER, Size, row, save

CASES: dict[Size, int] = {"small": 1_000, "full": 20_000}


class Fuzz:
    """Runs cases of all readers in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        material = Material(folder / "material")
        self.readers: dict[str, Reader] = readers(material)
        captures = (folder / "out", folder / "err")
        self.worker = Worker(partial(_served, material, folder / "case", captures), captures)

    def judge(self, case: Case) -> Outcome:
        """Run a case in the worker process."""
        return self.worker.judge(case)

    def content(self, case: Case) -> bytes:
        """The input of a case."""
        return content(case, self.readers[case.reader].seeds)


def _served(material: Material, scratch: Path, captures: tuple[Path, Path]) -> Serve:
    """The function that runs a case, called in the worker process."""
    known, said = readers(material), taking(captures)

    def serve(case: Case) -> Outcome:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        os.chdir(scratch)
        reader = known[case.reader]
        return judged(reader.call, scratch, content(case, reader.seeds), REFUSALS, said)

    return serve


def main(arguments: list[str] | None = None, results: Path = FOLDER) -> int:
    """The exit status: 0, or 1 when there were faults."""
    parser = argparse.ArgumentParser(prog="python benchmarks/fuzz.py", description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help="which; all when none is named")
    parser.add_argument("--full", action="store_true", help=f"{CASES['full']} cases instead of {CASES['small']}")
    parser.add_argument("--cases", type=int, metavar="N", help="in all")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of each reader's first case")
    parser.add_argument("--table", action="store_true", help="print what has come out so far, and end")
    parser.add_argument("--show", metavar="READER/NUMBER", help="one case: its input and its outcome")
    given = parser.parse_args(arguments)
    size: Size = "full" if given.full else "small"
    cases = given.cases or CASES[size]
    unfinished = results / "unfinished" / f"fuzz-{size}.json"
    if given.table:
        found = next((file for file in (unfinished, results / "raw" / "fuzz.json") if file.exists()), None)
        return _table(found) if found else parser.error("nothing has been tried yet")
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        try:
            if given.show:
                return _show(fuzz, given.show)
            unknown = [name for name in given.readers if name not in fuzz.readers]
            if unknown:
                parser.error(f"no reader {unknown[0]!r}; there are {', '.join(fuzz.readers)}")
            progress = Progress.resumed(unfinished, given.readers or list(fuzz.readers), given.first)
            _try(fuzz, progress, cases, unfinished)
        finally:
            fuzz.worker.close()
    _finish(progress, size, results)
    unfinished.unlink()
    return 1 if progress.faults else 0


def _table(file: Path) -> int:
    progress = Progress.read(file)
    print(f"{progress.done} cases\n{progress.table()}")
    return 0


def _show(fuzz: Fuzz, name: str) -> int:
    reader, _, number = name.rpartition("/")
    case = Case(reader, int(number))
    sys.stdout.buffer.write(fuzz.content(case) + b"\n")
    print(*fuzz.judge(case), sep=": ")
    return 0


def _turns(fuzz: Fuzz, progress: Progress) -> Iterator[tuple[str, int]]:
    """Cases in order: one of each reader, then the next number."""
    for number in itertools.count(progress.first):
        for name in progress.readers:
            if number % fuzz.readers[name].every == 0:
                yield name, number


def _try(fuzz: Fuzz, progress: Progress, cases: int, file: Path) -> None:
    if progress.done:
        print(f"going on after case {progress.done}", file=sys.stderr, flush=True)
    for name, number in itertools.islice(_turns(fuzz, progress), progress.done, cases):
        outcome = fuzz.judge(Case(name, number))
        if progress.add(name, number, outcome):
            print(f"{name}/{number}: {outcome.kind}: {outcome.text[:300]!r}", flush=True)
        progress.save(file)
        if not progress.done % 500:
            print(f"{progress.done} of {cases} cases", file=sys.stderr, flush=True)


def _finish(progress: Progress, size: Size, results: Path) -> None:
    table, total = progress.table(), progress.total()
    print(table)
    rows = [
        row("damaged and hostile inputs tried", ours=progress.done, unit="inputs"),
        row("of them accepted", ours=total["accepted"], unit="inputs"),
        row("of them refused in a line", ours=total["refused"], unit="inputs"),
        row(
            "damaged inputs with a traceback, a hang or another fault",
            ours=sum(total[kind] for kind in BAD),
            unit="inputs",
            note=f"of {progress.done} to {len(progress.readers)} readers and command lines; faults are {', '.join(BAD)}",
        ),
    ]
    save("fuzz", rows, size, folder=results, **progress.__dict__, table=table)


if __name__ == "__main__":
    sys.exit(main())
