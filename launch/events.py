"""Events that a launcher writes of a run, beside those of rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.cluster.slurm import job_id, restart_count
from multitrain.records.events import Events


def record(run: Path, event: str, **fields: Any) -> None:
    """Append an event to the run's, unless another start of the run has taken over; what cannot be written is said.

    This may be before the start's rank 0 has claimed the lease: then it is that of an earlier start, which must be over.
    """
    try:
        if (holder := _other(run)) is not None:
            raise lease.LeaseLost(lease.held_by(run, holder))
        Events(run / "events.jsonl", restart=restart_count() if job_id() else None).write(event, **fields)
    except (lease.LeaseLost, OSError) as error:
        print(f"multitrain: {event} not written to {run}/events.jsonl: {error}", file=sys.stderr, flush=True)


def _other(run: Path) -> lease.Holder | None:
    """Who holds the run's lease, when it is not this start and not one that is known to be over."""
    holder, own = lease.live(run), lease.start_name(job_id(), restart_count())
    return None if holder is None or holder.start == own or lease.is_later(own, holder.start) else holder
