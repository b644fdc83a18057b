"""The decision whether a job is requeued, for training, evaluation, preflight and batch scripts.

The decision is a function of SLURM's record of the job, the signals that this start received, the exit status of its ranks (if they
have ended) and the history of the run's starts. The caller carries the decision out with :func:`carry_out`.
"""

from __future__ import annotations

import contextlib
import enum
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from multitrain.cluster import restarts, slurm
from multitrain.cluster.exit_status import Exit, describe_exit
from multitrain.cluster.restarts import Start
from multitrain.cluster.slurm import BATCH_ENDED, CANCELLED, OPERATOR, PREEMPTED, STEP_ENDED, TIME_LIMIT, SlurmError
from multitrain.config import ClusterConfig

BAD_NODE = "bad node"
"""Status of a `requeue` after preflight has found a node that cannot work."""
GAVE_UP = "gave up"
"""Status of an `end` after which a restart would not help."""
FINAL_STATUSES = ("finished", restarts.STOPPED, GAVE_UP)
REQUEUE_REASONS = (PREEMPTED, TIME_LIMIT, BATCH_ENDED, STEP_ENDED, BAD_NODE, restarts.FAILED)
SCRIPT = "job.sh"
"""The batch script of a run, in its folder; a successor job runs it."""
RETRY_SECONDS = 5.0
"""Seconds between two attempts while the controller does not answer."""


class Action(enum.Enum):
    """What happens to the job."""

    REQUEUE = "requeue"
    """It is requeued, or a successor is submitted."""
    ALREADY_REQUEUED = "already requeued"
    """SLURM or an operator has requeued it already."""
    CANCEL = "cancel"
    """SLURM has requeued it although the run has ended: it is cancelled."""
    END = "end"
    """It ends."""


@dataclass(frozen=True)
class Decision:
    """`status`: the reason, as in the events. `reason`: details of an end. `exclude`: nodes that the next start leaves out. `readmit`:
    nodes that an earlier start was made to leave out, and the next one may have again."""

    action: Action
    status: str
    reason: str | None = None
    exclude: tuple[str, ...] = ()
    readmit: tuple[str, ...] = ()

    @property
    def event(self) -> str:
        """Name of the event that records the decision."""
        return "end" if self.action in (Action.END, Action.CANCEL) else "requeue"


@dataclass
class Ended:
    """How a start of a run ended, or is about to end.

    `job`: SLURM's record of the job. `signals`: signals that it received. `exit_status`: that of its ranks; None if the ranks
    still run, and decide after they have saved. `restart`: number of earlier starts of the job.
    """

    job: Mapping[str, str]
    signals: Collection[int] = ()
    exit_status: int | None = None
    restart: int = field(default_factory=slurm.restart_count)


def decide(ended: Ended, history: Sequence[Start], cluster: ClusterConfig, *, went_well: bool) -> Decision:
    """Whether the job is requeued, and without which nodes: those on which it failed since it trained last. Exclusions of all
    failures of a long run would leave a small cluster without nodes.

    Args:
        history: the starts since the run was last submitted; the last one is the one that ended.
        went_well: whether the run has ever made progress (:func:`multitrain.cluster.restarts.progressed`).
    """
    decision = _decide(ended, history, cluster, went_well=went_well)
    if decision.action != Action.REQUEUE:
        return decision
    exclude = restarts.nodes_to_exclude(history, went_well=went_well)
    earlier = dict.fromkeys(node for start in history for node in start.excluded)
    return replace(decision, exclude=exclude, readmit=tuple(node for node in earlier if node not in exclude))


