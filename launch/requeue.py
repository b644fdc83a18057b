"""Decide whether the job is requeued, and requeue it; called by the batch script when its step has ended.

python -m launch.requeue RUN STATUS [--signals "TERM USR1"] [--record TEXT] [--task evaluate] [--early]
    [--failed-on NODE]

:mod:`multitrain.cluster.requeue` makes the decision. Exit status: 0 nothing is left to do; 69 the batch script has to requeue the
job, because Python runs where there is no `scontrol` (in a container); 70 likewise, the batch script has to cancel the job.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.cluster import requeue, restarts, slurm
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.requeue import Action, Decision, Ended
from multitrain.cluster.restarts import Start
from multitrain.config import ClusterConfig, ConfigError, load
from multitrain.config.arguments import OneLineParser
from multitrain.lease import LeaseLost
from multitrain.records.events import Events, read

DONE, NO_SCONTROL, NO_SCANCEL = 0, 69, 70


def main(arguments: list[str] | None = None) -> int:
    """Decide, requeue or cancel the job, and print one line; the exit status for the batch script."""
    given = _parser().parse_args(arguments)
    run: Path = given.run
    job = slurm.job_id()
    if job is None:
        print("error: this is for the batch script of a SLURM job", file=sys.stderr)
        return Exit.MISTAKE
    record = slurm.fields(given.record)
    if shutil.which("scontrol"):
        record = dict(requeue.job_record(job, until_it_answers=True) or {"JobState": "CANCELLED"})
    ended = Ended(record, _signal_numbers(given.signals), given.status)
    if given.task == "evaluate":
        return _evaluation(run, job, ended)
    try:
        return _training(run, job, ended, early=given.early, failed_on=given.failed_on)
    except LeaseLost as lost:  # SLURM had lost this node for a while, and runs the job elsewhere
        print(f"multitrain: {lost}", flush=True)
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("launch.requeue", __doc__)
    parser.add_argument("run", type=lambda text: Path(text).absolute(), help="the run's folder")
    parser.add_argument("status", type=int, help="exit status of the step")
    parser.add_argument("--signals", default="", help="names of the signals that the batch script received")
    parser.add_argument("--record", default="", help="output of `scontrol show job -o`, where Python has no scontrol")
    parser.add_argument("--task", choices=("train", "evaluate"), default="train", help="what the step did")
    parser.add_argument("--failed-on", default="", help="the node whose rank failed first, according to srun")
    parser.add_argument("--early", action="store_true", help="the step still runs: act only if the job comes back")
    return parser


def _training(run: Path, job: str, ended: Ended, *, early: bool, failed_on: str = "") -> int:
    lease.guarded(lease.Guard(run, lease.start_name(job, ended.restart)))
    events = Events(run / "events.jsonl", restart=ended.restart)
    try:
        cluster = load(run).cluster
        events_so_far = read(events.path)
    except (ConfigError, OSError) as error:  # the run's disk is not mounted: the restarts cannot be counted
        print(f"multitrain: {error}", flush=True)
        return Exit.FAILED
    history = restarts.starts(events_so_far)
    if not history or not history[-1].is_of(job, ended.restart):
        history.append(Start(ended.restart, job=job, began=False))  # it died before it could record its start
    if failed_on and not history[-1].failed_nodes:  # no rank reported it: Python, a library or the run is missing there
        history[-1].failed_nodes.append(failed_on)
    own = [
        e for e in events_so_far if e["event"] == "requeue" and (e.get("job"), e.get("restart")) == (job, ended.restart)
    ]
    if any(str(e.get("by")).startswith("successor") for e in own):
        return DONE  # its successor is already in the queue
    recorded = history[-1].ended
    decision = requeue.decide(ended, history, cluster, went_well=restarts.progressed(events_so_far))
    if early and decision.action != Action.REQUEUE and decision.status != requeue.GAVE_UP:
        return DONE  # the ranks may still report more; after SIGKILL no process is left to report that the run gives up
    if decision.status == recorded and decision.action in (Action.ALREADY_REQUEUED, Action.END):
        return DONE  # the ranks have reported it
    print(f"{run.name}: {describe(decision, ended)}", flush=True)
    if decision.action == Action.REQUEUE and not _record_end(events, decision):
        return DONE
    if decision.action == Action.CANCEL and not shutil.which("scancel"):
        return NO_SCANCEL
    if decision.action == Action.REQUEUE and not shutil.which("scontrol"):
        _writer(events)("requeue", status=decision.status, by="batch script")
        return NO_SCONTROL
    requeue.carry_out(
        decision, run, job, cluster, _writer(events), dependents=restarts.dependents(events_so_far), retry=True
    )
    return DONE


def _evaluation(run: Path, job: str, ended: Ended) -> int:
    """Requeue an evaluation that SLURM stopped, which then resumes; not one that failed by itself."""
    cluster = load(run).cluster if (run / "config.yaml").is_file() else ClusterConfig()
    if ended.exit_status == Exit.FINISHED:
        return DONE
    decision = requeue.decide_evaluation(ended, cluster)
    print(f"evaluation: {describe(decision, ended)}", flush=True)
    if decision.action == Action.REQUEUE and not shutil.which("scontrol"):
        return NO_SCONTROL
    if decision.action == Action.REQUEUE:
        requeue.carry_out(decision, run, job, cluster, lambda *_, **__: None, retry=True)
    return DONE


def describe(decision: Decision, ended: Ended) -> str:
    """One line for the batch script's log."""
    status = f"exit status {ended.exit_status}; {decision.status}"
    if decision.action == Action.ALREADY_REQUEUED:
        return f"{status}: SLURM has already requeued the job"
    if decision.action == Action.CANCEL:
        return f"{status}: SLURM had requeued the job; it is cancelled, because the run has ended"
    if decision.action == Action.END:
        return f"{status}: the job is not requeued{f': {decision.reason}' if decision.reason else ''}"
    without = f", without {','.join(decision.exclude)}" if decision.exclude else ""
    again = f", {','.join(decision.readmit)} allowed again" if decision.readmit else ""
    return f"{status}: the job is requeued{without}{again}"


def _record_end(events: Events, decision: Decision) -> bool:
    """Record the end of this start, so that its restart counts; False if it cannot be written, since the restarts would have no limit.

    The end of a start whose nodes SLURM took is not recorded: it counts as no failure.
    """
    if decision.status in (slurm.PREEMPTED, slurm.TIME_LIMIT):
        return True
    try:
        events.write("ended", status=decision.status, reason=decision.reason)
    except OSError as error:
        print(
            f"{events.path} cannot be written ({error.strerror or error}); make room, and submit the run again: "
            "its restarts cannot be counted, so the job is not requeued",
            flush=True,
        )
        return False
    return True


def _writer(events: Events) -> Callable[..., None]:
    """A function that writes events; an event that cannot be written goes to the batch script's log."""

    def write(name: str, **facts: Any) -> None:
        try:
            events.write(name, **facts)
        except OSError as error:
            print(f"{events.path} cannot be written ({error.strerror or error}): {name} {facts}", flush=True)

    return write


def _signal_numbers(names: str) -> list[int]:
    known: Mapping[str, int] = {s.name.removeprefix("SIG"): int(s) for s in signal.Signals}
    return [known[name] for name in names.split() if name in known]


if __name__ == "__main__":
    slurm.block_stop_signals()  # SLURM sends SIGTERM after the requeue; a script in `cluster.python` may have unblocked it
    sys.exit(main())
