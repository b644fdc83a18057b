"""Submit the job of a run's folder to SLURM. The only file that imports submitit."""

from __future__ import annotations

import contextlib
import io
import os
import re
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

MANAGED_SBATCH_OPTIONS = {
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
"""`sbatch` options that this project sets, with its own option for each."""

RESERVED_SBATCH_OPTIONS = ("output", "error", "open-mode", "requeue", "no-requeue", "array")
"""`sbatch` options that a user cannot change, since resuming relies on them."""

JOB_COMMENT_PREFIX = "multitrain run "
"""Beginning of the comment of a job of `slurm/train.sh`; the run's folder follows."""

JOB_SCRIPT_LIBRARY = "launch/job.sh"
"""Shell functions for batch scripts, in the snapshot of the code."""


def script(run: Path, config: RunConfig, arguments: tuple[str, ...] | None = None) -> str:
    """The sbatch script of a job, exactly as submitit submits it; needs no SLURM on this machine.

    Raises:
        ConfigError: submitit is not installed, or options of `cluster` contradict each other.
    """
    executor = _executor(run, config, checked=False)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def write_script(run: Path, config: RunConfig) -> Path:
    """Write the run's own batch script, for successor jobs and for `slurm/train.sh`; returns its path.

    It differs from :func:`script` in that its command line has the arguments of the ranks, so that it can be submitted by hand.
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
        arguments: arguments of Python for each rank of a test of the run's weights; default: those that train the run.
        after: id of a job that must end with exit status 0 before this one starts; if it fails, SLURM removes this one.

    Raises:
        ConfigError: SLURM refused the job; the message is SLURM's.
    """
    executor = _executor(run, config, checked=True, task="train" if arguments is None else "evaluate")
    if after is not None:
        more = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
        executor.update_parameters(additional_parameters=executor.parameters["additional_parameters"] | more)
    ranks = arguments or supervised(run, training(run), config.cluster.restarts_in_place)
    with _submission_errors():
        return str(executor.submit(Rank(run, ranks)).job_id)


def submit_array(folder: Path, name: str, runs: Sequence[tuple[Path, RunConfig]], parallel: int = 0) -> list[str]:
    """Submit the jobs of several runs of one shape as one array called `name`; returns their ids, ``123_0`` and so on.

    Args:
        folder: for logs and pickles; its ``runs.txt`` lists the runs' folders, one per line.
        parallel: limit of runs at once; 0: as many as SLURM allows.

    Raises:
        ConfigError: SLURM refused the array; the message is SLURM's.
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
    with _submission_errors():
        with executor.batch():
            jobs = [executor.submit(rank) for rank in ranks]
        return [str(job.job_id) for job in jobs]


@contextlib.contextmanager
def _submission_errors() -> Iterator[None]:
    """Turn submitit's errors into a ConfigError with SLURM's message, and hide the shell's SLURM variables meanwhile."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    with _clean_environment(), contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
            messages = [
                line.partition("error: ")[2] for line in str(error).splitlines() if line.startswith("sbatch: error: ")
            ]
            raise ConfigError("SLURM refused the job: " + "; ".join(messages or str(error).split("\n"))) from None


def active(run: Path, jobs: list[str]) -> dict[str, str]:
    """The jobs among `jobs` that wait, run or are completing now, with their states.

    A cluster that was set up anew may reuse ids: a job counts only if its name, output, command or comment belongs to this run.

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
    if done.returncode and "Invalid job id" not in done.stderr:  # SLURM has forgotten all of these jobs
        raise ConfigError(f"SLURM does not answer ({' '.join(done.stderr.split())}); try again later")
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())
    return {job: state for job, state in listed.items() if _is_of_run(job, run)}


def _is_of_run(job: str, run: Path) -> bool:
    try:
        shown = show_job(job)
    except SlurmError:
        return True
    name, output = shown.get("JobName", ""), shown.get("StdOut", "")
    paths = (
        shown.get("Command", "").partition(" ")[0],
        output,
        shown.get("Comment", "").removeprefix(JOB_COMMENT_PREFIX),
    )
    of_this_name = run.name == name or ("ArrayJobId" in shown and run.name.startswith(f"{name}-"))  # a run of a sweep
    return of_this_name or any(p == str(run) or p.startswith(f"{run}/") for p in paths) or name == "multitrain"


def rank_log(run: Path, job: str, rank: int = 0) -> Path:
    """The log of one rank; every start of the job appends to it."""
    return run / "logs" / f"{job}-rank{rank}.log"


def check(config: RunConfig) -> None:
    """Refuse options that SLURM would refuse later, or that would make a job run wrongly.

    Raises:
        ConfigError: names the option, and what to do.
    """
    cluster = config.cluster
    if cluster.lead_time >= 60 * cluster.minutes:
        raise ConfigError(
            f"cluster.lead_time={cluster.lead_time} (seconds) is not shorter than cluster.time_limit="
            f"{cluster.time_limit} ({cluster.minutes} minutes); the job would be warned before it starts"
        )
    for option in cluster.sbatch:
        name = option.replace("_", "-")
        if name in MANAGED_SBATCH_OPTIONS:
            raise ConfigError(f"cluster.sbatch has {option!r}; set it with {MANAGED_SBATCH_OPTIONS[name]} instead")
        if name in RESERVED_SBATCH_OPTIONS:
            raise ConfigError(f"cluster.sbatch has {option!r}, which resuming relies on; leave it out")
        if name.startswith("mem-per-") and cluster.memory_per_node:
            raise ConfigError(
                f"cluster.sbatch has {option!r} and cluster.memory_per_node is set; SLURM accepts one of them"
            )
    if not shutil.which("sbatch") and not config.dry_run:
        raise ConfigError("this machine has no SLURM (no sbatch); submit from a login node, or use cluster=local")


def _executor(run: Path, config: RunConfig, *, checked: bool, task: str = "train") -> SlurmExecutor:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ConfigError("submitit is not installed; pip install 'multitrain[slurm]', or use cluster=local") from None

    class AnywhereExecutor(SlurmExecutor):
        """An executor that prints scripts without an installed `srun`."""

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
    """The Python command of the ranks; in a job of `slurm/train.sh` that of MULTITRAIN_PYTHON."""
    given = os.environ.get("MULTITRAIN_PYTHON") if "SLURM_JOB_ID" in os.environ else None
    return _absolute(config.cluster.python) if config.cluster.python else shlex.quote(given or sys.executable)


def _absolute(command: str) -> str:
    """A shell command with its relative paths (``venv/bin/python``, ``image.sif``) as those of this folder, where they exist."""
    return re.sub(
        r"(?<!\S)[\w.][\w./+@-]*[./][\w./+@-]*(?!\S)",
        lambda word: os.path.abspath(word[0]) if os.path.isfile(word[0]) else word[0],
        command,
    )


def _parameters(run: Path, config: RunConfig, task: str) -> dict[str, Any]:
    """submitit's parameters of a job: one task per GPU, a warning before the time limit, requeueing, one log per rank."""
    cluster = config.cluster
    setup = [f"run={shlex.quote(str(run))}"]
    setup += [f"python=({_python(config)})"]
    setup += ["task=evaluate"] if task == "evaluate" else []
    setup += [
        'export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"',
        f'. "$run/code/{JOB_SCRIPT_LIBRARY}"',
        *cluster.setup,
    ]
    # `python -m` imports from the working directory first, and the submit directory is the checkout; Python 3.10 knows no safe path
    setup += ['cd "$run/code"', "export PYTHONSAFEPATH=1"]
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
        "additional_parameters": _extra_sbatch_options(cluster, config.gpus)
        | {"output": f"{_in_script(str(run))}/logs/%j.log"},
    }


def _in_script(path: str) -> str:
    """A path for an option of SLURM in which ``%`` has a meaning (``%j``)."""
    return path.replace("%", "%%")


def _extra_sbatch_options(cluster: ClusterConfig, gpus: int) -> dict[str, Any]:
    """`sbatch` options that submitit does not have, or spells differently."""
    back = (
        "requeue" if cluster.requeue == "requeue" else "no-requeue"
    )  # otherwise SLURM would requeue the job in addition to its successor
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
    """The variables of this shell that would change what the printed script does, and are therefore not passed on."""
    if "SLURM_JOB_ID" in environment:  # inside a job SLURM itself sets dozens of them
        return sorted(k for k in environment if k.startswith("SBATCH_"))
    return sorted(k for k in environment if SUBMISSION.match(k))


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Remove SLURM's variables from the environment while the context lasts, since submitit submits with this process's environment."""
    hidden = {k: v for k, v in os.environ.items() if SUBMISSION.match(k)}
    try:
        for name in hidden:
            del os.environ[name]
        yield
    finally:
        os.environ.update(hidden)
