"""Write events of a run from a launcher, in addition to those of rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.cluster.slurm import job_id, restart_count
from multitrain.records.events import Events


def record(run: Path, event: str, **fields: Any) -> None:
    """Append an event to the run's events, unless another start of the run has taken over. A failure to write is printed.

    The rank 0 of this start may not have claimed the lease yet. Then the lease is that of an earlier start, which must be over.
    """
    try:
        if (holder := _other_writer(run)) is not None:
            raise lease.LeaseLost(lease.held_by(run, holder))
        Events(run / "events.jsonl", restart=restart_count() if job_id() else None).write(event, **fields)
    except (lease.LeaseLost, OSError) as error:
        print(f"multitrain: {event} not written to {run}/events.jsonl: {error}", file=sys.stderr, flush=True)


def _other_writer(run: Path) -> lease.Holder | None:
    """The holder of the run's lease, if that is another start which may still run; otherwise None."""
    holder, own = lease.live(run), lease.start_name(job_id(), restart_count())
    return None if holder is None or holder.start == own or lease.is_later(own, holder.start) else holder
