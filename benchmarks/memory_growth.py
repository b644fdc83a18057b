"""Memory of a rank and of its loader worker over a long run with validations: python -m benchmarks.memory_growth [--full]

A real run of a tiny network on the demo's datasets, with TensorBoard and its pictures, looked at from outside after every
update. A run of two weeks must not grow, so the figure is the slope of the peak after the first updates, in which everything
is used for the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import plot, row, save
from multitrain.config import dump, validate
from multitrain.data.demo import CLASSES, generate
from tests.support import start_ranks

MODEL = {"frames": 4, "crop": 32, "depth": 2, "width": 16, "heads": 1, "stages": [1], "kv_stride": 4}
CLIPS = {"train": 60, "val": 24, "test": 1}
"""Videos of each dataset."""
FIRST = 300
"""Updates after which everything has been used once."""
VALIDATIONS = 30
SAVED = 100
"""Updates between two checkpoints."""

Sample = tuple[int, float, float]
"""Completed updates; resident and proportional memory (RSS, PSS) in MB."""


def write_run(folder: Path, data: Path, updates: int, ranks: int) -> Path:
    """The folder of a run of `updates` updates with :data:`VALIDATIONS` validations."""
    datasets = {
        name: {
            "annotations": str(data / name / "annotations"),
            "videos": str(data / name / "videos"),
            "class_names": str(data / name / "annotations" / "classes.txt"),
            "sampling": "stride" if name == "shapes" else "segment",
            "flip": False,
        }
        for name in CLASSES
    }
    settings: dict[str, Any] = {name: {} for name in ("loss", "engine")}
    settings |= {
        "name": "long",
        "gpus": ranks,
        "updates": updates,
        "effective_batch": 4 * ranks,
        "micro_batch": 4,
        "precision": "fp32",
        "cluster": {"kind": "local"},
        "data": {"datasets": datasets, "workers": 1, "sampling_rate": 3},
        "model": MODEL | {"head_hidden": 24, "expander_hidden": 32},
        "optim": {"warmup_updates": 10},
        "augment": {"copies": 1},
        "eval": {"every": max(1, updates // VALIDATIONS), "val_stride": 1, "videos_per_batch": 16},
        "checkpoint": {"every": SAVED, "keep": 2},
        "monitor": {"tensorboard": True, "log_every": 100},
    }
    run = folder / "long"
    run.mkdir()
    (run / "config.yaml").write_text(dump(validate(settings)))
    return run


class Watched:
    """A process and its memory as the kernel counts it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Sample] = []

    def look(self, update: int) -> None:
        """Add a sample, while the process lives."""
        with contextlib.suppress(OSError, IndexError):
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
            rss, pss = (int(text.split(f"\n{key}:")[1].split()[0]) * 1024 / 1e6 for key in ("Rss", "Pss"))
            self.samples.append((update, rss, pss))

    def peak(self) -> list[tuple[float, float]]:
        """(completed updates, most resident memory so far in MB)."""
        most = np.maximum.accumulate([rss for _, rss, _ in self.samples])
        return [(float(update), float(mb)) for (update, *_), mb in zip(self.samples, most)]


def slope(points: Sequence[tuple[float, float]], first: int) -> float:
    """Least-squares growth in MB per 100 updates of points (update, MB) from update `first` on."""
    x, y = np.array([p for p in points if p[0] >= first]).T
    return float(np.polyfit(x, y, 1)[0] * 100)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, oldest first."""
    with contextlib.suppress(OSError):
        found = [p.read_text().split() for p in Path(f"/proc/{pid}/task").glob("*/children")]
        return sorted(int(child) for some in found for child in some)
    return []


def watch(run: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> dict[str, Watched]:
    """Samples of every rank, and of the worker that reads rank 0's training videos, until the run ends."""
    watched = {f"rank {number}": Watched(process.pid) for number, process in enumerate(ranks)}
    metrics, done = run / "metrics.jsonl", 0
    while all(process.poll() is None for process in ranks):
        time.sleep(0.02)
        position = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if position == done:
            continue
        done = position
        if "worker" not in watched:
            keeper = children(ranks[0].pid)[0]
            watched["worker"] = Watched(children(keeper)[0])
        for process in watched.values():
            process.look(done)
    return watched


def measure(data: Path, updates: int, ranks: int) -> dict[str, Watched]:
    """One run from its beginning to its end."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), data, updates, ranks)
        log = Path(folder) / "log"
        processes = start_ranks(["-m", "multitrain.train", str(run)], ranks, log=log)
        try:
            watched = watch(run, processes)
            codes = [process.wait(60) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}: {log.read_text()[-2000:]}")
        records = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        seen = sum(r["event"] == "validation" for r in records)
        print(f"{updates} updates, {seen} validations", flush=True)
        return watched


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_growth", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="3,000 updates instead of 600")
    parser.add_argument("--updates", type=int, help=f"how many, more than {FIRST}")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default 1)")
    given = parser.parse_args(arguments)
    updates = given.updates or (3000 if given.full else 600)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "demo"
        generate(data, clips=dict.fromkeys(CLASSES, CLIPS), processes=1)
        watched = measure(data, updates, given.ranks)
    rows, lines = [], {}
    for name, process in watched.items():
        peak = process.peak()
        lines[name] = peak[:: max(1, len(peak) // 300)]
        note = f"{peak[0][1]:.0f} MB after the first update, {peak[-1][1]:.0f} MB after {updates}; {VALIDATIONS} validations"
        figure = f"growth of the peak memory of {name}, after {FIRST} updates"
        unit = "MB per 100 updates"
        rows.append(row(figure, ours=slope(peak, FIRST), unit=unit, target=f"< 1 {unit}", note=note))
        resident = [(float(update), rss) for update, rss, _ in process.samples]
        rows.append(row(f"the same of the resident memory of {name}", ours=slope(resident, FIRST), unit=unit))
    drawn = plot("Memory: the peak over the updates of a run", "updates", "MB", lines)
    save("memory_growth", rows, size="full" if updates >= 3000 else "small", plots=[drawn])


if __name__ == "__main__":
    main()
