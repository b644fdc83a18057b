"""From a run's folder to a SLURM job. The only file that imports submitit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.rank import Rank, supervised, training
from multitrain.cluster.requeue import SCRIPT
from multitrain.cluster.slurm import SUBMISSION, SlurmError, command_environment, show_job
from multitrain.config import ClusterConfig, ConfigError, RunConfig
from multitrain.files import replace_text

if TYPE_CHECKING:
    from submitit import SlurmExecutor

OURS = {
    "nodes": "nodes",
    "ntasks-per-node": "gpus",
    "ntasks": "nodes and gpus",
    "gres": "gpus, cluster.gpu_type and cluster.gpu_request",
    "gpus-per-node": "gpus, cluster.gpu_type and cluster.gpu_request",
    "cpus-per-task": "cluster.cpus_per_gpu",
    "mem": "cluster.memory_per_node",
    "time": "cluster.time_limit",
    "signal": "cluster.lead_time",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "reservation": "cluster.reservation",
    "nodelist": "cluster.nodelist",
    "exclude": "cluster.exclude",
    "job-name": "name",
}
"""`sbatch` options that have an option of their own here."""

FIXED = ("output", "error", "open-mode", "requeue", "no-requeue", "array")
"""`sbatch` options that resuming relies on."""

COMMENT = "multitrain run "
"""What the comment of a job of `slurm/train.sh` begins with; the run's folder follows."""

JOB = "launch/job.sh"
"""In the snapshot of the code: what a batch script does around its steps."""


def script(run: Path, config: RunConfig, arguments: tuple[str, ...] | None = None) -> str:
    """The sbatch script of a job; needs no SLURM on this machine. submitit adds nothing to it when it submits.

    Raises:
        ConfigError: submitit is not installed, or options of `cluster` contradict each other.
    """
    executor = _executor(run, config, checked=False)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def write_script(run: Path, config: RunConfig) -> Path:
    """Write the run's own batch script: what a successor job runs, and `slurm/train.sh` inside its own allocation.

    It is :func:`script`, but that the ranks are named on its command line, so that it can be submitted by hand.
    """
    executor = _executor(run, config, checked=False)
    command = shlex.join(
        ["-m", "launch.rank", str(run), *supervised(run, training(run), config.cluster.restarts_in_place)]
    )
    text = executor._make_submission_file_text(f"{executor.python} -u {command}", uid="")
    path = run / SCRIPT
    replace_text(path, text)
    return path


def submit(run: Path, config: RunConfig, arguments: tuple[str, ...] | None = None, *, after: str | None = None) -> str:
    """Submit the job of the run in folder `run`; returns its id.

    Args:
        arguments: of the Python that each rank becomes, for a test of the run's weights; training when not given.
        after: id of a job that must have ended with exit status 0 before this one starts; if it fails, SLURM removes this one.

    Raises:
        ConfigError: SLURM refused the job, in its own words.
    """
    executor = _executor(run, config, checked=True, task="train" if arguments is None else "evaluate")
    if after is not None:
        more = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
        executor.update_parameters(additional_parameters=executor.parameters["additional_parameters"] | more)
    ranks = arguments or supervised(run, training(run), config.cluster.restarts_in_place)
    with _sbatch():
        return str(executor.submit(Rank(run, ranks)).job_id)


def submit_array(folder: Path, name: str, runs: Sequence[tuple[Path, RunConfig]], parallel: int = 0) -> list[str]:
    """Submit the jobs of several runs of one shape as one array called `name`; returns their ids, ``123_0`` and so on.

    Args:
        folder: for logs and pickles; ``runs.txt`` in it has the runs' folders, one a line.
        parallel: runs at once; 0 for as many as SLURM lets.

    Raises:
        ConfigError: SLURM refused the array, in its own words.
    """
    config = runs[0][1].model_copy(update={"name": name})
    executor = _executor(folder, config, checked=True)
    task = f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / "runs.txt"))})'
    logs = _in_script(str(folder / "logs"))
    arguments = [a for a in executor.parameters["srun_args"] if not a.endswith("-rank%t.log")]
    executor.update_parameters(
        setup=[task, *executor.parameters["setup"][1:]],
        array_parallelism=parallel or len(runs),
        srun_args=[*arguments, f"{logs}/%A_%a-rank%t.log"],
        additional_parameters=executor.parameters["additional_parameters"] | {"output": f"{logs}/%A_%a.log"},
    )
    ranks = [Rank(run, supervised(run, training(run), c.cluster.restarts_in_place)) for run, c in runs]
    with _sbatch():
        with executor.batch():
            jobs = [executor.submit(rank) for rank in ranks]
        return [str(job.job_id) for job in jobs]


