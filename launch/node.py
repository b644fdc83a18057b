"""Inspect the node of this process: GPUs, CPUs, memory, disks, libraries. Standard library only."""

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

WRITE_BYTES = 16 << 20
"""Bytes written to measure the speed of the run's folder."""

MAX_READ_BYTES = 32 << 20
"""Limit of bytes of video files read to measure the speed of their folder."""

MIN_READ_BYTES = 1 << 20
"""Fewer bytes than this give no speed: the measurement would be noise."""

READ_SECONDS = 2.0
"""Limit of the time for reading, in seconds."""

MAX_LISTED_FILES = 400
"""Limit of video files listed; each rank reads its own share of them."""

LIBRARIES = ("multitrain", "torch", "deepspeed", "numpy", "av", "decord", "opencv-python-headless")
"""Packages whose versions must be the same on all nodes, beside :data:`NCCL`."""

NCCL = "nvidia-nccl-"
"""Beginning of the name of NCCL's package, which ends with the version of CUDA."""


def name(environment: Mapping[str, str] = os.environ) -> str:
    """The node's name in SLURM, else its host name (virtual nodes share a host name)."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def collect(rank_env: Mapping[str, str], folder: Path, videos: Sequence[str] = ()) -> dict[str, Any]:
    """The preflight row of this rank. A check that fails adds a text to ``problems`` and raises nothing.

    Args:
        rank_env: RANK and LOCAL_RANK of the rank.
        folder: the run's folder; the first rank of a node times a write, an fsync and a rename there.
        videos: folders of video files, from which every rank reads.
    """
    problems: list[str] = []
    cores = sorted(os.sched_getaffinity(0))
    first = os.environ.get("SLURM_LOCALID", rank_env["LOCAL_RANK"]) == "0"
    row: dict[str, Any] = {
        "rank": int(rank_env["RANK"]),
        "node": name(),
        **gpu(int(rank_env["LOCAL_RANK"])),
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
            speed_of_root = read_speed(Path(root), int(rank_env["RANK"]))
            speeds += [speed_of_root] if speed_of_root is not None else []
        except OSError as error:
            problems.append(f"cannot read videos in {root} ({error.strerror or error}); is it mounted there?")
    if speeds:
        row["read_MB_s"] = round(min(speeds) / 2**20)
    return row | {"problems": problems}


def gpu(index: int) -> dict[str, Any]:
    """The part of a row about the GPU with this index among the visible ones.

    ``gpu``: its number and, if `nvidia-smi` lists it, the beginning of its UUID; "none" without a GPU. ``gpus``: number of GPUs
    that the rank can see. ``missing``: numbers that are in CUDA_VISIBLE_DEVICES, but not in the output of `nvidia-smi`.
    ``model``, ``driver``, ``used_GB``: of this GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    granted = [d for d in visible.split(",") if d] if visible is not None else None
    known = _installed()
    if known is None:  # no nvidia-smi: trust CUDA_VISIBLE_DEVICES
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
    except (OSError, subprocess.TimeoutExpired):  # it is installed and fails, so the GPUs do not work either
        return {}
    rows = [dict(zip(fields, line.split(", "))) for line in done.stdout.splitlines() if line.count(", ") >= 4]
    return {row[key]: row for row in rows for key in ("index", "uuid")}


def versions() -> dict[str, str]:
    """Versions of Python and of the installed :data:`LIBRARIES`."""
    found = {"python": platform.python_version()}
    nccl = sorted({d.name for d in importlib.metadata.distributions() if (d.name or "").startswith(NCCL)})
    for package in (*LIBRARIES, *nccl):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_speed(folder: Path) -> tuple[float, float]:
    """Write a file to `folder` as a checkpoint does: bytes per second including fsync, and seconds of a durable rename."""
    block = os.urandom(1 << 20)
    file, path = tempfile.mkstemp(dir=folder, prefix=".preflight-")
    try:
        begin = time.perf_counter()
        for _ in range(WRITE_BYTES // len(block)):
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
        return WRITE_BYTES / (written - begin), time.perf_counter() - written
    finally:
        os.close(file)
        os.unlink(path)


def read_speed(root: Path, rank: int) -> float | None:
    """Bytes per second of reading files below `root`, past the page cache where the system allows it; other files for each rank.

    None when there are too few bytes for a measurement.

    Raises:
        OSError: the folder does not exist, or holds no file.
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
            while total < MAX_READ_BYTES and (piece := os.read(descriptor, 1 << 20)):
                total += len(piece)
        finally:
            os.close(descriptor)
        if total >= MAX_READ_BYTES or time.perf_counter() - begin > READ_SECONDS:
            break
    return total / (time.perf_counter() - begin) if total >= MIN_READ_BYTES else None


def _some_files(root: Path) -> list[str]:
    """Up to MAX_LISTED_FILES files below `root`, in a fixed order, without walking the whole tree."""
    found: list[str] = []
    folders = [str(root)]
    while folders and len(found) < MAX_LISTED_FILES:
        with os.scandir(folders.pop(0)) as entries:
            for entry in sorted(entries, key=lambda e: e.name)[:MAX_LISTED_FILES]:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
    return found[:MAX_LISTED_FILES]


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` → ``0-2,5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
