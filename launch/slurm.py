"""From a run's folder to a SLURM job. The only file that imports submitit."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.rank import Rank, supervised, training
from multitrain.config import ClusterConfig, ConfigError, RunConfig

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

HOLD = "hold='env --block-signal=TERM,USR1,USR2'; $hold true 2>/dev/null || hold="
"""Ranks start with the stop signals held back, so that none can kill one that is still importing (needs coreutils 8.31)."""

COME_BACK = """\
if [ "$status" -ne 0 ] && [ "$status" -ne 75 ]; then
    job=$(scontrol show job -o "$SLURM_JOB_ID")
    case $job in *" PreemptTime=2"*) preempted=preempted ;; *) preempted= ;; esac
    case $job in *" JobState=RUNNING "*" Restarts=${{SLURM_RESTART_COUNT:-0}} "*)
        {python} -m launch.again {run} "$status" $preempted && scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi"""
"""The run requeues itself when SLURM takes its nodes; this is for ranks that died, and that could not: killed while they
were starting, or without `scontrol` in their container. A cancelled job is not RUNNING any more; one with more restarts runs
elsewhere, and this script is of a node that was lost for a while."""

IF_PREEMPTED = (
    'if [ "$status" -ne 0 ] && [ "$status" -ne 75 ] && '
    'scontrol show job -o "$SLURM_JOB_ID" | '
    'grep -q " JobState=RUNNING .* Restarts=${SLURM_RESTART_COUNT:-0} .* PreemptTime=2"; then '
    'scontrol requeue "$SLURM_JOB_ID"; fi'
)
"""The same for a test, which goes on where it was: a preempted one whose ranks could not requeue it."""


def script(run: Path, config: RunConfig, arguments: tuple[str, ...] | None = None) -> str:
    """The sbatch script of a job; needs no SLURM on this machine. submitit adds nothing to it when it submits.

    Raises:
        ConfigError: submitit is not installed, or options of `cluster` contradict each other.
    """
    executor = _executor(run, config, checked=False)
    return executor._make_submission_file_text(executor._submitit_command_str, uid="")


def submit(run: Path, config: RunConfig, arguments: tuple[str, ...] | None = None, *, after: str | None = None) -> str:
    """Submit the job of the run in folder `run`; returns its id.

    Args:
        arguments: of the Python that each rank becomes; training when not given.
        after: id of a job that must have ended with exit status 0 before this one starts; if it fails, SLURM removes this one.

    Raises:
        ConfigError: SLURM refused the job, in its own words.
    """
    executor = _executor(run, config, checked=True)
    changes: dict[str, Any] = {}
    if arguments is not None:
        changes["teardown"] = ["status=$?", IF_PREEMPTED, 'exit "$status"']
    if after is not None:
        more = {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
        changes["additional_parameters"] = executor.parameters["additional_parameters"] | more
    if changes:
        executor.update_parameters(**changes)
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
    python = f"$hold {config.cluster.python or shlex.quote(sys.executable)}"
    inherited = "${PYTHONPATH:+:$PYTHONPATH}"
    executor.update_parameters(
        setup=[
            task,
            HOLD,
            f'export PYTHONPATH="$run/code"{inherited}',
            "export PYTHONFAULTHANDLER=1",
            *config.cluster.setup,
        ],
        teardown=["status=$?", COME_BACK.format(python=python, run='"$run"'), 'exit "$status"'],
        array_parallelism=parallel or len(runs),
    )
    logs = str(folder / "logs")
    arguments = [a for a in executor.parameters["srun_args"] if not a.endswith("-rank%t.log")]
    executor.update_parameters(
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

    with _outside_any_job(), contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what it raises
        try:
            yield
        except (FailedJobError, FailedSubmissionError) as error:
            said = [
                line.partition("error: ")[2] for line in str(error).splitlines() if line.startswith("sbatch: error: ")
            ]
            raise ConfigError("SLURM refused the job: " + "; ".join(said or str(error).split("\n"))) from None


def active(name: str, jobs: list[str]) -> dict[str, str]:
    """Those of the jobs of the run `name` that wait, run or end right now, with their state.

    Raises:
        ConfigError: SLURM does not answer.
    """
    if not jobs or not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--format=%i %T %j", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError("SLURM does not answer (squeue, 20 s); try again later") from None
    if done.returncode and "Invalid job id" not in done.stderr:  # that is how it says that all are long over
        raise ConfigError(f"SLURM does not answer ({' '.join(done.stderr.split())}); try again later")
    listed = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
    return {
        job: state for job, state, owner in listed if owner == name or name.startswith(f"{owner}-")
    }  # ids are used again when a cluster is set up anew


def rank_log(run: Path, job: str, rank: int = 0) -> Path:
    """The log of one rank, appended to by every start of the job."""
    return run / "logs" / f"{job}-rank{rank}.log"


def check(config: RunConfig) -> None:
    """Refuse what SLURM would refuse later, or would run wrongly.

    Raises:
        ConfigError: one line.
    """
    cluster = config.cluster
    if cluster.lead_time >= 60 * cluster.time_limit:
        raise ConfigError(
            f"cluster.lead_time={cluster.lead_time} (seconds) is not shorter than cluster.time_limit="
            f"{cluster.time_limit} (minutes); the job would be warned before it starts"
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


def _executor(run: Path, config: RunConfig, *, checked: bool) -> SlurmExecutor:
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
    python = f"$hold {config.cluster.python or shlex.quote(sys.executable)}"
    executor = (SlurmExecutor if checked else AnywhereExecutor)(folder=folder, python=python)
    executor.update_parameters(**_parameters(run, config))
    if checked:
        folder.mkdir(parents=True, exist_ok=True)
    return executor


def _parameters(run: Path, config: RunConfig) -> dict[str, Any]:
    """submitit's parameters of a job: one task a GPU, warned before the limit, requeued, one log a rank."""
    cluster = config.cluster
    steps = [f"--cpus-per-task={cluster.cpus_per_gpu}", *cluster.srun_args]  # srun does not inherit it since 22.05
    setup = [HOLD, f"export PYTHONPATH={shlex.quote(str(run / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    setup += ["export PYTHONFAULTHANDLER=1", *cluster.setup]
    python = cluster.python or shlex.quote(sys.executable)
    if config.preflight:
        step = shlex.join(["srun", "--kill-on-bad-exit=1", *steps])
        setup.append(f"{step} {python} -u -m launch.preflight --dir {shlex.quote(str(run))} || exit 1")
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
        "time": cluster.time_limit,
        "signal_delay_s": cluster.lead_time,
        "setup": setup,
        "teardown": ["status=$?", COME_BACK.format(python=python, run=shlex.quote(str(run))), 'exit "$status"'],
        "srun_args": ["--kill-on-bad-exit=1", *steps, "--output", str(run / "logs" / "%j-rank%t.log")],
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": _more(cluster, config.gpus) | {"output": f"{run}/logs/%j.log"},
    }


def _more(cluster: ClusterConfig, gpus: int) -> dict[str, Any]:
    """`sbatch` options that submitit has no name for, or spells in its own way."""
    more: dict[str, Any] = {"requeue": True, "signal": f"USR2@{cluster.lead_time}"}
    kind = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else str(gpus)
    if cluster.gpu_request == "gres":
        more["gres"] = f"gpu:{kind}"
    elif cluster.gpu_request == "gpus-per-node":
        more["gpus-per-node"] = kind
    if cluster.memory_per_node:
        more["mem"] = cluster.memory_per_node
    if cluster.reservation:
        more["reservation"] = cluster.reservation
    more.update({name.replace("_", "-"): True if value == "" else value for name, value in cluster.sbatch.items()})
    return more


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Hide the variables of a job that we may be submitting from: `SLURM_CPU_BIND`, say, would pin the new job's ranks."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k.startswith("SBATCH_")}
    with clean_env():
        os.environ.update(kept)
        yield
