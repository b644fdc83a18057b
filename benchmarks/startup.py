"""From process start to the first update of the tiny model, and what is imported on the way.

python -m benchmarks.startup [--full]

One rank on this machine, gloo, four little videos a dataset. Imports are measured by ``python -X importtime``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import footage
from benchmarks.results import row, save
from multitrain.config import dump, validate

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("torch", "deepspeed", "cv2", "av", "pydantic", "numpy", "hydra", "tensorboard", "multitrain")
_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| ( *)(\S+)")


def write_run(folder: Path) -> Path:
    """The folder of a run of one update of the tiny model."""
    videos = footage.made(4, (96, 80), 24)
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(f"{v} {n % 2}\n" for n, v in enumerate(videos)))
    groups = {name: {} for name in ("cluster", "loss", "optim", "engine", "eval", "augment")}
    tiny = {"frames": 4, "crop": 64, "depth": 3, "width": 16, "heads": 1, "stages": [1], "kv_stride": 4}
    settings = groups | {
        "name": "start",
        "gpus": 1,
        "updates": 1,
        "effective_batch": 4,
        "micro_batch": 4,
        "precision": "fp32",
        "cluster": {"kind": "local"},
        "data": {"datasets": {"a": {"annotations": str(folder), "videos": "/", "classes": 2}}, "workers": 1},
        "model": tiny | {"head_hidden": 24, "expander_hidden": 32},
        "optim": {"warmup_updates": 1},
        "checkpoint": {"every": 100, "keep": 2},
        "monitor": {"tensorboard": False},
    }
    run = folder / "start"
    run.mkdir()
    (run / "config.yaml").write_text(dump(validate(settings)))
    return run


def environment(port: int = 0) -> dict[str, str]:
    """Of a rank alone."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        free = str(probe.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free}
    return {**os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def first_update() -> tuple[float, float]:
    """CPU and wall seconds of a process of one update, the checkpoint at its end included."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder))
        before, began = os.times(), time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "multitrain.train", str(run)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        wall, after = time.monotonic() - began, os.times()
        metrics = run / "metrics.jsonl"
        if done.returncode or not metrics.is_file() or json.loads(metrics.read_text().splitlines()[0])["update"] < 0:
            raise SystemExit(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, wall


def imports(module: str) -> dict[str, float]:
    """Milliseconds that importing `module` takes, in all and in each watched package, its own imports included."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    total, inclusive = 0.0, dict.fromkeys(WATCHED, 0.0)
    for own, cumulative, _, name in _LINE.findall(done.stderr):
        total += int(own) / 1e3
        if name in inclusive:
            inclusive[name] = int(cumulative) / 1e3
    return {"in all": total} | {n: ms for n, ms in inclusive.items() if ms}


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--full", action="store_true", help="five starts instead of two")
    given = parser.parse_args(arguments)
    starts = [first_update() for _ in range(5 if given.full else 2)]
    rows = [
        row(
            "process start to the end of a run of one update, tiny model",
            ours=statistics.median(s[0] for s in starts),
            unit="CPU s",
            note="Imports, DeepSpeed, a loader worker, the update, the checkpoint; all processes.",
        ),
        row("the same, by the clock", ours=statistics.median(s[1] for s in starts), unit="s"),
    ]
    for module in ("multitrain.train", "launch.submit", "multitrain.cli", "multitrain.data.clips"):
        found = imports(module)
        rows.append(row(f"import {module}", ours=found.pop("in all"), unit="ms"))
        parts = sorted(found.items(), key=lambda p: -p[1])
        rows[-1]["note"] = "with what each brings along: " + ", ".join(f"{n} {ms:.0f} ms" for n, ms in parts)
    save("startup", rows, size="full" if given.full else "small")


if __name__ == "__main__":
    main()
