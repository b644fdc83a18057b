"""How a run is doing, from its folder and, where there is one, the scheduler. No torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from multitrain.monitor import events, lines
from multitrain.monitor.progress import duration

QUEUE_STATES = {
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "suspended",
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
}
"""SLURM's job states and what they mean for a run; any other is shown in lower case."""

AFTER = {"submit": "submitted", "requeue": "requeued", "error": "failed"}
"""Events that leave a run in a state; `start`, `resume` and `end` are read more closely."""

LEFT = {"finished": "finished", "stopped on request": "stopped", "cancelled": "cancelled"}
"""The status of an `end` event and the state it leaves; any other is an interruption."""

COLUMNS = {
    "name": "run",
    "state": "state",
    "updates": "updates",
    "loss": "loss",
    "accuracy": "validation top-1",
    "clips_per_second": "clips/s",
    "eta": "ETA",
    "restarts": "restarts",
    "checkpoint": "checkpoint",
    "job": "job",
}
"""Columns of :func:`table`."""


def status(run_dir: str | Path) -> dict[str, Any]:
    """What is known of a run.

    Returns:
        ``name``, ``run_dir``, ``state`` (running, pending, submitted, requeued, suspended, interrupted, stopped,
        finished, failed, cancelled, or empty), ``update`` (completed), ``total_updates``, ``loss``, ``lr``, ``clips_per_second``,
        ``seconds_per_update``, ``eta_seconds``, ``last_metric`` (ISO time, UTC), ``validation`` {dataset: {measure:
        value}} and ``validation_update``, ``checkpoint`` (completed updates of the newest one), ``checkpoints``,
        ``job``, ``job_state``, ``reason`` (the scheduler's), ``restarts``, ``skipped`` {dataset: bad videos},
        ``last_event``, ``last_error``. Unknown values are None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder; runs are under `runs` by name")
    history = events.read(run_dir / "events.jsonl")
    metrics = _tail(run_dir / "metrics.jsonl")
    saved = _checkpoints(run_dir / "checkpoints")
    queue = _queue(_last(history, "job"))
    update = metrics[-1]["update"] + 1 if metrics else (saved[-1] if saved else 0)
    total = _last(history, "total_updates") or _configured_updates(run_dir)
    pace = _seconds_per_update(metrics)
    state = queue.get("state") or _state(history)
    validation = [e for e in history if e.get("event") == "validation"]
    latest = metrics[-1] if metrics else {}
    return {
        "name": run_dir.resolve().name,
        "run_dir": str(run_dir),
        "state": state,
        "update": update,
        "total_updates": total,
        "loss": latest.get("loss"),
        "lr": latest.get("lr"),
        "clips_per_second": latest.get("clips_per_second"),
        "seconds_per_update": pace,
        "eta_seconds": pace * (total - update)
        if pace and total and state in ("running", "pending", "requeued")
        else None,
        "last_metric": _modified(run_dir / "metrics.jsonl"),
        "validation": validation[-1].get("results") if validation else None,
        "validation_update": validation[-1].get("update") if validation else None,
        "checkpoint": saved[-1] if saved else None,
        "checkpoints": saved,
        "job": _last(history, "job"),
        "job_state": queue.get("job_state"),
        "reason": queue.get("reason"),
        "restarts": sum(e.get("event") == "resume" for e in history),
        "skipped": _skipped(run_dir / "skipped.jsonl"),
        "last_event": history[-1] if history else None,
        "last_error": _error(history),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Statuses of several runs as aligned text, one line a run, with a line below a run that failed or waits."""
    cells = [_cells(row) for row in rows]
    shown = [c for c in COLUMNS if c == "name" or any(row[c] for row in cells)]
    widths = {c: max([len(COLUMNS[c]), *(len(row[c]) for row in cells)]) for c in shown}
    out = ["  ".join(COLUMNS[c].ljust(widths[c]) for c in shown).rstrip()]
    for row, texts in zip(rows, cells, strict=True):
        out.append("  ".join(texts[c].ljust(widths[c]) for c in shown).rstrip())
        if row.get("state") == "failed" and row.get("last_error"):
            out.append(f"  error: {row['last_error']}")
        if row.get("state") == "pending" and row.get("reason"):
            out.append(f"  waiting: {row['reason']}")
    return "\n".join(out)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    total = row.get("total_updates")
    validation = row.get("validation") or {}
    tops = {d: v.get("map", v.get("top1")) for d, v in validation.items()}
    return {
        "name": str(row["name"]),
        "state": str(row.get("state") or ""),
        "updates": f"{row.get('update')}/{total} ({row['update'] / total:.0%})" if total else str(row.get("update")),
        "loss": _number(row.get("loss"), ".4f"),
        "accuracy": ", ".join(f"{d} {v:.1f}" for d, v in tops.items() if v is not None),
        "clips_per_second": _number(row.get("clips_per_second"), ".1f"),
        "eta": duration(row["eta_seconds"]) if row.get("eta_seconds") is not None else "",
        "restarts": str(row.get("restarts") or ""),
        "checkpoint": "" if row.get("checkpoint") is None else str(row["checkpoint"]),
        "job": str(row.get("job") or ""),
    }


