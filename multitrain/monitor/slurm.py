"""What a rank needs to know of SLURM: its place in the world, why it is being stopped, and how to come back.

No torch, no submitit. Everything that is said here of SLURM was seen on a real controller (22.05.8).
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
"""Signals that ask a rank to save and leave: SIGTERM at preemption and cancellation, SIGUSR2 before the time limit
(SIGUSR1 where a site's own scripts send that). The launchers start ranks with these *blocked*, so that none can kill a
rank that is still importing: the rank installs its handlers, then calls :func:`unblock_stop_signals`, and what arrived
meanwhile is delivered."""

PREEMPTED, TIME_LIMIT, BATCH_ENDED, STEP_ENDED = "preempted", "time limit", "batch script ended", "ended from outside"
"""Reasons for which a job is requeued."""
OPERATOR, CANCELLED = "requeued by an operator", "cancelled"
"""Why a job was taken away that SLURM has put back already, and why one is that must not come back."""

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that tell a rank its place in the world and where all meet."""

FIRST_PORT, PORTS = 20000, 12000
"""Rendezvous ports: 20000–31999, below the ephemeral ports of Linux."""


class SlurmError(RuntimeError):
    """SLURM did not answer, or refused. One line with its own words."""


def block_stop_signals() -> None:
    """Hold back :data:`STOP_SIGNALS` in this thread and in whatever it executes next."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def unblock_stop_signals() -> None:
    """Deliver :data:`STOP_SIGNALS` and SIGINT again, those held back first. Call it after the handlers are installed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGINT))


# ------------------------------------------------------------------------------------------------ place in the world


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a task that `srun` started (not the batch script, which has SLURM_PROCID=0 as well)."""
    return environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environment


def rank_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    They come from these variables themselves where a launcher has set them, else from the `srun` step, else they are
    those of a world of one. LOCAL_RANK is the index of the rank's GPU among those it can see: 0 where SLURM binds one
    GPU to each task.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        given = {name: environment[name] for name in PLACE if name in environment}
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
    """Where rank 0 of this step listens: the address that SLURM itself uses for the step's first node.

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
    """The same port on all ranks of a step, another one after a restart and for the next job on the same node."""
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


# ------------------------------------------------------------------------------------------------- being taken away


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The id that `scontrol` takes for this job; for one of an array ``123_4``, since ``123`` is the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def restart_count(environment: Mapping[str, str] = os.environ) -> int:
    """How often SLURM has started this job before (the variable is not set at the first start)."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def show_job(job_id: str) -> dict[str, str]:
    """What the controller says of a job: ``JobState``, ``PreemptTime``, ``EndTime``, ``Restarts`` …

    Raises:
        SlurmError: it does not answer, or knows no such job (any more).
    """
    return fields(_scontrol("show", "job", "-o", job_id))


ENDED_BY_ITSELF = {
    "JobLaunchFailure": BATCH_ENDED,
    "NonZeroExitCode": BATCH_ENDED,
    "RaisedSignal": BATCH_ENDED,
    "TimeLimit": TIME_LIMIT,
}
"""Reasons of a job that is COMPLETING without having been cancelled; `scontrol requeue` still takes it then."""


def taken_away(
    job: Mapping[str, str], signals: Collection[int] = (), *, restart: int | None = None, close: float = 120.0
) -> str | None:
    """Why this start of a job was told to stop, or ended; None where nothing but its own processes ended it.

    Preemption and `scancel` send the same signals. What tells them apart is the controller: a preempted job is still
    RUNNING and has a PreemptTime; a cancelled one is COMPLETING without a Reason, or CANCELLED; one whose batch script was
    killed is COMPLETING with one (JobLaunchFailure, of all names). A signal to a batch job that simply goes on RUNNING was
    meant for its processes: `scancel --signal`, a node that shuts down, or the `srun` of an earlier start, whose node was
    silent for a while (seen: it ends the step of the next start, which has the same name). A job with more restarts than
    this start was put back by SLURM (after a preemption, or a lost node) or by an operator (`scontrol requeue`).

    Args:
        job: what :func:`show_job` says.
        signals: all that this start has received. SIGUSR2 is the warning of the time limit that jobs are submitted with;
            SIGUSR1 is a site's own one when the end is near, else an operator's `scancel --signal=USR1`.
        restart: of this start; of the environment when not given.
        close: seconds before the job's EndTime from which any end counts as the time limit.
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
        return PREEMPTED if preempted else OPERATOR
    if state in ("COMPLETING", "TIMEOUT", "NODE_FAIL", "FAILED"):
        reason = {"TIMEOUT": "TimeLimit", "NODE_FAIL": "RaisedSignal"}.get(state, job.get("Reason", ""))
        return ENDED_BY_ITSELF.get(reason, CANCELLED)
    if state not in ("RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING"):
        return PREEMPTED if state == "PREEMPTED" else CANCELLED
    if preempted:
        return PREEMPTED
    left = _seconds_until(job.get("EndTime"))
    if left < close or signal.SIGUSR2 in signals or (signal.SIGUSR1 in signals and left < 4 * close):
        return TIME_LIMIT
    return STEP_ENDED if signals and job.get("BatchFlag", "1") == "1" else None


