"""The device of a rank: its own GPU, or the CPU on a machine without one. A GPU that was granted and cannot be used is an error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from multitrain.config import ConfigError, machine

GRANTS = ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
"""Environment variables that name, or count, the GPUs of a job; the first one is empty where the user wants the CPU."""

NO_GPU = "SLURM_GPUS_ON_NODE=0"
"""The one value among them that grants none."""

AMPERE = (8, 0)
"""Compute capability from which a GPU computes in bf16."""


def granted(environment: Mapping[str, str] = os.environ) -> str | None:
    """What says that this process has a GPU, e.g. ``CUDA_VISIBLE_DEVICES=0``; None if it has none, or shall not use one."""
    if environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return None
    named = [f"{name}={environment[name]}" for name in GRANTS if environment.get(name)]
    return next((n for n in named if n != NO_GPU), None) or machine.device_file()


def rank_device(rank: int, local_rank: int, precision: str = "fp32") -> torch.device:
    """The device of a rank, made the current one.

    Raises:
        ConfigError: the rank has a GPU that this torch cannot use, no GPU of its own, or one without the arithmetic of `precision`.
            With a torch that was built without CUDA, and no device file of a driver, a warning instead: clusters for tests grant
            GPUs that do not exist.
    """
    if not torch.cuda.is_available():
        refuse_unused_gpu(rank)
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"rank {rank} is number {local_rank} on its node, which shows {count} GPUs; ask for as many GPUs as ranks a node (gpus=)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    if precision == "bf16" and torch.version.cuda and torch.cuda.get_device_capability(device) < AMPERE:
        raise ConfigError(
            f"rank {rank}: {torch.cuda.get_device_name(device)} does not compute in bf16 (that begins with Ampere, compute "
            "capability 8.0); use precision=fp16 or fp32"
        )
    return device


def refuse_unused_gpu(rank: int) -> None:
    """Refuse to compute on the CPU beside a granted GPU, as :func:`rank_device` says; there is no usable one."""
    grant = granted()
    if grant is None:
        return
    build = f"torch {torch.__version__}"
    for_gpus = torch.version.cuda or torch.version.hip
    if not for_gpus:
        why = f"{build} is built without CUDA"
        remedy = "install a build for the node's driver (docs/install.md)"
    else:
        why = f"{build}, built for CUDA {torch.version.cuda}, cannot use it ({_reason()}; driver {_driver()})"
        remedy = "install a torch for this driver, or a newer driver"
    text = f"rank {rank} was granted a GPU ({grant}), and {why}; {remedy}, or compute on the CPU with CUDA_VISIBLE_DEVICES="
    if for_gpus or machine.device_file():
        raise ConfigError(text)
    if rank == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _reason() -> str:
    """Why CUDA cannot start, in torch's words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return str(error).split("\n")[0].split(". ")[0].rstrip(".")
    return "no device is visible"


def _driver() -> str:
    """The version of NVIDIA's driver here; "none" without one."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return "none"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def backend(device: torch.device) -> str:
    """The backends of the process group for ranks on devices of this type."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def described(device: torch.device) -> dict[str, str]:
    """``device`` (the GPU's model, or cpu) and ``backend`` (nccl or gloo), as metrics and events have them."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "backend": "nccl"}
    return {"device": "cpu", "backend": "gloo"}
