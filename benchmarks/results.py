"""The files of a benchmark: `results/NAME.json`, from which `benchmarks.report` writes every table and plot, and
`results/raw/NAME.json` with what was observed besides, which git ignores.

A script measures, makes one `row` per figure, perhaps some `plot`, and calls `save`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).resolve().parent / "results"

Size = Literal["small", "full"]

INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""CPU features, best first; the first that a CPU has is named. Results in bf16 hold for CPUs with one of the first two only."""

MAX_POINTS = 60
"""Points of a line of a plot."""

DIGITS = 5
"""Significant digits of the numbers in a result file."""

_VERSIONED = (
    "numpy",
    "torch",
    "deepspeed",
    "av",
    "decord",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "fvcore",
)


def row(
    figure: str,
    *,
    ours: float | None,
    baseline: float | None = None,
    ratio: float | None = None,
    unit: str = "",
    target: str = "",
    aim: str = "",
    note: str = "",
) -> dict[str, Any]:
    """One line of a table.

    Args:
        figure: what was measured.
        ours, baseline: in `unit`.
        ratio: how many times better ours is; baseline ÷ ours where not given, which is right where less is better.
        target: what has to be reached: ``">= 4.1×"`` is about the ratio, ``"<= 1.5 ms"`` about ours.
        aim: what is hoped for, written in the same way.
        note: what a reader has to know to understand the line.
    """
    if ratio is None and ours and baseline is not None:
        ratio = baseline / ours
    values = {"figure": figure, "ours": ours, "baseline": baseline, "ratio": ratio}
    return values | {"unit": unit, "target": target, "aim": aim, "note": note}


def plot(
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    log: Literal["", "x", "y", "xy"] = "",
    note: str = "",
) -> dict[str, Any]:
    """A plot: points (x, y) of each line by its label, thinned to `MAX_POINTS`; `log` names the logarithmic axes."""
    points = {label: [list(p) for p in line[:: -(-len(line) // MAX_POINTS) or 1]] for label, line in lines.items()}
    return {"title": title, "x": x, "y": y, "lines": points, "log": log, "note": note}


def save(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    size: Size = "small",
    plots: Sequence[Mapping[str, Any]] = (),
    folder: Path = FOLDER,
    typed: str | None = None,
    table: str = "",
    **facts: Any,
) -> Path:
    """Write `folder`/NAME.json, print the rows, return the file.

    Args:
        typed: the command to show instead of this process's own, which may name a folder of this machine.
        table: a Markdown table to show below the rows.
        facts: what was observed besides; written to `folder`/raw/NAME.json.
    """
    content = {
        "name": name,
        "command": typed or command(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": versions(),
        "size": size,
        "rows": [row(**r) for r in rows],
        "plots": list(plots),
    }
    if table:
        content["table"] = table
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(encode(content), encoding="utf-8")
    if facts:
        (folder / "raw").mkdir(exist_ok=True)
        (folder / "raw" / file.name).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    for r in content["rows"]:
        ratio = "" if r["ratio"] is None else f"  {r['ratio']:.3g}×"
        print(f"{r['figure']}: {_number(r['ours'])} against {_number(r['baseline'])} {r['unit']}{ratio}", flush=True)
    return file


def encode(content: Mapping[str, Any]) -> str:
    """The text of a result file: rounded numbers, one line per value, row and plot."""
    parts = []
    for key, value in _rounded(content).items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}")
    return value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def command() -> str:
    """The command line of this process, as one would type it in the checkout."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        program = [os.path.relpath(sys.argv[0], FOLDER.parents[1])] if sys.argv[0] else []
    return shlex.join(["python", *program, *sys.argv[1:]])


def hardware() -> str:
    """CPU, its instructions for matrix products, cores that this process may use, memory, and GPUs if torch sees some."""
    model, instructions = platform.machine(), ""
    cpu, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpu.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
        known = set(cpu.read_text().split())
        instructions = next((f" ({name})" for name in INSTRUCTIONS if name in known), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{model}{instructions}, {cores} cores"
    if memory.exists():
        text += f", {int(memory.read_text().split()[1]) / 2**20:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f", {torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return text


def versions() -> dict[str, str]:
    """Python and the libraries that figures depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