def _error(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the newest start failed, None when it did not."""
    for event in reversed(history):
        if event.get("event") in ("start", "resume", "end"):
            return None
        if event.get("event") == "error":
            return str(event.get("reason"))
    return None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _state(history: Sequence[Mapping[str, Any]]) -> str:
    """The state that the events tell, when no scheduler knows the job."""
    for event in reversed(history):
        name = str(event.get("event"))
        if name in AFTER:
            return AFTER[name]
        if name == "end":
            return LEFT.get(str(event.get("status")), "interrupted")
        if name in ("start", "resume"):
            return "running" if _alive(event) else "interrupted"
    return "empty"


def _alive(event: Mapping[str, Any]) -> bool:
    """Whether the process of a `start` event runs: by its `pid` on this host; elsewhere nothing says it ended."""
    pid = event.get("pid")
    if not isinstance(pid, int) or event.get("host") != socket.gethostname():
        return event.get("job") is None or shutil.which("squeue") is None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _queue(job: str | None) -> dict[str, str]:
    """What `squeue` says of a job; empty when there is no SLURM, no job, or the job has left the queue."""
    squeue = shutil.which("squeue")
    if not job or squeue is None:
        return {}
    command = [squeue, "--noheader", "--jobs", str(job), "--states=all", "--format=%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    first = answer.stdout.strip().splitlines()[:1]
    if answer.returncode or not first:
        return {}
    state, _, reason = first[0].partition("|")
    if state == "COMPLETED":
        return {"job_state": state}
    found = {"job_state": state, "state": QUEUE_STATES.get(state, state.lower())}
    return found if reason in ("", "None") else {**found, "reason": reason}


def _tail(path: Path, size: int = 200_000) -> list[dict[str, Any]]:
    """The last records of a metrics file, without reading all of it."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            data = file.read()
    except FileNotFoundError:
        return []
    records = (lines.decode(line) for line in data.split(b"\n"))
    return [r for r in records if r is not None and isinstance(r.get("update"), int)]


def _seconds_per_update(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds of the last hundred updates."""
    seconds = [r["seconds"] for r in metrics[-100:] if r.get("seconds") is not None]
    return sum(seconds) / len(seconds) if seconds else None


def _checkpoints(folder: Path) -> list[int]:
    """Completed updates of the complete checkpoints, ascending; a complete one has its manifest."""
    names = (p.parent.name.removeprefix("update-") for p in folder.glob("update-*/manifest.json"))
    return sorted(int(n) for n in names if n.isdigit())


def _configured_updates(run_dir: Path) -> int | None:
    from multitrain.config import ConfigError, load

    try:
        return load(run_dir).updates
    except ConfigError:
        return None


def _skipped(path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in lines.read(path):
        name = str(record.get("dataset"))
        counts[name] = counts.get(name, 0) + 1
    return counts


def _last(history: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((e[key] for e in reversed(history) if e.get(key) is not None), None)


def _modified(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    except FileNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m multitrain.monitor.status RUN… [--json]``: print the table, or one JSON object a run."""
    import argparse

    parser = argparse.ArgumentParser(prog="multitrain status", description="How runs are doing.")
    parser.add_argument("run_dir", nargs="+", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    options = parser.parse_args(arguments)
    try:
        rows = [status(path) for path in options.run_dir]
    except FileNotFoundError as error:
        parser.error(str(error))
    print("\n".join(json.dumps(row) for row in rows) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
