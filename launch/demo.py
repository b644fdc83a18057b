"""Run a small version of the whole workflow here: generate three datasets, train on them jointly, test, write the report.

python launch/demo.py [key=value …]

Existing results are reused: an interrupted demo resumes, and a finished one is not repeated.
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

from launch.rank import python_path
from multitrain.config.arguments import OneLineParser
from multitrain.records.progress import duration
from multitrain.report.status import status

ROOT = Path(__file__).resolve().parents[1]
EFFECTIVE_BATCH = 16
"""Effective batch of experiment=demo, in videos."""
INTERRUPTED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code: 0, or that of the step that failed."""
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
    """Train, or resume training, through the launcher that a cluster uses; a finished run is left as it is."""
    if run.is_dir() and status(run)["state"] == "finished":
        print(f"\nTraining: {run} is finished and is used as it is. To start over: rm -r {run}")
        return 0
    words = ["cluster=local", "experiment=demo", f"name={run.name}", f"runs={run.parent}", f"data.root={data}"]
    code = _python("Training", "launch/submit.py", *words, *overrides)
    if code == INTERRUPTED:
        print(f"interrupted; run the demo again to resume from the last checkpoint in {run}", file=sys.stderr)
    return code


def _python(title: str, *command: str) -> int:
    """Run a command of this project as a user would type it, and return its exit code."""
    began = time.monotonic()
    print(f"\n{title}: python {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    script = [str(ROOT / command[0]), *command[1:]] if command[0].endswith(".py") else command
    with subprocess.Popen([sys.executable, *script], env=environment) as process:
        # Ctrl-C also reaches the command, which saves and exits; `subprocess.run` would kill it before.
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
    """Number of GPUs that torch can use here; counted in a separate process, since launching does not import torch."""
    code = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 else 0


def _shape(gpus: int) -> list[str]:
    """Overrides with one rank per GPU, or two on the CPU without GPUs, and the videos of a rank in one micro-batch."""
    if not gpus:
        return [f"micro_batch={EFFECTIVE_BATCH // 2}"]
    ranks = max(n for n in range(1, gpus + 1) if EFFECTIVE_BATCH % n == 0)
    return [f"gpus={ranks}", f"micro_batch={EFFECTIVE_BATCH // ranks}", "precision=bf16"]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        "python launch/demo.py",
        "Generate data, train, test and report: a small version of the whole workflow, on this machine.",
    )
    parser.add_argument("--name", default="demo", help="name of the run (default demo)")
    parser.add_argument("--runs", default="runs", help="folder of runs (default runs)")
    parser.add_argument("--data", default="demo", help="folder of the generated datasets (default demo)")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="fraction of the usual number of videos (default 1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the training, e.g. updates=200")
    return parser


if __name__ == "__main__":
    sys.exit(main())
