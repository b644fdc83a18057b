"""Signs of GPUs on this machine, without torch."""

from __future__ import annotations

from pathlib import Path

DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Files that a driver of GPUs makes."""


def device_file() -> str | None:
    """The first of :data:`DEVICE_FILES` that is there; None on a machine without a driver of GPUs."""
    return next((path for path in DEVICE_FILES if Path(path).exists()), None)
