"""What a batch script asks when its step has ended: is the job to come back? If so, it is put back.

python -m launch.requeue RUN STATUS [--signals "TERM USR1"] [--record TEXT] [--task evaluate] [--early]
    [--failed-on NODE]

The decision is made in :mod:`multitrain.cluster.requeue`. Exit status: 0 all is done; 69 the job is to come back, and the
batch script has to do it, since there is no `scontrol` where Python is (a container); 70 in the same way, the job is to be
cancelled.
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
from multitrain.lease import LeaseLost
from multitrain.records.events import Events, read

DONE, NO_SCONTROL, NO_SCANCEL = 0, 69, 70


def main(arguments: list[str] | None = None) -> int:
    """Decide, act, say; the exit status for the batch script."""
    given = _parser().parse_args(arguments)
    run: Path = given.run
    job = slurm.job_id()
    if job is None:
        print("error: this is for the batch script of a SLURM job", file=sys.stderr)
        return Exit.MISTAKE
    record = slurm.fields(given.record)
    if shutil.which("scontrol"):
        record = dict(requeue.job_record(job, until_it_answers=True) or {"JobState": "CANCELLED"})
    ended = Ended(record, _numbers(given.signals), given.status)
    if given.task == "evaluate":
        return _evaluation(run, job, ended)
    try:
        return _training(run, job, ended, early=given.early, failed_on=given.failed_on)
    except LeaseLost as lost:  # this node was lost for a while; the job runs elsewhere
        print(f"multitrain: {lost}", flush=True)
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.requeue", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=lambda text: Path(text).absolute(), help="the run's folder")
    parser.add_argument("status", type=int, help="exit status of the step")
    parser.add_argument("--signals", default="", help="names of the signals that the batch script received")
    parser.add_argument("--record", default="", help="what `scontrol show job -o` says, where Python has no scontrol")
    parser.add_argument("--task", choices=("train", "evaluate"), default="train", help="what the step did")
    parser.add_argument("--failed-on", default="", help="the node whose rank failed first, as srun said")
    parser.add_argument("--early", action="store_true", help="the step still runs: act only if the job comes back")
    return parser


def _training(run: Path, job: str, ended: Ended, *, early: bool, failed_on: str = "") -> int:
    lease.guarded(lease.Guard(run, lease.start_name(job, ended.restart)))
    events = Events(run / "events.jsonl", restart=ended.restart)
    try:
        cluster = load(run).cluster
        told = read(events.path)
    except (ConfigError, OSError) as error:  # the run's disk is not there: nothing can be counted
        print(f"multitrain: {error}", flush=True)
        return Exit.FAILED
    history = restarts.starts(told)
    if not history or not history[-1].is_of(job, ended.restart):
        history.append(Start(ended.restart, job=job, began=False))  # it died before it could say that it began
    if failed_on and not history[-1].failed_nodes:  # no rank said so: Python, a library or the run is missing there
        history[-1].failed_nodes.append(failed_on)
    own = [e for e in told if e["event"] == "requeue" and (e.get("job"), e.get("restart")) == (job, ended.restart)]
    if any(str(e.get("by")).startswith("successor") for e in own):
        return DONE  # its successor waits already
    said = history[-1].ended
    decision = requeue.decide(ended, history, cluster, went_well=restarts.progressed(told))
    if early and decision.action != Action.COME_BACK and decision.status != requeue.GAVE_UP:
        return DONE  # the ranks may still report more; after SIGKILL no process is left to report that the run gives up
    if decision.status == said and decision.action in (Action.IS_BACK, Action.END):
        return DONE  # the ranks have reported it
    print(f"{run.name}: {described(decision, ended)}", flush=True)
    if decision.action == Action.COME_BACK and not _countable(events, decision):
        return DONE
    if decision.action == Action.WITHDRAW and not shutil.which("scancel"):
        return NO_SCANCEL
    if decision.action == Action.COME_BACK and not shutil.which("scontrol"):
        _writer(events)("requeue", status=decision.status, by="batch script")
        return NO_SCONTROL
    requeue.carry_out(decision, run, job, cluster, _writer(events), dependents=restarts.dependents(told), retry=True)
    return DONE


def _evaluation(run: Path, job: str, ended: Ended) -> int:
    """A test goes on where it was; one that failed by itself stays away."""
    cluster = load(run).cluster if (run / "config.yaml").is_file() else ClusterConfig()
    if ended.exit_status == Exit.FINISHED:
        return DONE
    decision = requeue.decide_evaluation(ended, cluster)
    print(f"evaluation: {described(decision, ended)}", flush=True)
    if decision.action == Action.COME_BACK and not shutil.which("scontrol"):
        return NO_SCONTROL
    if decision.action == Action.COME_BACK:
        requeue.carry_out(decision, run, job, cluster, lambda *_, **__: None, retry=True)
    return DONE


def described(decision: Decision, ended: Ended) -> str:
    """One line for the batch script's log."""
    status = f"exit status {ended.exit_status}; {decision.status}"
    if decision.action == Action.IS_BACK:
        return f"{status}: SLURM has the job in its queue"
    if decision.action == Action.WITHDRAW:
        return f"{status}: SLURM had put the job back into its queue; it is cancelled, because the run has ended"
    if decision.action == Action.END:
        return f"{status}: the job does not come back{f': {decision.reason}' if decision.reason else ''}"
    without = f", without {','.join(decision.exclude)}" if decision.exclude else ""
    again = f", {','.join(decision.readmit)} allowed again" if decision.readmit else ""
    return f"{status}: the job comes back{without}{again}"


def _countable(events: Events, decision: Decision) -> bool:
    """Restarts that cannot be counted have no bound; one that SLURM took the nodes from is not to blame."""
    if decision.status in (slurm.PREEMPTED, slurm.TIME_LIMIT):
        return True
    try:
        events.write("ended", status=decision.status, reason=decision.reason)
    except OSError as error:
        print(
            f"{events.path} cannot be written ({error.strerror or error}); make room, and submit the run again: "
            "its restarts cannot be counted, so the job does not come back",
            flush=True,
        )
        return False
    return True


def _writer(events: Events) -> Callable[..., None]:
    """Writes events; what the disk refuses goes to the batch script's log."""

    def write(name: str, **facts: Any) -> None:
        try:
            events.write(name, **facts)
        except OSError as error:
            print(f"{events.path} cannot be written ({error.strerror or error}): {name} {facts}", flush=True)

    return write


def _numbers(names: str) -> list[int]:
    known: Mapping[str, int] = {s.name.removeprefix("SIG"): int(s) for s in signal.Signals}
    return [known[name] for name in names.split() if name in known]


if __name__ == "__main__":
    slurm.block_stop_signals()  # SLURM sends SIGTERM once the job is back; a script in `cluster.python` may have let it in
    sys.exit(main())
