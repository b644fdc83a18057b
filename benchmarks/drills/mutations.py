"""Remove the fixes that the guarantees depend on, one after the other, and check that a test fails each time.

python benchmarks/drills/mutations.py                    all of them
python benchmarks/drills/mutations.py --only "requeue"   those whose words, file, page or tests hold these words
python benchmarks/drills/mutations.py --untried          those that the page says were not tried yet
python benchmarks/drills/mutations.py --page             and write what was noticed into docs/guarantees/mutations.md

`mutations.yaml` has the list. Each is applied to a temporary copy of the tree, in which the tests named beside it are run:
the first that fails has noticed. Before that, all of these tests must pass in the copy as it is. Exit status 1 when a
mutation is noticed by none, or a text to be taken out is not in its file any more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("mutations.yaml")
PAGE = ROOT / "docs" / "guarantees" / "mutations.md"
COPIED = ("multitrain", "launch", "tests", "configs", "slurm", "benchmarks", "pyproject.toml", "Makefile")
LIMIT = 150
"""Timeout of one test, in seconds: without the fix it may hang."""

HEAD = """# What the tests notice

A test that passes says little until it has been seen to fail. For each fix that the guarantees rest on, this table names what was
taken out, where, and the test that failed without it.

```
python benchmarks/drills/mutations.py                    all of them, one at a time, each in a copy of the tree
python benchmarks/drills/mutations.py --only "requeue"   those whose words, file, page or tests hold these words
```

The command fails when a mutation goes unnoticed, or when the text that it takes out is no longer in its file; that the texts and the
tests are there is part of the test suite as well. What each puts in place of a fix is in `benchmarks/drills/mutations.yaml`.
"""


@dataclass(frozen=True)
class Mutation:
    """One fix that is removed.

    `what`: the fix, in words. `guarantee`: the page that promises it. `file`: where it is. `before`: its text, there once.
    `after`: what stands there without it. `tests`: ids of pytest, the quickest first; one of them must fail.
    """

    what: str
    guarantee: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]

    def holds(self, words: Sequence[str]) -> bool:
        """Whether a field of the mutation contains one of `words`; True without words."""
        said = " ".join((self.what, self.file, self.guarantee, *self.tests)).lower()
        return not words or any(w.lower() in said for w in words)

    def problem(self, tree: Path) -> str | None:
        """The reason why it cannot be applied to `tree`; None if it can."""
        path = tree / self.file
        count = path.read_text().count(self.before) if path.is_file() else 0
        return (
            None
            if count == 1
            else f"its text is {count} times in {self.file}, instead of once: {self.before.strip()!r}"
        )


def mutations() -> list[Mutation]:
    """All mutations, in the order of the list."""
    listed = yaml.safe_load(LIST.read_text())
    return [
        Mutation(guarantee=page, **row | {"tests": tuple(row["tests"])})
        for page, rows in listed.items()
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    """Try the mutations and print the table; 0 when a test failed for each of them."""
    parser = argparse.ArgumentParser(prog="mutations.py", description=__doc__, formatter_class=_Verbatim)
    only = "those whose words, file, page or tests hold these words; may be given more than once"
    parser.add_argument("--only", metavar="WORDS", action="append", default=[], help=only)
    parser.add_argument("--untried", action="store_true", help="those of them that the page says were not tried yet")
    parser.add_argument("--page", action="store_true", help=f"write what was noticed into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args(arguments)
    before = seen_before()
    chosen = [m for m in mutations() if m.holds(given.only) and not (given.untried and m in before)]
    if not chosen:
        print(f"error: no mutation to try holds {' or '.join(given.only) or 'anything'}", file=sys.stderr)
        return 2
    problem = {m: reason for m in chosen if (reason := m.problem(ROOT))}
    for mutation, reason in problem.items():
        print(f"ROTTEN     {mutation.what}: {reason}", flush=True)
    noticed: dict[Mutation, str] = {}
    with copy() as tree:
        tests = list(dict.fromkeys(t for m in chosen for t in m.tests))
        print(f"{len(chosen)} mutations, {len(tests)} tests; first the tests as they are", flush=True)
        code, said = run(tree, tests)
        if code:
            print(f"error: these tests must pass before anything is taken out\n{said[-6000:]}", file=sys.stderr)
            return 1
        for mutation in chosen:
            if mutation in problem:
                continue
            began = time.monotonic()
            found = tried(tree, mutation)
            if found is not None:
                noticed[mutation] = found
            result = f"noticed by {found.rpartition('::')[2]}" if found else "NOT NOTICED by any of its tests"
            print(f"{time.monotonic() - began:5.0f} s  {mutation.what}: {result}", flush=True)
            if given.page:
                before.pop(mutation, None)
                PAGE.write_text(page(before | noticed))
    print("\n" + table(chosen, noticed))
    print(f"\n{len(noticed)} of {len(chosen)} noticed")
    return 0 if len(noticed) == len(chosen) else 1


@contextmanager
def copy() -> Iterator[Path]:
    """A temporary copy of the files that the tests need; the folder `shared` beside the checkout stays accessible."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        if (shared := ROOT.parent / "shared").exists():
            (tree.parent / "shared").symlink_to(shared.resolve())
        for arguments in (["init", "--quiet"], ["add", "--all"]):  # tests ask git for the files of a checkout
            subprocess.run(["git", "-C", str(tree), *arguments], check=True)
        yield tree


