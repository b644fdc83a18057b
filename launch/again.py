"""Asked by the batch script when the ranks have ended: is the job to come back?

python -m launch.again RUN STATUS [preempted]

Exit status 0: put it back into the queue. The script itself looks whether the job was cancelled meanwhile, since there
may be no `scontrol` where Python is (a container).
"""

from __future__ import annotations

import sys
from pathlib import Path

from multitrain.config import ConfigError, load
from multitrain.monitor import restarts
from multitrain.monitor.events import Events, read
from multitrain.monitor.slurm import BATCH_ENDED, PREEMPTED, STEP_ENDED, TIME_LIMIT, restart_count

FINISHED, INTERRUPTED = 0, 75
FINAL = (2, 3)
"""Exit statuses that no restart mends: a mistake in the configuration, a run that gave up."""


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 to come back, 1 not to."""
    run, status, *why = sys.argv[1:] if arguments is None else arguments
    reason = decide(Path(run), int(status), preempted=bool(why))
    if reason is None:
        print(f"{Path(run).name}: the ranks ended with status {status}; the job goes back into the queue", flush=True)
        return 0
    print(f"{Path(run).name}: the job does not come back: {reason}", flush=True)
    return 1


def decide(run: Path, status: int, *, preempted: bool) -> str | None:
    """Why the job of the run, whose ranks ended with `status`, must not come back; None when it must. Said in the events."""
    if status in (FINISHED, INTERRUPTED):
        return "it is finished" if status == FINISHED else "it was asked to stop"
    try:
        cluster = load(run).cluster
    except ConfigError as error:
        return str(error)
    events = Events(run / "events.jsonl", restart=restart_count())
    history = restarts.starts(read(events.path))
    if not history or history[-1].restart != events.restart:
        history.append(restarts.Start(events.restart))  # it died before it could say that it began
    ended = history[-1].ended
    if ended is not None:  # in order, but it could not put itself back
        return None if ended in (PREEMPTED, TIME_LIMIT, BATCH_ENDED, STEP_ENDED) else ended
    reason = f"exit status {status}: see the ranks' logs" if status in FINAL else None
    if not preempted:
        reason = reason or restarts.refusal(history, cluster.max_restarts, cluster.max_stalled_restarts)
    try:
        if reason is None:
            events.write("requeue", status=PREEMPTED if preempted else restarts.FAILED, exit_status=status)
        else:
            events.write("end", status="gave up", reason=reason, exit_status=status)
    except OSError as error:  # restarts that cannot be counted have no bound; one that was preempted has not died
        unwritten = f"{events.path} cannot be written ({error.strerror or error}); make room, and submit the run again"
        return reason or (None if preempted else unwritten)
    return reason


if __name__ == "__main__":
    sys.exit(main())
