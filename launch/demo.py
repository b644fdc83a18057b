"""The main job, small, on this machine: make three little datasets, train on them jointly, test, report.

python launch/demo.py [key=value …]

What is there already is used: an interrupted demo goes on where it was, a finished one says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from multitrain.records.progress import duration
from multitrain.report.status import status

ROOT = Path(__file__).resolve().parents[1]
EFFECTIVE_BATCH = 16
"""Of experiment=demo."""
INTERRUPTED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or that of the step that did not succeed."""
    given = _parser().parse_args(arguments)
    began = time.monotonic()
    run = Path(given.runs) / given.name
    typed = {o.partition("=")[0] for o in given.overrides}
    shape = [] if typed & {"gpus", "micro_batch", "effective_batch"} else _shape(_gpus())
    for step in (
        lambda: _python("Data", "-m", "multitrain.data.demo", "--out", given.data, "--fraction", str(given.fraction)),
        lambda: _train(run, given.data, [*shape, *given.overrides]),
        lambda: _python("Testing", "-m", "multitrain.cli", "evaluate", str(run)),
        lambda: _python("Report", "-m", "multitrain.cli", "report", str(run)),
    ):
        code = step()
        if code:
            return code
    print(f"\nThe demo took {duration(time.monotonic() - began)}. Open {(run / 'report' / 'report.html').absolute()}")
    return 0


def _train(run: Path, data: str, overrides: Sequence[str]) -> int:
    """Train, or go on training, through the launcher that a cluster uses; a finished run is left as it is."""
    if run.is_dir() and status(run)["state"] == "finished":
        print(f"\nTraining: {run} is finished and is used as it is. To start over: rm -r {run}")
        return 0
    words = ["cluster=local", "experiment=demo", f"name={run.name}", f"runs={run.parent}", f"data.root={data}"]
    code = _python("Training", "launch/submit.py", *words, *overrides)
    if code == INTERRUPTED:
        print(f"interrupted; run the demo again to go on from the last checkpoint in {run}", file=sys.stderr)
    return code


def _python(title: str, *command: str) -> int:
    """Run a command of this project, as a user would type it; its exit code."""
    began = time.monotonic()
    print(f"\n{title}: python {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = [str(ROOT / command[0]), *command[1:]] if command[0].endswith(".py") else command
    with subprocess.Popen([sys.executable, *script], env=environment) as process:
        # Ctrl-C reaches the command too, which saves and leaves; `subprocess.run` would kill it meanwhile.
        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        code = process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    print(f"({duration(time.monotonic() - began)})", flush=True)
    return code if code >= 0 else 128 - code


def _gpus() -> int:
    """GPUs that torch can use here; asked in a process of its own, since launching does without torch."""
    code = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 else 0


def _shape(gpus: int) -> list[str]:
    """Ranks, and all videos of a rank at once: one a GPU where there are some, else two on the CPU."""
    if not gpus:
        return [f"micro_batch={EFFECTIVE_BATCH // 2}"]
    ranks = max(n for n in range(1, gpus + 1) if EFFECTIVE_BATCH % n == 0)
    return [f"gpus={ranks}", f"micro_batch={EFFECTIVE_BATCH // ranks}", "precision=bf16"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/demo.py",
        description="Make data, train, test and report: the main job, small, on this machine.",
    )
    parser.add_argument("--name", default="demo", help="name of the run (default demo)")
    parser.add_argument("--runs", default="runs", help="folder of runs (default runs)")
    parser.add_argument("--data", default="demo", help="folder of the generated datasets (default demo)")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the usual number of videos (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the training, e.g. updates=200")
    return parser


if __name__ == "__main__":
    sys.exit(main())
