"""All benchmarks, one process each, one after another; then the report.

python -m benchmarks.run [--full] [NAME …]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELPERS = ("__init__", "results", "report", "run", "footage", "measure", "counting", "footprint", "network", "fuzzing")
"""Modules of this folder that measure nothing."""

ALWAYS_FULL = ("speed",)
"""Benchmarks whose real size takes two cores some minutes."""


def scripts() -> list[str]:
    """Names of the benchmarks."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in HELPERS)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, or 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all when none is named")
    parser.add_argument("--full", action="store_true", help="at the real sizes, which take hours")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(scripts()))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(scripts())}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}
    failed = []
    for name in given.names or scripts():
        print(f"--- {name}", flush=True)
        began = time.monotonic()
        full = given.full or name in ALWAYS_FULL
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--full"] if full else [])]
        if subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode:
            failed.append(name)
        print(f"--- {name}: {time.monotonic() - began:.0f} s", flush=True)
    code = subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=HERE.parent, check=False).returncode
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or code else 0


def _path() -> str:
    return os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))


if __name__ == "__main__":
    sys.exit(main())
