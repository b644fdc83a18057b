"""The index of annotation files: 1,223,325 videos of three datasets, as used by a loader worker.

python -m benchmarks.index [--full]

The baseline holds the data structures of the published loader: a list of joined paths, a list of labels, and a dictionary of
dictionaries with an entry per video. Private memory is read from /proc in forked workers that look up videos all over the lists.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import cpu_seconds
from benchmarks.results import row, save
from multitrain.config import DatasetConfig
from multitrain.data.catalog import Catalog

SIZES = {"kinetics": (254_343, 400), "mit": (748_135, 305), "ssv2": (220_847, 174)}
LOOK_UPS = 450_000

_OPEN = """
import sys, time
from pathlib import Path
from benchmarks.index import open_all
began = time.process_time()
open_all(Path(sys.argv[1]), Path(sys.argv[2]))
print(time.process_time() - began)
"""


def write(folder: Path) -> None:
    """Annotation files of the published sizes, with invented names."""
    videos = folder / "videos"
    videos.mkdir(parents=True)
    for name, (size, classes) in SIZES.items():
        (folder / name).mkdir()
        labels = np.random.default_rng(0).integers(0, classes, size)
        lines = [f"{name}/class_{label:03d}/{n:08d}.mp4 {label}\n" for n, label in enumerate(labels)]
        (folder / name / "train.csv").write_text("".join(lines))
        first = videos / lines[0].split(" ")[0]
        first.parent.mkdir(parents=True)
        first.touch()


def open_all(folder: Path, index: Path) -> list[Catalog]:
    """Catalogs of all three."""
    found = []
    for name, (_, classes) in SIZES.items():
        dataset = DatasetConfig(annotations=str(folder / name), videos=str(folder / "videos"), classes=classes)
        found.append(Catalog.open(dataset, name, "train", index))
    return found


class Lists:
    """The baseline."""

    def __init__(self, folder: Path) -> None:
        self.paths: list[str] = []
        self.labels: list[int] = []
        self.meta: dict[int, dict[str, Any]] = {}
        for name in SIZES:
            with open(folder / name / "train.csv") as lines:
                for line in lines:
                    path, label = line.rstrip("\n").split(" ")
                    self.meta[len(self.paths)] = {}
                    self.paths.append(os.path.join(str(folder / "videos"), path))
                    self.labels.append(int(label))

    def __call__(self, n: int) -> tuple[str, int, dict[str, Any]]:
        return self.paths[n], self.labels[n], self.meta[n]


class Mapped:
    """Ours, under one running number."""

    def __init__(self, catalogs: list[Catalog]) -> None:
        self._catalogs = catalogs
        self._ends = np.cumsum([len(c) for c in catalogs]).tolist()

    def __call__(self, n: int) -> tuple[Path, int]:
        at = next(i for i, end in enumerate(self._ends) if n < end)
        catalog = self._catalogs[at]
        n -= self._ends[at - 1] if at else 0
        return catalog.path(n), catalog.labels(n)[0]


def private_bytes() -> int:
    """Private memory of this process: new pages, and pages written to since the fork. Pages of a mapped file belong to the
    page cache."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty")) * 1024


def _worker(look_up: Callable[[int], Any], total: int, seed: int, answers: Any) -> None:
    draws, spent = np.random.default_rng(seed), 0.0
    before = private_bytes()
    for _ in range(LOOK_UPS // 1000):
        numbers = draws.integers(0, total, 1000).tolist()
        began = time.process_time()
        for n in numbers:
            look_up(n)
        spent += time.process_time() - began
    answers.put((private_bytes() - before, spent / LOOK_UPS))


def workers(look_up: Callable[[int], Any], total: int, count: int) -> tuple[float, float]:
    """Growth of the private memory of each of `count` forked workers in MB, and microseconds per look-up."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    gc.collect()
    processes = [context.Process(target=_worker, args=(look_up, total, n, answers)) for n in range(count)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return statistics.mean(f[0] for f in found) / 1e6, statistics.mean(f[1] for f in found) * 1e6


def opened_in_a_new_process(folder: Path, index: Path) -> float:
    """CPU seconds to open all catalogs when the index exists, without imports."""
    command = [sys.executable, "-c", _OPEN, str(folder), str(index)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--full", action="store_true", help="8 workers instead of 2")
    given = parser.parse_args(arguments)
    count, total = 8 if given.full else 2, sum(size for size, _ in SIZES.values())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(folder)
        time.sleep(2.5)  # younger files are read again, for two writes can bear one time
        builds = [cpu_seconds(lambda n=n: open_all(folder, folder / f"index{n}")) for n in range(3)]  # type: ignore[misc]
        build, index = statistics.median(builds), folder / "index0"
        opened = statistics.median(opened_in_a_new_process(folder, index) for _ in range(3))
        mapped = sum(file.stat().st_size for file in index.glob("*.index")) / 1e6
        ours = workers(Mapped(open_all(folder, index)), total, count)
        held: list[Lists] = []
        listed = cpu_seconds(lambda: held.append(Lists(folder)))
        theirs = workers(held[0], total, count)
    rows = [
        row("built once", ours=build, unit="CPU s", target="<= 1 CPU s", note=f"{total:,} lines; names like mit/class_042/00001234.mp4"),
        row("loaded by each rank", ours=opened, baseline=listed, unit="CPU s", target="<= 0.05 CPU s"),
        row("private memory of a worker", ours=ours[0], baseline=theirs[0], unit="MB", target="<= 10 MB",
            note=f"growth in each of {count} forked workers over {LOOK_UPS:,} look-ups of videos at random"),
        row("shared by a node", ours=mapped, unit="MB", target="<= 43 MB",
            note=f"Page cache of the mapped files, whatever the number of workers: {mapped * 1e6 / total:.1f} bytes a video."),
        row("a look-up", ours=ours[1], baseline=theirs[1], unit="CPU µs", note="Ours makes the path anew each time."),
    ]  # fmt: skip
    save("index", rows, size="full" if given.full else "small")


if __name__ == "__main__":
    main()