def _decide(ended: Ended, history: Sequence[Start], cluster: ClusterConfig, *, went_well: bool) -> Decision:
    last = history[-1] if history else Start(ended.restart, began=False)
    outside_reason = slurm.stop_reason(ended.job, ended.signals, restart=ended.restart, close=close_to_limit(cluster))
    requeued = outside_reason == OPERATOR or (outside_reason == PREEMPTED and _already_requeued(ended))
    own = last.ended or "" if last.restart == ended.restart else ""
    if requeued and own in FINAL_STATUSES:  # a preemption's grace time ended before the job did
        return Decision(Action.CANCEL, own, "SLURM had requeued the job")
    if ended.exit_status == Exit.FINISHED:
        if last.ended == "finished" or not (last.began or outside_reason):
            return Decision(Action.END, "finished")
        ended = replace(ended, exit_status=Exit.FAILED)  # srun ends with 0 when it gives up waiting for killed ranks
    if ended.exit_status == Exit.HELD:
        return Decision(Action.END, "held", "another start of the run holds its lease")
    if requeued:
        return Decision(
            Action.ALREADY_REQUEUED, own if own in REQUEUE_REASONS else str(outside_reason)
        )  # it has put itself back
    if last.ended is not None and last.ended not in REQUEUE_REASONS:  # it ended in order and recorded the reason
        return Decision(Action.END, last.ended)
    if outside_reason == CANCELLED:
        return Decision(Action.END, CANCELLED)
    if outside_reason == PREEMPTED or last.ended in REQUEUE_REASONS or last.wanted in REQUEUE_REASONS:
        return Decision(Action.REQUEUE, outside_reason or last.wanted or last.ended or restarts.FAILED)
    if ended.exit_status is None:
        return Decision(Action.REQUEUE, outside_reason) if outside_reason else Decision(Action.END, "interrupted")
    return _after_failure(ended, [*history[:-1], last], cluster, outside_reason, went_well=went_well)


def _after_failure(
    ended: Ended, history: list[Start], cluster: ClusterConfig, outside_reason: str | None, *, went_well: bool
) -> Decision:
    """The decision after ranks, or preflight, ended without a checkpoint and an event for it."""
    last = history[-1]
    status = BAD_NODE if ended.exit_status == Exit.BAD_NODE else outside_reason or restarts.FAILED
    last.ended = None if status == restarts.FAILED else status
    final = {
        Exit.GAVE_UP: "it gave up: see the ranks' logs",
        Exit.MISTAKE: None if went_well else "a setting or a file is wrong: see the ranks' logs",
    }.get(Exit(ended.exit_status) if ended.exit_status in list(Exit) else Exit.FAILED)
    limits = (cluster.max_restarts, cluster.max_stalled_restarts)
    reason = last.final or (None if went_well else last.mistake) or final
    reason = reason or restarts.refusal(history, *limits, went_well=went_well)
    if reason is not None:
        return Decision(Action.END, GAVE_UP, reason)
    return Decision(Action.REQUEUE, status, describe_exit(int(ended.exit_status or 0)))


