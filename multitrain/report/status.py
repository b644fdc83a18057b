"""Status of runs, from their folders and the scheduler (if there is one). No torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from multitrain import lease
from multitrain.cluster import scheduler
from multitrain.config import ConfigError, nearest
from multitrain.config.arguments import Parser
from multitrain.config.paths import WEIGHTS_OF_A_RUN
from multitrain.records import events, jsonl
from multitrain.records.checkpoints import BEST, MANIFEST, listed, pointed_to, update_of
from multitrain.records.diagnosis import diagnose
from multitrain.report.interruptions import interruptions
from multitrain.report.status_text import card, table

STATE_AFTER_EVENT = {"submit": "submitted", "requeue": "requeued", "error": "failed"}
"""States of a run by its last event; `start`, `resume` and `end` are handled separately."""

STATE_OF_END = {"finished": "finished", "stopped on request": "stopped", "cancelled": "cancelled"}
"""States of a run by the status of its `end` event; any other status is an interruption."""

ACTIVE_STATES = ("running", "pending", "requeued", "submitted")

SILENCE_SECONDS = 600.0
"""Seconds without an update after which a running run counts as silent; or the time of twenty updates, if longer."""


FIELDS = (
    *("name", "run_dir", "state", "update", "total_updates", "world_size", "loss", "lr", "clips_per_second"),
    *("seconds_per_update", "data_wait_fraction", "eta_seconds", "last_metric", "silent_seconds", "validation"),
    *("validation_update", "checkpoint", "checkpoint_age_seconds", "checkpoints", "best", "best_value"),
    *("job", "job_state", "reason"),
    *("job_start", "nodes", "restarts", "interruptions", "skipped", "findings", "last_event", "last_error"),
)
"""Keys of a status."""


def status(run_dir: str | Path) -> dict[str, Any]:
    """Status of a run.

    Returns:
        ``name``, ``run_dir``, ``state`` (running, pending, submitted, requeued, suspended, interrupted, stopped,
        finished, failed, cancelled, empty, or unreadable: another user's private run), ``update`` (completed),
        ``total_updates``, ``world_size``, ``loss``, ``lr``; over the last hundred updates ``clips_per_second``,
        ``seconds_per_update`` and ``data_wait_fraction`` (0–1); ``eta_seconds``, ``last_metric`` (ISO time, UTC),
        ``silent_seconds`` (when a running run has not finished an update for suspiciously long), ``validation``
        {dataset: {measure: value}} and ``validation_update``, ``checkpoint`` (completed updates of the newest one),
        ``checkpoint_age_seconds``, ``checkpoints``, ``best`` (completed updates of the best one by `checkpoint.best`) and
        ``best_value``, ``job``, ``job_state``, ``reason`` (the scheduler's),
        ``job_start``, ``nodes``, ``restarts`` and ``interruptions`` (see
        :func:`multitrain.report.interruptions.interruptions`), ``skipped`` {dataset: bad videos}, ``findings`` (what
        :func:`multitrain.records.diagnosis.diagnose` notices in the newest updates), ``last_event``, ``last_error``. Unknown
        values are None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return statuses([run_dir])[0]


def statuses(run_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """:func:`status` of several runs, with one query to the scheduler."""
    folders = [Path(run) for run in run_dirs]
    histories: dict[Path, list[dict[str, Any]]] = {}
    unreadable: dict[Path, OSError] = {}
    for folder in folders:
        try:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such run folder; runs are under `runs` by name")
            histories[folder] = events.read(folder / "events.jsonl")
        except PermissionError as error:
            unreadable[folder] = error
    ids = {folder: _last(history, "job") for folder, history in histories.items()}
    queue = scheduler.jobs(str(job) for job in ids.values() if job)
    rows = []
    for folder in folders:
        try:
            if folder in unreadable:
                raise unreadable[folder]
            rows.append(_status(folder, histories[folder], queue.get(str(ids[folder]), {})))
        except PermissionError as error:
            rows.append(_unreadable(folder, error))
    return rows


def find(runs: str | Path) -> list[Path]:
    """The runs in a folder of runs (folders with a configuration or events), the least recently active first.

    A folder without read permission counts as another user's private run.

    Raises:
        ConfigError: `runs` itself cannot be read.
    """
    try:
        inside = [p for p in Path(runs).iterdir() if not p.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{runs}: cannot be read ({error.strerror}); ask its owner, or give --runs DIR") from None
    return sorted((p for p in inside if _is_run(p)), key=lambda p: (_activity(p), p.name))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / f).is_file() for f in ("config.yaml", "events.jsonl"))
    except PermissionError:
        return True
    except OSError:
        return False


def _unreadable(folder: Path, error: OSError) -> dict[str, Any]:
    """The status of another user's private run: its name and owner."""
    import pwd

    try:
        owner = pwd.getpwuid(folder.stat().st_uid).pw_name
    except (OSError, KeyError):
        owner = ""
    reason = f"{error.strerror or error}" + (f"; it belongs to {owner}" if owner else "")
    empty = dict.fromkeys(FIELDS) | {"checkpoints": [], "interruptions": [], "skipped": {}, "findings": []}
    return empty | {"name": folder.name, "run_dir": str(folder), "state": "unreadable", "last_error": reason}


def resolve(name: str, runs: str | Path) -> Path:
    """The folder of a run, given as a path or by its name in `runs`.

    Raises:
        ConfigError: there is no such run; names the most similar ones.
    """
    if Path(name).name in WEIGHTS_OF_A_RUN and len(Path(name).parts) > 1 and not Path(name).is_dir():
        run = resolve(str(Path(name).parent), runs)
        raise ConfigError(f"{name}: stands for weights of a run, not for the run; give {run}")
    folders = [folder for folder in (Path(name), Path(runs) / name) if _is_folder(folder)]
    for folder in (*filter(_is_run, folders), *folders):  # a folder of data may have the name of the run
        return folder
    known = [p.name for p in find(runs)]
    hint = nearest(name, known) if known else f"there are no runs in {runs}"
    raise ConfigError(f"{name}: no such run, neither here nor in {runs}; {hint}")


def _status(run_dir: Path, history: Sequence[Mapping[str, Any]], queue: Mapping[str, str]) -> dict[str, Any]:
    metrics = _tail(run_dir / "metrics.jsonl")
    saved = _checkpoints(run_dir / "checkpoints")
    update = metrics[-1]["update"] + 1 if metrics else (saved[-1] if saved else 0)
    total = _last(history, "total_updates") or _configured_updates(run_dir)
    recent = metrics[-100:]
    pace = _mean(recent, "seconds")
    state = queue.get("state") or _state(history)
    original = lease.original(run_dir) if state in ACTIVE_STATES else None
    if original is not None:  # events and job are the original's
        state, queue = "interrupted", {}
    validation = [e for e in history if e.get("event") == "validation"]
    latest = metrics[-1] if metrics else {}
    known_interruptions = interruptions(history)
    return {
        "name": run_dir.resolve().name,
        "run_dir": str(run_dir),
        "state": state,
        "update": update,
        "total_updates": total,
        "world_size": latest.get("world_size") or _last(history, "world_size"),
        "loss": latest.get("loss"),
        "lr": latest.get("lr"),
        "clips_per_second": _speed(recent),
        "seconds_per_update": pace,
        "data_wait_fraction": _mean(recent, "data_wait_fraction"),
        "eta_seconds": pace * (total - update) if pace and total and state in ACTIVE_STATES else None,
        "last_metric": _modified(run_dir / "metrics.jsonl"),
        "silent_seconds": _silence(run_dir, history, pace) if state == "running" else None,
        "validation": validation[-1].get("results") if validation else None,
        "validation_update": validation[-1].get("update") if validation else None,
        "checkpoint": saved[-1] if saved else None,
        "checkpoint_age_seconds": _age(run_dir / f"checkpoints/update-{saved[-1]:08d}/manifest.json")
        if saved
        else None,
        "checkpoints": saved,
        **_best(run_dir / "checkpoints", history),
        "job": _last(history, "job"),
        "job_state": queue.get("job_state"),
        "reason": queue.get("reason"),
        "job_start": queue.get("start"),
        "nodes": queue.get("nodes"),
        "restarts": len(known_interruptions),
        "interruptions": known_interruptions,
        "skipped": _skipped(run_dir / "skipped.jsonl"),
        "findings": _findings(run_dir, metrics, total, validation[-1].get("results") if validation else None),
        "last_event": history[-1] if history else None,
        "last_error": f"a copy of {original}, made while it trained" if original else _error(history),
    }


def _error(history: Sequence[Mapping[str, Any]]) -> str | None:
    """The error of the newest start; None when it did not fail."""
    for event in reversed(history):
        if event.get("event") in ("start", "resume", "end"):
            return None
        if event.get("event") == "error":
            return str(event.get("reason"))
    return None


def _state(history: Sequence[Mapping[str, Any]]) -> str:
    """The state according to the events, for a job that the scheduler does not list."""
    for event in reversed(history):
        name = str(event.get("event"))
        if name in STATE_AFTER_EVENT:
            return STATE_AFTER_EVENT[name]
        if name == "end":
            return STATE_OF_END.get(str(event.get("status")), "interrupted")
        if name in ("start", "resume"):
            return "running" if _alive(event) else "interrupted"
    return "empty"


def _alive(event: Mapping[str, Any]) -> bool:
    """Whether the process of a `start` event runs: on this host by its `pid`; on another host it
    counts as running unless SLURM would list its job."""
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


def _tail(path: Path, size: int = 200_000) -> list[dict[str, Any]]:
    """The last records of a metrics file, without reading all of it."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            data = file.read()
    except FileNotFoundError:
        return []
    records = (jsonl.decode(line) for line in data.split(b"\n"))
    kept = (jsonl.valid_fields(r) for r in records if r is not None)
    return [r for r in kept if r.get("update") is not None]


def _checkpoints(folder: Path) -> list[int]:
    """Completed updates of the complete checkpoints, ascending; a complete one has its manifest."""
    return sorted(update_of(p) for p in listed(folder) if (p / MANIFEST).is_file())


def _best(folder: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    name = pointed_to(folder, BEST)
    update = None if name is None else update_of(folder / name)
    said = [e for e in history if e.get("event") == "best" and e.get("update") == update]
    return {"best": update, "best_value": said[-1].get("value") if said else None}


def _findings(
    run_dir: Path, metrics: Sequence[Mapping[str, Any]], total: int | None, validation: Mapping[str, Any] | None
) -> list[str]:
    from multitrain.config import load

    try:
        return [str(finding) for finding in diagnose(metrics, load(run_dir), total, validation)]
    except ConfigError:
        return []


def _configured_updates(run_dir: Path) -> int | None:
    from multitrain.config import load

    try:
        return load(run_dir).updates
    except ConfigError:
        return None


def _skipped(path: Path) -> dict[str, int]:
    return dict(Counter(str(record.get("dataset")) for record in jsonl.read(path)))


def _last(history: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((e[key] for e in reversed(history) if e.get(key) is not None), None)


def _modified(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    except FileNotFoundError:
        return None


def _mean(metrics: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [r[key] for r in metrics if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def _speed(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Clips per second, averaged over the updates."""
    pairs = [(r["clips_per_second"], r.get("seconds") or 1.0) for r in metrics if r.get("clips_per_second") is not None]
    return sum(speed * seconds for speed, seconds in pairs) / sum(s for _, s in pairs) if pairs else None


def _silence(run_dir: Path, history: Sequence[Mapping[str, Any]], pace: float | None) -> float | None:
    """Seconds since the last output of a running run, if they exceed :data:`SILENCE_SECONDS`; otherwise None."""
    last = max((t for t in (_activity(run_dir), _moment(history)) if t), default=None)
    quiet = None if last is None else time.time() - last
    return quiet if quiet is not None and quiet > max(SILENCE_SECONDS, 20 * (pace or 0.0)) else None


def _moment(history: Sequence[Mapping[str, Any]]) -> float | None:
    try:
        return datetime.fromisoformat(history[-1]["time"]).timestamp()
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _activity(run_dir: Path) -> float:
    """Time of the run's last metric or event, in seconds since 1970; 0 when there is none."""
    ages = [_mtime(run_dir / f) for f in ("metrics.jsonl", "events.jsonl", "config.yaml")]
    return max((a for a in ages if a is not None), default=0.0)


def _age(path: Path) -> float | None:
    written = _mtime(path)
    return None if written is None else max(0.0, time.time() - written)


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


EXAMPLES = (
    "multitrain status                         every run in runs/, one line each",
    "multitrain status first                   one run in full: restarts with reasons, validation, checkpoints",
    "multitrain status --watch                 repeat every 5 seconds, until Ctrl-C",
    "multitrain status first --json | jq .eta_seconds",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """``multitrain status [RUN…]``: print the status of runs."""
    parser = Parser("status", "Show the status of runs, from their folders and, if available, from SLURM.", *EXAMPLES)
    parser.add_argument("run", nargs="*", metavar="RUN", help="a run's folder, or its name (default: all runs)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of runs (default runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object per run, one per line")
    parser.add_argument(
        "--watch", nargs="?", type=float, const=5.0, metavar="SECONDS", help="repeat every SECONDS (default 5)"
    )
    given = parser.parse_args(arguments)
    if given.watch is not None and not given.watch > 0:
        raise ConfigError(f"--watch {given.watch:g}: give a number of seconds above 0")
    while True:
        text = _shown(given.run, given.runs, given.json)
        if given.watch is None:
            print(text)
            return 0
        if sys.stdout.isatty() and not given.json:
            print(f"\033[H\033[2J{text}\n\n{datetime.now():%H:%M:%S}, every {given.watch:g} s; Ctrl-C ends", flush=True)
        else:
            print(text, flush=True)
        time.sleep(given.watch)


def _shown(names: Sequence[str], runs: str, as_json: bool) -> str:
    folders = [resolve(name, runs) for name in names] or find(runs)
    if not folders:
        raise ConfigError(f"{runs}: holds no runs; name a run's folder, or the folder of runs with --runs DIR")
    rows = statuses(folders)
    if as_json:
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return card(rows[0], colour=colour) if len(names) == 1 else table(rows, colour=colour)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ConfigError as error:
        print(f"multitrain: {error}", file=sys.stderr)
        raise SystemExit(2) from None
