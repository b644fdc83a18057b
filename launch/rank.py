"""The callable that submitit runs on every rank: it replaces its process by the training process.

python -m launch.rank RUN ARGUMENTS-OF-PYTHON …      the same without submitit, for the run's own batch script
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from multitrain.cluster.slurm import DIST_ENV_VARS, STOP_SIGNALS, block_stop_signals, rank_environment


def training(run: Path) -> tuple[str, ...]:
    """The arguments of Python that train the run in folder `run`."""
    return ("-m", "multitrain.train", str(run))


def supervised(run: Path, arguments: tuple[str, ...], restarts: int) -> tuple[str, ...]:
    """The arguments of Python that run `arguments` under :mod:`launch.supervisor`, with up to `restarts` restarts in place."""
    return ("-m", "launch.supervisor", str(run), str(restarts), *arguments)


class Rank:
    """Replaces the calling process by ``python -u ARGUMENTS``, run from the snapshot of the code.

    The pickle of a job holds this object and nothing else. A requeued job runs the same pickle again, so nothing in it may
    depend on the progress of the run. Replacing the process removes submitit's signal handlers, which ignore SIGTERM, call
    `checkpoint()` in every forked child, and requeue the job from whichever process comes first.

    Args:
        run: the run's folder; the process starts in its ``code/``.
        arguments: arguments of Python, e.g. those of :func:`training`.
    """

    def __init__(self, run: Path, arguments: tuple[str, ...]) -> None:
        self.run = str(run)
        self.arguments = arguments

    def __call__(self) -> None:
        block_stop_signals()  # exec keeps the mask; the rank unblocks them once its handlers are installed
        for name in (*STOP_SIGNALS, signal.SIGCONT):
            signal.signal(name, signal.SIG_DFL)  # exec resets handlers, but keeps ignored signals ignored
        code = os.path.join(self.run, "code")
        os.chdir(code)
        inherited = {k: v for k, v in os.environ.items() if k not in DIST_ENV_VARS}  # set in the shell that submitted
        environment = {**inherited, **rank_environment(inherited), "PYTHONPATH": python_path(code)}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-u", *self.arguments], environment)


def python_path(code: str | Path) -> str:
    """PYTHONPATH with the snapshot of the code before everything else."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(code)]
    return os.pathsep.join([str(code), *others])


def main() -> None:
    """Become the rank that the command line names."""
    run, *arguments = sys.argv[1:]
    Rank(Path(run), tuple(arguments))()


if __name__ == "__main__":
    main()
