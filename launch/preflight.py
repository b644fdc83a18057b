"""Look at the nodes before a run depends on them: one row a rank, and a complaint for what cannot go well.

python launch/preflight.py [--dir DIR]           this machine
srun python -m launch.preflight --dir DIR        every rank of an allocation
python launch/submit.py … preflight=true         before the run starts, in the same job
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from typing import Any

from multitrain.monitor.slurm import rank_environment

WRITTEN = 16 << 20
"""Bytes written to measure the speed of the run's folder."""

PATIENCE = 120.0
"""Seconds that rank 0 waits for the rows of the others."""

SHARED_MEMORY = 1 << 30
"""Free bytes in /dev/shm below which loader workers are likely to die of a bus error."""

COLUMNS = ("rank", "node", "gpu", "cpus", "affinity", "shm_free_GB", "write_MB_s")


def main(arguments: list[str] | None = None) -> int:
    """Print the table on rank 0; 1 when a rank is missing or cannot work."""
    parser = argparse.ArgumentParser(prog="preflight", description="Check the nodes that ranks are placed on.")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder whose writing is timed (the run's)")
    folder = parser.parse_args(arguments).dir
    place = rank_environment()
    rank, world = int(place["RANK"]), int(place["WORLD_SIZE"])
    start = "-".join(os.environ.get(f"SLURM_{n}", "0") for n in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    board = folder / "logs" / f"preflight-{start}" if world > 1 else Path(tempfile.mkdtemp())
    try:
        board.mkdir(parents=True, exist_ok=True)
        _post(board, look(place, folder))
        if rank != 0:
            return 0
        rows = _collect(board, world)
    except OSError as error:
        print(f"preflight: rank {rank} on {_node()}: {error}; is {folder} on a shared, writable disk?", file=sys.stderr)
        return 1
    print(table(rows))
    problems = complaints(rows, world)
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr)
    shutil.rmtree(board, ignore_errors=True)
    return 1 if problems else 0


def look(place: dict[str, str], folder: Path) -> dict[str, Any]:
    """The row of this rank."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "rank": int(place["RANK"]),
        "node": _node(),
        "gpu": _gpu(int(place["LOCAL_RANK"])),
        "cpus": len(cores),
        "affinity": ranges(cores),
        "shm_free_GB": round(shutil.disk_usage("/dev/shm").free / 2**30, 1) if os.path.isdir("/dev/shm") else 0.0,
        "write_MB_s": round(_write_speed(folder) / 2**20),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    lines = [COLUMNS, *([str(row[c]) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def complaints(rows: list[dict[str, Any]], world: int) -> list[str]:
    """What cannot go well, one line each."""
    found = []
    absent = sorted(set(range(world)) - {row["rank"] for row in rows})
    if absent:
        found.append(f"no word within {PATIENCE:g} s from ranks {ranges(absent)}; look at their logs")
    owners: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["gpu"] != "none":
            first = owners.setdefault((row["node"], row["gpu"]), row["rank"])
            if first != row["rank"]:
                found.append(
                    f"ranks {first} and {row['rank']} share GPU {row['gpu']} of {row['node']}; use one task a GPU"
                )
        if row["shm_free_GB"] * 2**30 < SHARED_MEMORY:
            found.append(
                f"/dev/shm of {row['node']} has {row['shm_free_GB']} GB free; loader workers need 1 GB or more"
            )
    if len({row["gpu"] == "none" for row in rows}) > 1:
        blind = [row["rank"] for row in rows if row["gpu"] == "none"]
        found.append(f"ranks {ranges(blind)} see no GPU while others do; exclude their nodes: cluster.exclude=…")
    return list(dict.fromkeys(found))


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` → ``0-2,5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _gpu(index: int) -> str:
    """The UUID-like identity of the GPU that this rank will use, shortened; the device number without `nvidia-smi`."""
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    device = visible[index] if index < len(visible) else None
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return device or "none"
    known = dict(line.split(", ") for line in done.stdout.splitlines() if ", " in line)
    wanted = device if device is not None else str(index) if "CUDA_VISIBLE_DEVICES" not in os.environ else None
    if wanted is None or not known:
        return "none"
    uuid = known.get(wanted, wanted)
    return f"{wanted} ({uuid.removeprefix('GPU-')[:8]})" if uuid != wanted else wanted


def _write_speed(folder: Path) -> float:
    """Bytes a second of writing one file to disk in `folder`, as a checkpoint does."""
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
        begin = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / (time.perf_counter() - begin)


def _post(board: Path, row: dict[str, Any]) -> None:
    new = board / f".{row['rank']}.new"
    new.write_text(json.dumps(row))
    new.rename(board / f"{row['rank']}.json")


def _collect(board: Path, world: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + PATIENCE
    while len(files := list(board.glob("[0-9]*.json"))) < world and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted((json.loads(f.read_text()) for f in files), key=lambda row: row["rank"])


if __name__ == "__main__":
    sys.exit(main())