def grace(partition: str | None = None) -> float | None:
    """Seconds between the first signal of a preemption and SIGKILL in a partition (this job's own when not given); None
    where jobs are not preempted, or SLURM does not say.
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
    """Put the job back into the queue: its tasks are killed within seconds, so this is the last thing a run does.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    try:
        _scontrol("requeue", job_id)
    except SlurmError as error:
        if "Job is pending execution" not in str(error):  # then it is back already: asked twice, or SLURM was faster
            raise


def cancel(job_id: str) -> None:
    """Cancel the job.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    _answered("scancel", job_id)


def control(*arguments: str) -> str:
    """The output of `scontrol`, e.g. ``control("update", "jobid=7", "ExcNodeList=n1")``.

    Raises:
        SlurmError: SLURM refused, or did not answer, three times.
    """
    return _scontrol(*arguments)


def cluster_name() -> str | None:
    """The name of the cluster that this machine belongs to; None where SLURM does not say."""
    if "SLURM_CLUSTER_NAME" in os.environ:
        return os.environ["SLURM_CLUSTER_NAME"]
    try:
        found = re.search(r"^ClusterName\s*= (\S+)", _scontrol("show", "config", attempts=1), re.MULTILINE)
    except SlurmError:
        return None
    return found.group(1) if found else None


def job_lives(job_id: str, restart: int, cluster: str | None = None) -> bool | None:
    """Whether this start of a job may still run; None when SLURM does not answer, or is that of another cluster."""
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
    """What `scontrol` prints with ``-o``: ``Key=value Key=value …``; a value may hold blanks, the first of two equal keys counts."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)", line.split("\n")[0]):
        found.setdefault(key, value)
    return found


def _scontrol(*arguments: str, attempts: int = 3, timeout: float = 10.0) -> str:
    return _answered("scontrol", *arguments, attempts=attempts, timeout=timeout)


def _answered(*command: str, attempts: int = 3, timeout: float = 10.0) -> str:
    """The output of a SLURM command, which can hang or fail for a moment while the controller is busy."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}  # sites set others, which cannot be compared
    said = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(1.0)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
            )
        except FileNotFoundError:
            raise SlurmError(
                f"there is no {command[0]} here; bind it and SLURM's configuration into the container"
            ) from None
        except subprocess.TimeoutExpired:
            said = f"no answer within {timeout:g} s"
            continue
        if done.returncode == 0:
            return done.stdout
        said = " ".join((done.stderr or done.stdout).split())
        if any(final in said for final in ("Invalid job id", "Job is pending execution")):
            break
    raise SlurmError(f"{' '.join(command)}: {said}")
