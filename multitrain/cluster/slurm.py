"""SLURM's commands and environment as a rank uses them: rank and world size, the reason for a stop, and requeueing.

No torch, no submitit. All statements about SLURM were observed on a real controller (22.05.8).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Mapping
from datetime import datetime

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that make a rank save and exit: SIGTERM at preemption and cancellation, SIGUSR2 before the time limit
(SIGUSR1 where a site's own scripts send that). The launchers start ranks with these *blocked*, so that a signal cannot kill
a rank that is still importing: the rank installs its handlers, then calls :func:`unblock_stop_signals`, and pending signals
are delivered."""

PREEMPTED, TIME_LIMIT, BATCH_ENDED, STEP_ENDED = "preempted", "time limit", "batch script ended", "ended from outside"
"""Reasons for which a job is requeued."""
OPERATOR, CANCELLED = "requeued by an operator", "cancelled"
"""Reasons for a stop: one after which SLURM has already requeued the job, and one after which it must not be requeued."""

DIST_ENV_VARS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of torch.distributed: rank, world size and rendezvous."""

FIRST_PORT, PORTS = 20000, 12000
"""Rendezvous ports: 20000–31999, below the ephemeral ports of Linux."""


class SlurmError(RuntimeError):
    """SLURM did not answer, or refused; one line with its message."""


def block_stop_signals() -> None:
    """Block :data:`STOP_SIGNALS` in this thread and in the programs that it executes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_stop_signals() -> None:
    """Unblock :data:`STOP_SIGNALS` and SIGINT, which delivers pending ones. Call it after installing the handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGINT))


# ------------------------------------------------------------------------------------------------ rank and world size


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task that `srun` started (not the batch script, which has SLURM_PROCID=0 as well)."""
    return environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environment


def rank_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    They are taken from these variables where a launcher has set them, else from the `srun` step; otherwise the world size
    is 1. LOCAL_RANK is the index of the rank's GPU among those it can see: 0 where SLURM binds one GPU to each task.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        given = {name: environment[name] for name in DIST_ENV_VARS if name in environment}
        return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **_alone(given["WORLD_SIZE"]), **given}
    if not in_step(environment):
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **_alone("1")}
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        "LOCAL_RANK": str(_device_index(environment)),
        "LOCAL_WORLD_SIZE": str(_tasks_of_this_node(environment)),
        "MASTER_ADDR": master_address(environment),
        "MASTER_PORT": str(master_port(environment)),
    }


def master_address(environment: Mapping[str, str] = os.environ) -> str:
    """The address on which rank 0 of this step listens: SLURM's own address of the step's first node.

    A node's name need not resolve (`NodeAddr` is what counts). In a container without `scontrol` it is the address that
    `srun` ran on, which is the first node of a batch job.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    first = first_node(nodes)
    if first == nodes:
        return "127.0.0.1"
    try:
        address = fields(_scontrol("show", "node", "-o", first)).get("NodeAddr")
    except SlurmError:
        address = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    return address or first


def master_port(environment: Mapping[str, str] = os.environ) -> int:
    """The rendezvous port: equal on all ranks of a step, different after a restart and for the next job on the node."""
    job, restart, step = (int(environment.get(f"SLURM_{n}") or 0) for n in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return FIRST_PORT + (job * 37 + restart * 5 + step) % PORTS


def free_port() -> int:
    """A port of this machine on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_node(nodes: str) -> str:
    """The first name of a node list in SLURM's notation: ``gpu[07-09,12],fat1`` → ``gpu07``."""
    head = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group() if head else nodes)


def _alone(world_size: str) -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if world_size == "1" else {}


def _device_index(environment: Mapping[str, str]) -> int:
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if visible and "," not in visible else int(environment.get("SLURM_LOCALID", 0))


def _tasks_of_this_node(environment: Mapping[str, str]) -> int:
    """From ``SLURM_STEP_TASKS_PER_NODE``, e.g. ``8(x2),4``: eight on the first two nodes, four on the third."""
    counts: list[int] = []
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    for part in listed.split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]


