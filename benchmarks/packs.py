"""Pack a million videos: number of files, seconds, bytes of the index, memory of many loader processes, time to the first sample.

    python -m benchmarks.packs --videos 1223325 --processes 64 --folder /tmp/million

Generates a few tiny videos, gives each many names by hard links, packs all, and opens the pack in many processes. The folder must be
new; it is removed at the end, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.data.decode import open_video
from multitrain.data.encode import write_video
from multitrain.data.packs import INDEX, open_pack, read

_NAMES = 20_000  # hard links of one file; file systems allow 32,000 or more


def make(folder: Path, count: int) -> None:
    """`count` videos in class folders, and a csv sorted by class."""
    originals = folder / "originals"
    originals.mkdir(parents=True)
    with open(folder / "train.csv", "w") as csv:
        for i in range(count):
            original = originals / f"{i // _NAMES}.mp4"
            if i % _NAMES == 0:
                with write_video(original, 25.0) as writer:
                    writer.add(np.full((16, 16, 3), i // _NAMES, np.uint8), 0.0)
            name = f"class {i // 2000:04d}/video_{i:07d}.mp4"
            if i % 2000 == 0:
                (folder / "videos" / name).parent.mkdir(parents=True)
            os.link(original, folder / "videos" / name)
            csv.write(f"{name} {i // 2000}\n")


def kilobytes(pid: int) -> dict[str, int]:
    """Private, shared and proportional kB of a process's mapping of the index."""
    sums = {"Private_Clean": 0, "Private_Dirty": 0, "Shared_Clean": 0, "Pss": 0}
    wanted = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            wanted = line.endswith(INDEX)
        elif wanted and (field := line.split(":", 1)[0]) in sums:
            sums[field] += int(line.split()[1])
    return sums


def serve(pipe: Connection, folder: str, names: list[str]) -> None:
    """A loader process: opens the pack, finds and reads some videos."""
    began = time.perf_counter()
    pack = open_pack(Path(folder))
    assert pack is not None
    opened = time.perf_counter() - began
    with open_video(Path(folder) / names[0]) as video:
        video.frames([0])
    first = time.perf_counter() - began
    began = time.process_time()
    for name in names:
        pack.find(name)
    finding = (time.process_time() - began) / len(names)
    for name in names[:100]:
        read(Path(folder) / name)
    pipe.send((opened, first, finding))
    pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--videos", type=int, default=1_223_325)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir()
    try:
        print(json.dumps(measure(given.folder, given.videos, given.processes), indent=1))
    finally:
        if not given.keep:
            shutil.rmtree(given.folder)


def measure(folder: Path, videos: int, processes: int) -> dict[str, Any]:
    """All results; the names give the units."""
    make(folder, videos)
    out = folder / "packed"
    command = [sys.executable, "-m", "multitrain.cli", "data", "pack", folder / "videos", out, "--annotations", folder]
    began = time.perf_counter()
    subprocess.run([str(c) for c in command], check=True)
    packing = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    names = (folder / "train.csv").read_text().splitlines()
    rng = np.random.default_rng(0)
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(processes):
        ours, theirs = context.Pipe()
        some = [names[i].rsplit(" ", 1)[0] for i in rng.integers(0, videos, 2000)]
        workers.append(context.Process(target=serve, args=(theirs, str(out), some), daemon=True))
        workers[-1].start()
        pipes.append(ours)
    said = np.array([pipe.recv() for pipe in pipes])
    memory = [kilobytes(w.pid or 0) for w in workers]
    for pipe, worker in zip(pipes, workers):
        pipe.send(None)
        worker.join()
    return {
        "videos": videos,
        "files in the pack": sum(len(files) for _, _, files in os.walk(out)),
        "seconds to pack": packing,
        "kB of the largest packing process": peak,
        "bytes of the index": (out / INDEX).stat().st_size,
        "ms to open the index, median": 1e3 * float(np.median(said[:, 0])),
        "ms to the first frame, median": 1e3 * float(np.median(said[:, 1])),
        "µs CPU to find a video": 1e6 * float(np.median(said[:, 2])),
        f"kB private of the index, all {processes} processes": sum(
            m["Private_Clean"] + m["Private_Dirty"] for m in memory
        ),
        f"kB of the index, all {processes} processes (proportional)": sum(m["Pss"] for m in memory),
    }


if __name__ == "__main__":
    main()
