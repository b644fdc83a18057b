"""What one process can find out about the node it runs on: GPUs, CPUs, memory, disks, libraries. Standard library only."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WRITTEN = 16 << 20
"""Bytes written to measure the speed of the run's folder."""

READ = 32 << 20
"""Bytes of video files read at most to measure the speed of their folder."""

LITTLE = 1 << 20
"""Bytes read below which a speed says nothing."""

READ_SECONDS = 2.0
"""Seconds that reading takes at most."""

SEEN_FILES = 400
"""Video files looked at, of which each rank reads its own share."""

LIBRARIES = ("multitrain", "torch", "deepspeed", "numpy", "av", "decord", "opencv-python-headless", "nvidia-nccl-cu12")
"""Packages whose versions must be the same on all nodes."""


def name(environment: Mapping[str, str] = os.environ) -> str:
    """The node's name as SLURM uses it (virtual nodes share a host name)."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def look(place: Mapping[str, str], folder: Path, videos: Sequence[str] = ()) -> dict[str, Any]:
    """The row of this rank. What fails is a text under ``problems``, not an exception.

    Args:
        place: of the rank: RANK, LOCAL_RANK.
        folder: the run's; the first rank of a node times a write, an fsync and a rename there.
        videos: folders of video files, from which every rank reads.
    """
    problems: list[str] = []
    cores = sorted(os.sched_getaffinity(0))
    first = os.environ.get("SLURM_LOCALID", place["LOCAL_RANK"]) == "0"
    row: dict[str, Any] = {
        "rank": int(place["RANK"]),
        "node": name(),
        **gpu(int(place["LOCAL_RANK"])),
        "cpus": len(cores),
        "cores": os.cpu_count(),
        "affinity": ranges(cores),
        "shm_free_GB": round(shutil.disk_usage("/dev/shm").free / 2**30, 2) if os.path.isdir("/dev/shm") else 0.0,
        "versions": versions(),
        "read_MB_s": None,
        "write_MB_s": None,
        "rename_ms": None,
    }
    if first:
        try:
            speed, rename = write_speed(folder)
            row |= {"write_MB_s": round(speed / 2**20), "rename_ms": round(1e3 * rename, 1)}
        except OSError as error:
            problems.append(f"cannot write to {folder} ({error.strerror or error}); is it a shared, writable disk?")
    speeds: list[float] = []
    for root in videos:
        try:
            speed_of_root = read_speed(Path(root), int(place["RANK"]))
            speeds += [speed_of_root] if speed_of_root is not None else []
        except OSError as error:
            problems.append(f"cannot read videos in {root} ({error.strerror or error}); is it mounted there?")
    if speeds:
        row["read_MB_s"] = round(min(speeds) / 2**20)
    return row | {"problems": problems}


def gpu(index: int) -> dict[str, Any]:
    """The GPU that a rank uses which is to take number `index` of those it can see.

    ``gpu``: number and, where `nvidia-smi` tells it, the beginning of its UUID; "none" without one. ``gpus``: how many the
    node shows to the rank. ``missing``: numbers that CUDA_VISIBLE_DEVICES has and `nvidia-smi` has not. ``model``,
    ``driver``, ``used_GB``: of the rank's own GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    granted = [d for d in visible.split(",") if d] if visible is not None else None
    known = _installed()
    if known is None:  # no nvidia-smi: believe what was granted
        device = granted[index] if granted and index < len(granted) else "none"
        return {"gpu": device, "gpus": len(granted or ()), "missing": [], "model": "", "driver": "", "used_GB": None}
    here = granted if granted is not None else [g["index"] for g in known.values() if g["index"].isdigit()]
    missing = [d for d in here if d not in known]
    device = here[index] if index < len(here) else "none"
    found = known.get(device, {})
    uuid = found.get("uuid", "").removeprefix("GPU-")[:8]
    return {
        "gpu": f"{device} ({uuid})" if uuid else f"{device} (missing)" if device in missing else "none",
        "gpus": len(here) - len(missing),
        "missing": missing,
        "model": found.get("name", ""),
        "driver": found.get("driver_version", ""),
        "used_GB": round(float(found["memory.used"]) / 1024, 1) if found.get("memory.used", "").isdigit() else None,
    }


def gpus_here() -> int:
    """GPUs that a process on this machine may use; 0 without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d])
    return len({g["uuid"] for g in (_installed() or {}).values()})


def _installed() -> dict[str, dict[str, str]] | None:
    """The node's GPUs by number and by UUID, as `nvidia-smi` lists them; None without it."""
    fields = ("index", "uuid", "name", "driver_version", "memory.used")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired):  # it is there and does not work, and neither do the GPUs
        return {}
    rows = [dict(zip(fields, line.split(", "))) for line in done.stdout.splitlines() if line.count(", ") >= 4]
    return {row[key]: row for row in rows for key in ("index", "uuid")}


def versions() -> dict[str, str]:
    """Python, the kernel and the libraries that are installed."""
    found = {"python": platform.python_version()}
    for package in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second of writing one file to disk in `folder`, and the seconds of an fsynced rename, as a checkpoint does."""
    block = os.urandom(1 << 20)
    file, path = tempfile.mkstemp(dir=folder, prefix=".preflight-")
    try:
        begin = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            os.write(file, block)
        os.fsync(file)
        written = time.perf_counter()
        os.rename(path, path + ".new")
        path += ".new"
        directory = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems refuse to sync a folder
                os.fsync(directory)
        finally:
            os.close(directory)
        return WRITTEN / (written - begin), time.perf_counter() - written
    finally:
        os.close(file)
        os.unlink(path)


def read_speed(root: Path, rank: int) -> float | None:
    """Bytes a second of reading files below `root`, others for each rank, past the page cache where the system allows;
    None for so few bytes that it says nothing.

    Raises:
        OSError: the folder is not there, or has no file in it.
    """
    files = _some_files(root)
    if not files:
        raise OSError(f"no file in {root}")
    share = files[rank % len(files) :] + files[: rank % len(files)]
    begin = time.perf_counter()
    total = 0
    for file in share:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while total < READ and (piece := os.read(descriptor, 1 << 20)):
                total += len(piece)
        finally:
            os.close(descriptor)
        if total >= READ or time.perf_counter() - begin > READ_SECONDS:
            break
    return total / (time.perf_counter() - begin) if total >= LITTLE else None


def _some_files(root: Path) -> list[str]:
    """Up to SEEN_FILES files below `root`, in a fixed order, without walking all of it."""
    found: list[str] = []
    folders = [str(root)]
    while folders and len(found) < SEEN_FILES:
        with os.scandir(folders.pop(0)) as entries:
            for entry in sorted(entries, key=lambda e: e.name)[:SEEN_FILES]:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
    return found[:SEEN_FILES]


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` → ``0-2,5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