# ----------------------------------------------------------------------------------------------------- being stopped


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job's id for `scontrol`; for an array job ``123_4``, because ``123`` names the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def restart_count(environment: Mapping[str, str] = os.environ) -> int:
    """Number of earlier starts of this job by SLURM (the variable is not set at the first start)."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def show_job(job_id: str) -> dict[str, str]:
    """The controller's record of a job: ``JobState``, ``PreemptTime``, ``EndTime``, ``Restarts`` …

    Raises:
        SlurmError: it does not answer, or does not know the job (any more).
    """
    return fields(_scontrol("show", "job", "-o", job_id))


STATUS_OF_REASON = {
    "JobLaunchFailure": BATCH_ENDED,
    "NonZeroExitCode": BATCH_ENDED,
    "RaisedSignal": BATCH_ENDED,
    "TimeLimit": TIME_LIMIT,
}
"""Reasons in the record of a job that is COMPLETING without having been cancelled; `scontrol requeue` still accepts it then."""


def stop_reason(
    job: Mapping[str, str], signals: Collection[int] = (), *, restart: int | None = None, close: float = 120.0
) -> str | None:
    """The reason why this start of a job was stopped from outside; None if only its own processes ended it.

    Preemption and `scancel` send the same signals; the controller's record tells them apart. A preempted job is still RUNNING
    and has a PreemptTime. A cancelled job is COMPLETING without a Reason, or CANCELLED. A job whose batch script was killed is
    COMPLETING with the Reason JobLaunchFailure. A signal to a batch job that stays RUNNING was meant for its processes:
    `scancel --signal`, a node that shuts down, or the `srun` of an earlier start whose node was unreachable (seen: it ends the
    step of the next start, which has the same name). A job with more restarts than this start was requeued by SLURM (after a
    preemption, or a lost node) or by an operator (`scontrol requeue`).

    Args:
        job: the record of :func:`show_job`.
        signals: received by this start. SIGUSR2 is the time-limit warning that jobs are submitted with; SIGUSR1 is a
            site's own warning when the end is near, else an operator's `scancel --signal=USR1`.
        restart: restart count of this start; default: the environment's.
        close: seconds before the job's EndTime within which any end counts as the time limit.
    """
    restart = restart_count() if restart is None else restart
    state = job.get("JobState", "")
    preempted = job.get("PreemptTime", "None") not in ("None", "N/A")
    if int(job.get("Restarts") or restart) > restart or state in (
        "PENDING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
    ):
        return PREEMPTED if preempted or _log_names_preemption(job) else OPERATOR
    if state in ("COMPLETING", "TIMEOUT", "NODE_FAIL", "FAILED"):
        reason = {"TIMEOUT": "TimeLimit", "NODE_FAIL": "RaisedSignal"}.get(state, job.get("Reason", ""))
        return STATUS_OF_REASON.get(reason, CANCELLED)
    if state not in ("RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING"):
        return PREEMPTED if state == "PREEMPTED" else CANCELLED
    if preempted:
        return PREEMPTED
    left = _seconds_until(job.get("EndTime"))
    if left < close or signal.SIGUSR2 in signals or (signal.SIGUSR1 in signals and left < 4 * close):
        return TIME_LIMIT
    return STEP_ENDED if signals and job.get("BatchFlag", "1") == "1" else None


PREEMPTION_LINE = r"\b(?:JOB|STEP) {job}\b.* CANCELLED AT (\S+) DUE TO PREEMPTION"
"""What slurmstepd writes into the job's log when the job is preempted."""


def _log_names_preemption(job: Mapping[str, str], within: float = 600.0) -> bool:
    """Whether SLURM wrote into the job's log, within the last seconds, that it preempts the job. A partition without grace time requeues
    the job at once, and its record then has no PreemptTime any more (seen on 22.05).
    """
    path = job.get("StdOut", "")
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 65536))
            text = log.read().decode(errors="replace")
    except (OSError, ValueError):
        return False
    times = re.findall(PREEMPTION_LINE.format(job=re.escape(job.get("JobId", "?"))), text)
    return bool(times) and -_seconds_until(times[-1]) < within


def grace(partition: str | None = None) -> float | None:
    """Seconds between the first signal of a preemption and SIGKILL in a partition (default: this job's); None where jobs
    are not preempted, or SLURM does not answer.
    """
    partition = partition or os.environ.get("SLURM_JOB_PARTITION")
    if partition is None:
        return None
    try:
        shown = fields(_scontrol("show", "partition", "-o", partition))
        config = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", _scontrol("show", "config"), re.MULTILINE))
        if shown.get("PreemptMode") == "OFF" or config.get("PreemptType", "preempt/none") == "preempt/none":
            return None
        return float(shown.get("GraceTime", "0")) + float(config.get("KillWait", "30 sec").split()[0])
    except (SlurmError, ValueError):
        return None


