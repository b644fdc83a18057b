"""Format statuses of runs as text: one line per run, or one run in full. Colours only on request."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitrain.records.progress import duration
from multitrain.text import printable

COLUMNS = {
    "name": "run",
    "state": "state",
    "updates": "updates",
    "eta": "ETA",
    "clips_per_second": "clips/s",
    "data_wait": "data wait",
    "loss": "loss",
    "accuracy": "validation top-1",
    "restarts": "restarts",
    "checkpoint": "checkpoint",
    "job": "job",
}
"""Columns of :func:`table`; columns that are empty for all runs are left out."""

COLOURS = {
    "running": "32",
    "finished": "36",
    "pending": "33",
    "requeued": "33",
    "submitted": "33",
    "suspended": "33",
    "interrupted": "33",
    "failed": "31",
    "cancelled": "31",
    "timeout": "31",
    "out_of_memory": "31",
    "node_fail": "31",
}
"""ANSI colours of states."""

MAX_INTERRUPTIONS = 8
"""Number of interruptions that :func:`card` lists, the newest ones."""


def table(rows: Sequence[Mapping[str, Any]], *, colour: bool = False) -> str:
    """Statuses of several runs as aligned text, one line per run, with warnings below it."""
    cells = [_cells(row) for row in rows]
    kept = [c for c in COLUMNS if c == "name" or any(row[c] for row in cells)]
    widths = {c: max([len(COLUMNS[c]), *(len(row[c]) for row in cells)]) for c in kept}
    out = ["  ".join(COLUMNS[c].ljust(widths[c]) for c in kept).rstrip()]
    for row, texts in zip(rows, cells, strict=True):
        padded = {c: texts[c].ljust(widths[c]) for c in kept}
        if colour:
            padded["state"] = _coloured(padded["state"], str(row.get("state")))
        out.append("  ".join(padded[c] for c in kept).rstrip())
        out += [f"  {note}" for note in _notes(row)]
    return "\n".join(out)


def card(row: Mapping[str, Any], *, colour: bool = False) -> str:
    """The full status of one run, one value per line."""
    cells = _cells(row)
    state = str(row.get("state") or "")
    facts = {
        "state": state + _job(row),
        "updates": cells["updates"] + (f", {cells['eta']} remaining" if cells["eta"] else ""),
        "speed": _speed(row),
        "loss": cells["loss"] + (f", learning rate {row['lr']:.2e}" if row.get("lr") is not None else ""),
        **{f"validation {name}": text for name, text in _validations(row).items()},
        "checkpoint": _checkpoint(row),
        "skipped": ", ".join(f"{name} {count}" for name, count in (row.get("skipped") or {}).items()),
        "folder": str(row.get("run_dir") or ""),
    }
    shown = {printable(key): printable(text) for key, text in facts.items() if text}
    if colour and state in COLOURS:
        shown["state"] = _coloured(state, state) + shown["state"].removeprefix(state)
    width = max(len(key) for key in shown)
    out = [cells["name"], *(f"  {key:<{width}}  {text}" for key, text in shown.items())]
    out += [f"  {note}" for note in [*_notes(row), *_remedy(row), *_findings(row)]]
    interruptions = list(row.get("interruptions") or ())
    if interruptions:
        out.append(f"  restarted {len(interruptions)} time{'s' if len(interruptions) != 1 else ''}:")
        out += [f"    {printable(_interruption(i))}" for i in interruptions[-MAX_INTERRUPTIONS:]]
        if len(interruptions) > MAX_INTERRUPTIONS:
            out.insert(
                len(out) - MAX_INTERRUPTIONS,
                f"    … {len(interruptions) - MAX_INTERRUPTIONS} earlier ones are in events.jsonl",
            )
    return "\n".join(out)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    total = row.get("total_updates")
    validation = row.get("validation") or {}
    tops = {d: v.get("map", v.get("top1")) for d, v in validation.items()}
    interruptions = row.get("interruptions") or []
    update = "" if row.get("update") is None else str(row["update"])
    cells = {
        "name": str(row["name"]),
        "state": str(row.get("state") or ""),
        "updates": f"{update}/{total} ({row['update'] / total:.0%})" if total and update else update,
        "eta": duration(row["eta_seconds"]) if row.get("eta_seconds") is not None else "",
        "clips_per_second": _number(row.get("clips_per_second"), ".1f"),
        "data_wait": _number(row.get("data_wait_fraction"), ".0%"),
        "loss": _number(row.get("loss"), ".4f"),
        "accuracy": ", ".join(f"{d} {v:.1f}" for d, v in tops.items() if v is not None),
        "restarts": f"{len(interruptions)}, last: {_brief(interruptions[-1]['reason'])}" if interruptions else "",
        "checkpoint": _short_checkpoint(row),
        "job": str(row.get("job") or ""),
    }
    return {column: printable(text) for column, text in cells.items()}


def _remedy(row: Mapping[str, Any]) -> list[str]:
    """The command that resumes a run that ended early, as the submission printed it."""
    if row.get("state") not in ("interrupted", "failed", "stopped", "timeout", "out_of_memory", "node_fail"):
        return []
    run = Path(str(row["run_dir"])).resolve()
    submit = run / "code/launch/submit.py"
    command = ["python", str(submit), str(run)] if submit.is_file() else ["multitrain", "submit", str(run)]
    return [printable(f"to resume: {shlex.join(command)}")]


def _findings(row: Mapping[str, Any]) -> list[str]:
    return [printable(f"note: {finding}") for finding in row.get("findings") or ()]


def _notes(row: Mapping[str, Any]) -> list[str]:
    """Warnings about the run."""
    notes = []
    if row.get("last_error") and row.get("state") not in ("running", "finished"):
        notes.append(f"error: {row['last_error']}")
    if row.get("state") == "pending" and row.get("reason"):
        start = f", expected to start {row['job_start'].replace('T', ' ')}" if row.get("job_start") else ""
        notes.append(f"waiting: {row['reason']}{start}")
    if row.get("silent_seconds"):
        notes.append(f"silent: no update for {duration(row['silent_seconds'])}; see its logs/")
    return [printable(note) for note in notes]


def _job(row: Mapping[str, Any]) -> str:
    parts = [
        f"job {row['job']}" if row.get("job") else "",
        str(row.get("job_state") or ""),
        str(row.get("nodes") or ""),
    ]
    text = " ".join(p for p in parts if p)
    return f" ({text})" if text else ""


def _speed(row: Mapping[str, Any]) -> str:
    parts = [
        _number(row.get("clips_per_second"), ".1f", " clips/s"),
        _number(row.get("seconds_per_update"), ".2f", " s per update"),
        _number(row.get("data_wait_fraction"), ".0%", " of it waiting for data"),
        _number(row.get("world_size"), "d", " ranks"),
    ]
    return ", ".join(p for p in parts if p)


def _validations(row: Mapping[str, Any]) -> dict[str, str]:
    names = {"top1": "top-1", "top5": "top-5", "map": "mAP"}
    return {
        name: ", ".join(f"{names[m]} {values[m]:.1f} %" for m in names if values.get(m) is not None)
        + (f" of {values['videos']:.0f} videos" if values.get("videos") is not None else "")
        + f" after update {row.get('validation_update')}"
        for name, values in (row.get("validation") or {}).items()
    }


def _checkpoint(row: Mapping[str, Any]) -> str:
    if row.get("checkpoint") is None:
        return ""
    age = row.get("checkpoint_age_seconds")
    kept = len(row.get("checkpoints") or ())
    return (
        f"update {row['checkpoint']}"
        + (f", written {duration(age)} ago" if age is not None else "")
        + (f" ({kept} kept)" if kept > 1 else "")
        + (f"; best: update {row['best']}" if row.get("best") is not None else "")
        + (f" ({row['best_value']:.2f})" if row.get("best_value") is not None else "")
    )


def _short_checkpoint(row: Mapping[str, Any]) -> str:
    if row.get("checkpoint") is None:
        return ""
    age = row.get("checkpoint_age_seconds")
    return f"{row['checkpoint']}" + (f" ({duration(age)} ago)" if age is not None else "")


def _interruption(interruption: Mapping[str, Any]) -> str:
    when = str(interruption.get("time") or "")[:19].replace("T", " ")
    parts = [f"{when} UTC" if when else "", f"at update {interruption.get('update')}: {interruption.get('reason')}"]
    if interruption.get("away_seconds") is not None:
        parts.append(f"away {duration(interruption['away_seconds'])}")
    if interruption.get("redone"):
        parts.append(f"{interruption['redone']} updates repeated")
    return ", ".join(p for p in parts if p)


def _brief(reason: str, width: int = 28) -> str:
    first = reason.split("\n")[0]
    return first if len(first) <= width else first[: width - 1] + "…"


def _coloured(text: str, state: str) -> str:
    return f"\033[{COLOURS[state]}m{text}\033[0m" if state in COLOURS else text


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit
