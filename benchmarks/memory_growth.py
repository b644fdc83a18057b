"""Memory of a rank and of its loader worker over a long run with validations: python -m benchmarks.memory_growth [--full]

A real run of a tiny network on the demo's datasets, with TensorBoard and its pictures; its memory is read from outside after every
update. The memory of a run of two weeks must not grow, so the result is the slope of the peak after the first updates, in which
everything is used for the first time. `--large` measures the memory of one clip of 8K in a worker instead.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import plot, row, save
from multitrain.config import dump, validate
from multitrain.data.catalog import open_catalogs, sources
from multitrain.data.clips import Clip, TrainClipFn
from multitrain.data.decode import open_video
from multitrain.data.demo import CLASSES, generate
from multitrain.data.pool import configure_worker
from multitrain.data.views import load_views
from multitrain.order import Plan
from tests.support import start_ranks

MODEL = {"frames": 4, "crop": 32, "depth": 2, "width": 16, "heads": 1, "stages": [1], "kv_stride": 4}
CLIPS = {"train": 60, "val": 24, "test": 1}
"""Videos of each dataset."""
FIRST = 300
"""Updates after which the slope is measured."""
SAVED = 100
"""Updates between two checkpoints."""

Points = list[tuple[float, float]]
"""(completed updates, MB)."""


def write_run(folder: Path, data: Path, updates: int, validations: int, ranks: int) -> Path:
    """Create the folder of a run of `updates` updates with `validations` validations."""
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
        "eval": {"every": updates // validations, "val_stride": 1, "videos_per_batch": 16},
        "checkpoint": {"every": SAVED, "keep": 2},
        "monitor": {"tensorboard": True, "log_every": 100},
    }
    run = folder / "long"
    run.mkdir()
    (run / "config.yaml").write_text(dump(validate(settings)))
    return run


def slope(points: Points) -> float:
    """Least-squares growth in MB per 100 updates after :data:`FIRST` of them."""
    x, y = np.array([p for p in points if p[0] >= FIRST]).T
    return float(np.polyfit(x, y, 1)[0] * 100)


def peak(points: Points) -> Points:
    """The running maximum of the points."""
    most = np.maximum.accumulate([mb for _, mb in points])
    return [(update, float(mb)) for (update, _), mb in zip(points, most)]


def resident(pid: int) -> float | None:
    """Resident memory of a process in MB; None if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, oldest first."""
    found = [p.read_text().split() for p in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(int(child) for some in found for child in some)


def watch(run: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> dict[str, Points]:
    """Resident memory of every rank, and of the worker that reads rank 0's training videos, until the run ends."""
    pids = {f"rank {number}": process.pid for number, process in enumerate(ranks)}
    seen: dict[str, Points] = {}
    metrics, read, done = run / "metrics.jsonl", 0, 0
    while all(process.poll() is None for process in ranks):
        time.sleep(0.05)
        if not metrics.is_file() or metrics.stat().st_size == read:
            continue
        with open(metrics, "rb") as file:
            file.seek(read)
            new = file.read()
        read, done = read + len(new), done + new.count(b"\n")
        if "a loader worker" not in pids:  # the first child keeps the workers
            pids["a loader worker"] = children(children(ranks[0].pid)[0])[0]
        for name, pid in pids.items():
            mb = resident(pid)
            if mb:
                seen.setdefault(name, []).append((done, mb))
    return seen


def measure(data: Path, updates: int, validations: int, ranks: int) -> dict[str, Points]:
    """Measure one complete run."""
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder), data, updates, validations, ranks)
        log = Path(folder) / "log"
        processes = start_ranks(["-m", "multitrain.train", str(run)], ranks, log=log, anew=True)
        try:
            seen = watch(run, processes)
            codes = [process.wait(60) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}: {log.read_text()[-2000:]}")
    return seen


X265 = "log-level=error:pools=1:frame-threads=1:keyint=12"
LARGE = {
    "MPEG-4": ("mpeg4", "yuv420p", {"g": "12", "qmin": "4", "qmax": "4"}),
    "H.264, 4 reference frames": (
        "libx264",
        "yuv420p",
        {"preset": "ultrafast", "x264-params": "ref=4:bframes=0:keyint=12"},
    ),
    "HEVC of 10 bit": ("libx265", "yuv420p10le", {"preset": "ultrafast", "x265-params": f"{X265}:bframes=0:ref=1"}),
}
"""8K files: codec, pixel format, options."""


def write_large(path: Path, codec: str, kind: str, options: dict[str, str], frames: int = 34) -> None:
    """A file of 7680×4320."""
    import av

    grains = np.random.default_rng(0).integers(0, 256, (frames, 144, 256, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 7680, 4320, kind
        for grain in grains:
            picture = av.VideoFrame.from_ndarray(grain.repeat(30, 0).repeat(30, 1), format="rgb24")
            container.mux(stream.encode(picture.reformat(format=kind)))
        container.mux(stream.encode())


def peaks(path: Path) -> dict[str, float]:
    """Peak memory of this process in MB, beyond that before, for: the decoder alone, training clips, test views."""
    settings: dict[str, Any] = {
        name: {} for name in ("cluster", "loss", "engine", "optim", "eval", "checkpoint", "monitor")
    }
    data = {"annotations": str(path.parent), "videos": "/", "classes": 1}
    settings |= {"data": {"datasets": {"d": data}, "decode_timeout": 600.0}, "model": {"frames": 10}}
    config = validate(settings | {"augment": {"copies": 2}})
    dataset = config.data.datasets["d"]
    (path.parent / "train.csv").write_text(f"{path} 0\n")
    catalogs = open_catalogs(config.data, "train", path.parent / "index")
    job = TrainClipFn(catalogs, Plan(sources(config.data, catalogs), seed=0, effective_batch=2, group=2), config)
    clips = np.ones(job.shape, np.uint8)

    def decode() -> None:
        with open_video(path) as video:
            for _ in video.pictures(range(0, video.frame_count, 3)):
                pass

    def train() -> None:
        for seed in range(4):
            job.read(path, Clip(dataset, (seed, "d", 0, 0), config.model.frames), clips)

    calls = {"decoder": decode, "training": train, "test": lambda: load_views(path, dataset, config.data, config.model)}
    found = {}
    for name, call in calls.items():
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident(os.getpid()) or 0.0
        call()
        text = Path("/proc/self/status").read_text()
        found[name] = int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6 - before
    return found


def large() -> None:
    """Measure clips of 8K, each codec in a separate process, and save."""
    rows = []
    for name, (codec, kind, options) in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"
            write_large(path, codec, kind, options)
            with ProcessPoolExecutor(1, get_context("spawn"), initializer=configure_worker) as pool:
                found = pool.submit(peaks, path).result()
        note = f"{found['decoder']:.0f} MB of it is what the decoder alone holds"
        for clip in ("training", "test"):
            figure = f"peak memory of a {clip} clip of 8K, {name}"
            rows.append(row(figure, ours=found[clip], unit="MB", target="< 400 MB", note=note))
    save("memory_large", rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_growth", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="3,000 updates and 30 validations, instead of 500 and 10")
    parser.add_argument("--ranks", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--large", action="store_true", help="one clip of 8K instead")
    given = parser.parse_args(arguments)
    if given.large:
        large()
        return
    updates, validations = (3000, 30) if given.full else (500, 10)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "demo"
        generate(data, clips=dict.fromkeys(CLASSES, CLIPS), processes=1)
        seen = measure(data, updates, validations, given.ranks)
    rows, unit = [], "MB per 100 updates"
    for name, points in seen.items():
        most = peak(points)
        note = f"{updates} updates, {validations} validations; {most[0][1]:.0f} MB at first, {most[-1][1]:.0f} MB at the end"
        figure = f"growth of the peak memory of {name} after {FIRST} updates"
        rows.append(row(figure, ours=slope(most), unit=unit, target=f"< 1 {unit}", note=note))
    lines = {name: points[:: max(1, len(points) // 300)] for name, points in seen.items()}
    drawn = plot("Memory: resident, over the updates of a run", "updates", "MB", lines)
    save("memory_growth", rows, size="full" if given.full else "small", plots=[drawn])


if __name__ == "__main__":
    main()