@contextlib.contextmanager
def _sbatch() -> Iterator[None]:
    """Around what submitit submits. Raises ConfigError: SLURM refused the job, in its own words."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    with _own_environment(), contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what it raises
        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
            said = [
                line.partition("error: ")[2] for line in str(error).splitlines() if line.startswith("sbatch: error: ")
            ]
            raise ConfigError("SLURM refused the job: " + "; ".join(said or str(error).split("\n"))) from None


def active(run: Path, jobs: list[str]) -> dict[str, str]:
    """Those of the jobs that a run has had that wait, run or end right now, with their state.

    An id may have been used again where a cluster was set up anew: a job counts when its name, its output or its command
    is of this run.

    Raises:
        ConfigError: SLURM does not answer.
    """
    if not jobs or not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, env=command_environment()
        )
    except subprocess.TimeoutExpired:
        raise ConfigError("SLURM does not answer (squeue, 20 s); try again later") from None
    if done.returncode and "Invalid job id" not in done.stderr:  # that is how it says that all are long over
        raise ConfigError(f"SLURM does not answer ({' '.join(done.stderr.split())}); try again later")
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
    return {job: state for job, state in listed.items() if _is_of_run(job, run)}


def _is_of_run(job: str, run: Path) -> bool:
    try:
        shown = show_job(job)
    except SlurmError:
        return True
    name, output = shown.get("JobName", ""), shown.get("StdOut", "")
    paths = (shown.get("Command", "").partition(" ")[0], output, shown.get("Comment", "").removeprefix(COMMENT))
    of_this_name = run.name == name or ("ArrayJobId" in shown and run.name.startswith(f"{name}-"))  # of a sweep
    return of_this_name or any(p == str(run) or p.startswith(f"{run}/") for p in paths) or name == "multitrain"


def rank_log(run: Path, job: str, rank: int = 0) -> Path:
    """The log of one rank, appended to by every start of the job."""
    return run / "logs" / f"{job}-rank{rank}.log"


def check(config: RunConfig) -> None:
    """Refuse what SLURM would refuse later, or would run wrongly.

    Raises:
        ConfigError: one line.
    """
    cluster = config.cluster
    if cluster.lead_time >= 60 * cluster.minutes:
        raise ConfigError(
            f"cluster.lead_time={cluster.lead_time} (seconds) is not shorter than cluster.time_limit="
            f"{cluster.time_limit} ({cluster.minutes} minutes); the job would be warned before it starts"
        )
    for option in cluster.sbatch:
        name = option.replace("_", "-")
        if name in OURS:
            raise ConfigError(f"cluster.sbatch has {option!r}, which has an option of its own: {OURS[name]}")
        if name in FIXED:
            raise ConfigError(f"cluster.sbatch has {option!r}, which resuming relies on; leave it out")
        if name.startswith("mem-per-") and cluster.memory_per_node:
            raise ConfigError(
                f"cluster.sbatch has {option!r} and cluster.memory_per_node is set; SLURM takes one of them"
            )
    if not shutil.which("sbatch") and not config.dry_run:
        raise ConfigError("this machine has no SLURM (no sbatch); submit from a login node, or use cluster=local")


def _executor(run: Path, config: RunConfig, *, checked: bool, task: str = "train") -> SlurmExecutor:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("submitit is not installed; pip install 'multitrain[slurm]', or use cluster=local") from None

    class AnywhereExecutor(SlurmExecutor):
        """One that does not insist on an `srun` in reach, to print scripts."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    folder = run / "logs" / "submitit"
    executor = (SlurmExecutor if checked else AnywhereExecutor)(folder=folder, python=f"$hold {_python(config)}")
    executor.update_parameters(**_parameters(run, config, task))
    if checked:
        folder.mkdir(parents=True, exist_ok=True)
    return executor