def requeue(job_id: str) -> None:
    """Requeue the job. SLURM kills its tasks within seconds, so call this last.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    try:
        _scontrol("requeue", job_id)
    except SlurmError as error:
        if "Job is pending execution" not in str(error):  # it has already been requeued
            raise


def cancel(job_id: str) -> None:
    """Cancel the job.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    _run_command("scancel", job_id)


def control(*arguments: str) -> str:
    """The output of `scontrol`, e.g. ``control("update", "jobid=7", "ExcNodeList=n1")``.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    return _scontrol(*arguments)


def host_names(nodes: str) -> list[str]:
    """The names of a node list in SLURM's notation: ``gpu[07-08],fat1`` → ``gpu07``, ``gpu08``, ``fat1``.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    return [] if nodes in ("", "(null)", "None") else _scontrol("show", "hostnames", nodes).split()


def nodes_of(partition: str) -> list[str]:
    """The names of a partition's nodes, whatever their state.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    return host_names(fields(_scontrol("show", "partition", "-o", partition)).get("Nodes", ""))


def cluster_name() -> str | None:
    """Name of the cluster of this machine; None where SLURM does not answer."""
    if "SLURM_CLUSTER_NAME" in os.environ:
        return os.environ["SLURM_CLUSTER_NAME"]
    try:
        found = re.search(r"^ClusterName\s*= (\S+)", _scontrol("show", "config", attempts=1), re.MULTILINE)
    except SlurmError:
        return None
    return found.group(1) if found else None


def job_lives(job_id: str, restart: int, cluster: str | None = None) -> bool | None:
    """Whether this start of a job may still run; None when SLURM does not answer, or here is another cluster's SLURM."""
    if cluster is not None and cluster_name() not in (None, cluster):
        return None
    try:
        job = show_job(job_id)
    except SlurmError as error:
        return False if "Invalid job id" in str(error) else None
    if int(job.get("Restarts") or 0) != restart:
        return False
    return job.get("JobState") in ("RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "CONFIGURING", "STAGE_OUT")


def _seconds_until(moment: str | None) -> float:
    try:
        return (datetime.fromisoformat(moment or "") - datetime.now()).total_seconds()
    except ValueError:  # Unknown, or None
        return float("inf")


def fields(line: str) -> dict[str, str]:
    """Parse the output of `scontrol … -o`: ``Key=value Key=value …``. Values may hold blanks; the first of two equal keys counts."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)", line.split("\n")[0]):
        found.setdefault(key, value)
    return found


def command_environment() -> dict[str, str]:
    """The environment for SLURM's commands, without the variables that change what they select and print."""
    kept = {k: v for k, v in os.environ.items() if not re.match("(SQUEUE|SCONTROL|SCANCEL|SACCT)_|SLURM_CLUSTERS$", k)}
    return {**kept, "SLURM_TIME_FORMAT": "standard"}


SUBMISSION = re.compile(r"(SBATCH|SLURM|SRUN|SALLOC)_(?!CONF$|CONF_SERVER$)")
"""Variables that change what `sbatch` and `srun` do; site modules set some of them, and SLURM sets dozens in a job."""


def submission_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which a job is submitted, so that only its script determines it. No variable of the site, or of the job that
    submits, changes it (`SBATCH_TIMELIMIT`) or reaches the new job's steps (`SLURM_CPU_BIND` would pin its ranks).
    """
    return {k: v for k, v in environment.items() if not SUBMISSION.match(k)}


def _scontrol(*arguments: str, attempts: int = 3, timeout: float = 10.0) -> str:
    return _run_command("scontrol", *arguments, attempts=attempts, timeout=timeout)


def _run_command(*command: str, attempts: int = 3, timeout: float = 10.0) -> str:
    """Output of a SLURM command, with retries: it can hang or fail while the controller is busy."""
    message = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(1.0)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=command_environment()
            )
        except FileNotFoundError:
            raise SlurmError(
                f"there is no {command[0]} here; bind it and SLURM's configuration into the container"
            ) from None
        except subprocess.TimeoutExpired:
            message = f"no answer within {timeout:g} s"
            continue
        if done.returncode == 0:
            return done.stdout
        message = " ".join((done.stderr or done.stdout).split())
        if any(final in message for final in ("Invalid job id", "Job is pending execution")):
            break
    raise SlurmError(f"{' '.join(command)}: {message}")
