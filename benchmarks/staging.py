"""What staged copies cost and save on this machine: copying, reading one video, looking ahead.

    python -m benchmarks.staging --folder /tmp/staging --stage /tmp

Reads come from the page cache, so that the figures are the software's share of the time. With multitrain[remote], the same videos are
also read by ranges from a web server in another process. The folder has to be new; it is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.packs import make
from multitrain.config import DatasetConfig
from multitrain.data import packs, remote
from multitrain.data.catalog import Catalog
from multitrain.data.shards_ahead import Job, Needs
from multitrain.data.staging import Staging
from multitrain.order import BatchShape, Plan, Source

VIDEOS, BYTES, BATCH = 2_000, 250_000, 512
_SERVER = """
import sys, time; sys.path.insert(0, "tests"); from pathlib import Path; from tests.object_store import serving
with serving(Path(sys.argv[1])) as server: print(server.url, flush=True); time.sleep(600)
"""


def packed(folder: Path, videos: int, shard_videos: int, *, tiny: bool) -> Path:
    """A pack of so many videos, of `BYTES` bytes each unless `tiny`."""
    if tiny:
        make(folder, videos)
    else:
        (folder / "videos").mkdir(parents=True)
        for i in range(videos):
            (folder / "videos" / f"{i}.mp4").write_bytes(os.urandom(BYTES))
        (folder / "train.csv").write_text("".join(f"{i}.mp4 0\n" for i in range(videos)))
    words = ["--annotations", str(folder), "--shard-videos", str(shard_videos)]
    command = [sys.executable, "-m", "multitrain", "data", "pack", str(folder / "videos"), str(folder / "pack"), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "pack"


def job(folder: Path, stage: str, shard_videos: int, window: int | None) -> Job:
    """The job of a node that trains on this one pack."""
    dataset = DatasetConfig(annotations=str(folder), videos=str(folder / "pack"), classes=10**6)
    catalog = Catalog.open(dataset, "a", "train", folder / "index")
    plan = Plan(
        [Source("a", len(catalog))], seed=0, effective_batch=BATCH, shuffle_window=window, shard_videos=shard_videos
    )
    return Job(stage, 10**12, plan, {"a": catalog}, BatchShape(BATCH, 1, 4, BATCH // 4), range(1), 0, 400)


def each(read: Callable[[Path], object], paths: list[Path]) -> dict[str, float]:
    """Median microseconds of wall time, and mean CPU microseconds, of reading a video."""
    read(paths[0])
    walls, cpu = [], time.process_time()
    for path in paths:
        began = time.perf_counter()
        read(path)
        walls.append(time.perf_counter() - began)
    return {"wall_us": 1e6 * statistics.median(walls), "cpu_us": 1e6 * (time.process_time() - cpu) / len(paths)}


def measure(folder: Path, stage: Path) -> dict[str, Any]:
    """All figures."""
    pack = packed(folder / "a", VIDEOS, 100, tiny=False)
    given = job(folder / "a", str(stage), 100, None)
    paths = [pack / f"{i}.mp4" for i in np.random.default_rng(0).permutation(VIDEOS)[:500]]
    found: dict[str, Any] = {"shards": each(packs.read, paths)}
    began, staging = time.perf_counter(), Staging(given)
    copies = stage / f"multitrain-stage-{os.getuid()}"
    while len(list(copies.glob("*/*.staged"))) < VIDEOS // 100:
        time.sleep(0.005)
    found["copy_MB_s"] = VIDEOS * BYTES / 1e6 / (time.perf_counter() - began)
    packs.use_stage(str(stage))
    found["staged"] = each(packs.read, paths)
    packs.use_stage(None)
    staging.reached(0)
    staging.close(done=True)
    found["server"] = on_server(pack, paths)
    packed(folder / "b", 200_000, 1000, tiny=True)
    needs = Needs(job(folder / "b", str(stage), 1000, 64))
    began = time.process_time()
    for update in range(200):
        needs.of(update)
    found["ahead_cpu_ms_an_update"] = 1e3 * (time.process_time() - began) / 200
    return found


def on_server(pack: Path, paths: list[Path]) -> dict[str, float] | None:
    """The same reads from a web server in another process; None without the libraries."""
    try:
        remote.preload("http://")
    except ValueError:
        return None
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(pack)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        packs.at_address(pack, server.stdout.readline().strip())
        return each(packs.read, paths)
    finally:
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--stage", type=Path, required=True, help="folder on the disk for the copies")
    given = parser.parse_args()
    given.folder.mkdir()
    try:
        print(json.dumps(measure(given.folder, given.stage), indent=1))
    finally:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