def decide_evaluation(ended: Ended, cluster: ClusterConfig) -> Decision:
    """The same for an evaluation, which resumes where it stopped: it is requeued when SLURM took its nodes."""
    outside_reason = slurm.stop_reason(ended.job, ended.signals, restart=ended.restart, close=close_to_limit(cluster))
    if ended.exit_status == Exit.FINISHED:
        return Decision(Action.END, "finished")
    if outside_reason in (OPERATOR, CANCELLED):
        return Decision(Action.ALREADY_REQUEUED if outside_reason == OPERATOR else Action.END, outside_reason)
    warned = ended.exit_status in (Exit.INTERRUPTED, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
    if outside_reason is None and not warned:
        return Decision(Action.END, "failed", describe_exit(int(ended.exit_status or 0)))
    return Decision(Action.REQUEUE, outside_reason or STEP_ENDED)


def _already_requeued(ended: Ended) -> bool:
    return int(ended.job.get("Restarts") or 0) > ended.restart or ended.job.get("JobState") not in (
        "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING",
    )  # fmt: skip


def close_to_limit(cluster: ClusterConfig) -> float:
    """Seconds before the time limit within which the end of a start counts as caused by it."""
    return max(120.0, float(cluster.lead_time))


# ------------------------------------------------------------------------------------------------------- carrying it out


def job_record(job: str, *, until_it_answers: bool = False) -> Mapping[str, str] | None:
    """SLURM's record of the job; None when SLURM does not know the job any more.

    Args:
        until_it_answers: while the controller does not answer, try again; SLURM ends this process at the end of the job's time.
            A controller that is being upgraded may not answer for minutes.

    Raises:
        SlurmError: there is no `scontrol` here, or (without `until_it_answers`) no answer.
    """
    reported = False
    while True:
        try:
            return slurm.show_job(job)
        except SlurmError as error:
            if "Invalid job id" in str(error):
                return None
            if not until_it_answers or not shutil.which("scontrol"):
                raise
            if not reported:
                print(f"multitrain: SLURM does not answer ({error}); trying again until it does", flush=True)
                reported = True
        time.sleep(RETRY_SECONDS)


def requeue_job(
    run: Path,
    job: str,
    cluster: ClusterConfig,
    exclude: Sequence[str] = (),
    readmit: Sequence[str] = (),
    *,
    dependents: Collection[str] = (),
    retry: bool = False,
) -> str:
    """Requeue the job, or submit its successor; "requeued", or a text that names the successor.

    SLURM ends this process within seconds after the requeue: call this last, when everything is saved.

    Args:
        exclude: nodes that the next start leaves out.
        readmit: nodes that were excluded earlier, and are not any more.
        dependents: jobs that may depend on the success of this one; they depend on its successor instead.
        retry: while the controller does not answer, try again.

    Raises:
        SlurmError: SLURM refused; or there is no `scontrol` here; or (without `retry`) no answer.
    """
    while True:
        try:
            if cluster.requeue == "resubmit":
                return f"successor job {_successor(run, job, exclude, readmit, dependents)}"
            listed = _listed(job, exclude, readmit)  # SLURM ends this process soon after the next line
            slurm.requeue(job)
            if listed is not None:
                _exclude(job, listed)
            return "requeued"
        except SlurmError as error:
            if not retry or not _transient(str(error)):
                raise
        time.sleep(RETRY_SECONDS)


def _transient(message: str) -> bool:
    """Whether the same request may succeed later: the controller was unreachable or busy."""
    final = (
        "there is no ",
        "Invalid",
        "denied",
        "disabled",
        "not permitted",
        "Access",
        "not support",
        "cannot be requeued",
    )
    return not any(word.lower() in message.lower() for word in final)


def _listed(job: str, exclude: Sequence[str], readmit: Sequence[str]) -> list[str] | None:
    """The nodes that the job's next start leaves out; None if they stay as they are, or SLURM does not answer, which is printed."""
    if not exclude and not readmit:
        return None
    try:
        return _exclusions(slurm.show_job(job), exclude, readmit)
    except SlurmError as error:
        print(f"multitrain: the nodes {','.join(exclude)} could not be excluded: {error}", flush=True)
        return None


def _exclude(job: str, listed: Sequence[str]) -> None:
    """Set the nodes that the job's next start leaves out. A failure is printed and otherwise ignored."""
    try:
        slurm.control("update", f"jobid={job}", f"ExcNodeList={','.join(listed)}")
    except SlurmError as error:
        print(f"multitrain: the nodes {','.join(listed)} could not be excluded: {error}", flush=True)


def _exclusions(job: Mapping[str, str], exclude: Sequence[str], readmit: Sequence[str]) -> list[str]:
    """The nodes that the next start leaves out: those of the user, and `exclude`, unless too few would be left for the job.

    Args:
        job: SLURM's record of the job.

    Raises:
        SlurmError: SLURM does not answer.
    """
    before = slurm.host_names(job.get("ExcNodeList", ""))
    users = [node for node in before if node not in (*readmit, *exclude)]
    wanted = [*users, *exclude]
    found = [slurm.nodes_of(partition) for partition in job.get("Partition", "").split(",") if partition]
    needed = re.match(r"\d+", job.get("NumNodes", ""))
    left = max((len(set(nodes) - set(wanted)) for nodes in found), default=None)
    if left is None or needed is None or left >= int(needed.group()) or not exclude:
        return wanted
    print(
        f"multitrain: without {','.join(exclude)} the partition would have {left} nodes, and the job needs {needed.group()}: they "
        "are not excluded",
        flush=True,
    )
    return users


def _as_submitted(job: str, exclude: Sequence[str], readmit: Sequence[str]) -> list[str]:
    """Options of `sbatch slurm/train.sh` that the run's own script may not have, and the nodes to leave out."""
    try:
        shown = slurm.show_job(job)
        excluded = _exclusions(shown, exclude, readmit)
    except SlurmError:
        return [f"--exclude={','.join(exclude)}"] if exclude else []
    fields = {
        "partition": "Partition",
        "account": "Account",
        "qos": "QOS",
        "time": "TimeLimit",
        "cpus-per-task": "CPUs/Task",
        "constraint": "Features",
        "reservation": "Reservation",
        "licenses": "Licenses",
    }
    given = {option: shown.get(name, "") for option, name in fields.items()}
    given["exclude"] = ",".join(excluded)
    return [f"--{option}={value}" for option, value in given.items() if value not in ("", "(null)", "N/A")]


def _successor(run: Path, job: str, exclude: Sequence[str], readmit: Sequence[str], dependents: Collection[str]) -> str:
    """Submit the run's own batch script again, to start when this job has ended; the new job's id."""
    script = run / SCRIPT
    if not script.is_file():
        raise SlurmError(f"there is no {script}; submit the run again")
    more = _as_submitted(job, exclude, readmit)
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}", *more, str(script)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=slurm.submission_environment()
        )
    except FileNotFoundError:
        raise SlurmError("there is no sbatch here") from None
    except subprocess.TimeoutExpired:
        raise SlurmError("sbatch: no answer within 60 s") from None
    if done.returncode:
        raise SlurmError(f"sbatch: {' '.join(done.stderr.split())}")
    successor = done.stdout.strip().partition(";")[0]
    for dependent in dependents:
        with contextlib.suppress(SlurmError):
            if f"afterok:{job}" in slurm.show_job(dependent).get("Dependency", "").replace("_*", ""):
                slurm.control("update", f"jobid={dependent}", f"dependency=afterok:{successor}")
    return successor