def tried(tree: Path, mutation: Mutation) -> str | None:
    """Apply a mutation, run its tests and revert it; the id of the test that failed, None when none did.

    Raises:
        SystemExit: its tests could not be run at all.
    """
    path = tree / mutation.file
    original = path.read_text()
    path.write_text(original.replace(mutation.before, mutation.after))
    try:
        code, said = run(tree, mutation.tests)
    finally:
        path.write_text(original)
    if code == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - |$)", said, re.MULTILINE)
    if code != 1 or failed is None:
        raise SystemExit(f"error: the tests of '{mutation.what}' cannot be run:\n{said[-3000:]}")
    return failed[1]


def run(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests; pytest's exit status and output. All processes of the tests are ended, even if a mutation makes them hang."""
    options = [
        f"--basetemp={tree.parent / 'tmp'}",
        "-x",
        "-q",
        "--tb=short",
        "-rfE",
        "-p",
        "no:cacheprovider",
        f"--timeout={LIMIT}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["MULTITRAIN_SLOW"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(tree.parent).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    return done.returncode, done.stdout + done.stderr


def table(chosen: Sequence[Mutation], noticed: dict[Mutation, str]) -> str:
    """One line per mutation: the removed fix, the test, and whether the test failed."""
    rows = [("taken out", "test", "noticed")]
    for m in chosen:
        rows.append((m.what, noticed.get(m, ", ".join(m.tests)).rpartition("::")[2], "yes" if m in noticed else "NO"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def seen_before() -> dict[Mutation, str]:
    """The test that failed for each mutation, according to the existing page."""
    rows = re.findall(r"^\| (.*?) \| `.*?` \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    tests = {what: test.replace("\\|", "|") for what, test in rows}
    return {m: tests[m.what] for m in mutations() if m.what in tests}


def page(noticed: dict[Mutation, str]) -> str:
    """The text of `docs/guarantees/mutations.md`."""
    parts = [HEAD]
    listed = mutations()
    for guarantee in dict.fromkeys(m.guarantee for m in listed):
        title = (PAGE.with_name(f"{guarantee}.md").read_text().splitlines()[0]).removeprefix("# ")
        parts.append(f"\n## [{title}]({guarantee}.md)\n\n| taken out | file | noticed by |\n|---|---|---|\n")
        for mutation in (m for m in listed if m.guarantee == guarantee):
            name = noticed.get(mutation, "").rpartition("/")[2].replace("|", "\\|")
            parts.append(f"| {mutation.what} | `{mutation.file}` | {f'`{name}`' if name else 'not tried yet'} |\n")
    return "".join(parts)


class _Verbatim(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
