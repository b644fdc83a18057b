"""What this machine has, without torch: cores, GPUs, SLURM, and this program."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Files that a driver of GPUs makes."""

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU."""


def device_file() -> str | None:
    """The first of :data:`DEVICE_FILES` that is there; None on a machine without a driver of GPUs."""
    return next((path for path in DEVICE_FILES if Path(path).exists()), None)


def gpu_count(environment: Mapping[str, str] = os.environ) -> int:
    """Number of GPUs that this process may use, by CUDA_VISIBLE_DEVICES and the files of the driver; 0 without a driver."""
    driver = device_file()
    if driver is None:
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible.strip() in HIDDEN else len(visible.split(","))
    names = os.listdir("/dev")
    pattern = r"renderD[0-9]+" if driver == "/dev/kfd" else r"nvidia[0-9]+"
    if driver == "/dev/kfd":
        names = os.listdir("/dev/dri") if os.path.isdir("/dev/dri") else []
    return max(1, sum(re.fullmatch(pattern, name) is not None for name in names))


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def has_slurm(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether jobs of SLURM can be submitted here, or this is one. Programs of SLURM without the settings of a cluster do not count."""
    return "SLURM_JOB_ID" in environment or (shutil.which("sbatch") is not None and _is_configured())


@functools.cache
def _is_configured() -> bool:
    """Whether SLURM's programs know a cluster; a cluster that does not answer counts."""
    try:
        done = subprocess.run(
            ["sinfo", "-h"], capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "configuration source" not in done.stderr


def own_command() -> list[str]:
    """The words that call `multitrain` of this environment from the shell: the plain name, if that is what it stands for."""
    found = shutil.which("multitrain")
    is_own = found is not None and Path(found).parent == Path(sys.executable).parent
    return ["multitrain"] if is_own else [sys.executable, "-m", "multitrain"]