Write = Callable[..., object]


def carry_out(
    decision: Decision,
    run: Path,
    job: str,
    cluster: ClusterConfig,
    write: Write,
    *,
    dependents: Collection[str] = (),
    retry: bool = False,
) -> bool:
    """Carry out a decision and record it: `requeue` once SLURM has accepted it, `requeue_failed` when it refused.

    Args:
        write: called with an event's name and its fields.
        dependents, retry: as for :func:`requeue_job`.

    Returns:
        Whether there is nothing left to do; False when SLURM refused.
    """
    facts = {"status": decision.status} | ({"exclude": list(decision.exclude)} if decision.exclude else {})
    if decision.action == Action.CANCEL:
        try:
            slurm.cancel(job)
        except SlurmError as error:
            print(f"multitrain: the run has ended, and SLURM has requeued its job: scancel {job} ({error})", flush=True)
            return False
    if decision.action != Action.REQUEUE:
        write(decision.event, **facts, **({"reason": decision.reason} if decision.reason else {}))
        return True
    try:
        done = requeue_job(run, job, cluster, decision.exclude, decision.readmit, dependents=dependents, retry=retry)
    except SlurmError as error:
        print(f"multitrain: the job could not be requeued: {error}", flush=True)
        write("requeue_failed", **facts, reason=str(error))
        return False
    write("requeue", **facts, **({} if done == "requeued" else {"by": done}))
    return True


__all__ = ["Action", "Decision", "Ended", "carry_out", "close_to_limit", "decide", "job_record", "requeue_job"]