def _python(config: RunConfig) -> str:
    """The Python command of the ranks; in a job of `slurm/train.sh` the one that the script was given."""
    given = os.environ.get("MULTITRAIN_PYTHON") if "SLURM_JOB_ID" in os.environ else None
    return config.cluster.python or shlex.quote(given or sys.executable)


def _parameters(run: Path, config: RunConfig, task: str) -> dict[str, Any]:
    """submitit's parameters of a job: one task a GPU, warned before the limit, requeued, one log a rank."""
    cluster = config.cluster
    setup = [f"run={shlex.quote(str(run))}"]
    setup += [f"python=({_python(config)})"]
    setup += ["task=evaluate"] if task == "evaluate" else []
    setup += ['export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"', f'. "$run/code/{JOB}"', *cluster.setup]
    setup += ["export PYTHONSAFEPATH=1"]  # python -m would look for modules in the submit directory first: the checkout
    if config.preflight:
        step = shlex.join(["srun", "--kill-on-bad-exit=1", *cluster.srun_args])
        setup.append(f'{step} $hold {_python(config)} -u -m launch.preflight --dir "$run" || finish $?')
    return {
        "job_name": config.name or "multitrain",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodelist": cluster.nodelist,
        "exclude": cluster.exclude,
        "nodes": config.nodes,
        "ntasks_per_node": config.gpus,
        "cpus_per_task": cluster.cpus_per_gpu,
        "time": cluster.minutes,
        "signal_delay_s": cluster.lead_time,
        "setup": setup,
        "teardown": ["finish $?"],
        "srun_args": [
            "--kill-on-bad-exit=1",
            *cluster.srun_args,
            "--output",
            _in_script(str(run / "logs")) + "/%j-rank%t.log",
        ],
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": _more(cluster, config.gpus) | {"output": f"{_in_script(str(run))}/logs/%j.log"},
    }


def _in_script(path: str) -> str:
    """A path in an option of SLURM that replaces ``%j`` and the like."""
    return path.replace("%", "%%")


def _more(cluster: ClusterConfig, gpus: int) -> dict[str, Any]:
    """`sbatch` options that submitit has no name for, or spells in its own way."""
    back = "requeue" if cluster.requeue == "requeue" else "no-requeue"  # else SLURM would requeue beside the successor
    more: dict[str, Any] = {back: True, "signal": f"USR2@{cluster.lead_time}"}
    kind = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus)
    if cluster.gpu_request == "gres":
        more["gres"] = f"gpu:{kind}"
    elif cluster.gpu_request == "gpus-per-node":
        more["gpus-per-node"] = kind
    if cluster.memory_per_node is not None:
        more["mem"] = cluster.memory_per_node
    if cluster.reservation:
        more["reservation"] = cluster.reservation
    given = {name.replace("_", "-"): value for name, value in cluster.sbatch.items() if value is not False}
    more.update({name: True if value in ("", True) else value for name, value in given.items()})
    return more


def foreign_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The variables of this shell that would change the script that was printed, and are not passed on."""
    if "SLURM_JOB_ID" in environment:  # inside a job SLURM itself has set dozens of them
        return sorted(k for k in environment if k.startswith("SBATCH_"))
    return sorted(k for k in environment if SUBMISSION.match(k))


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """submitit submits in this process's own environment: the variables that do not belong into it are hidden meanwhile."""
    hidden = {k: v for k, v in os.environ.items() if SUBMISSION.match(k)}
    try:
        for name in hidden:
            del os.environ[name]
        yield
    finally:
        os.environ.update(hidden)
