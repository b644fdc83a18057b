"""Torch, CUDA, driver, GPUs, NCCL and libraries; and that a GPU which torch cannot use is refused."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.results import hardware
from multitrain.config import ConfigError
from multitrain.engine import device

LIBRARIES = (
    "deepspeed",
    "triton",
    "av",
    "decord",
    "numpy",
    "opencv-python-headless",
    "pydantic",
    "safetensors",
    "fvcore",
)
ASKED = "name,driver_version,memory.total,persistence_mode,mig.mode.current,clocks.max.sm,power.limit,compute_cap"


def run(setting: Setting, report: Report) -> None:
    """Facts, NCCL, refusals."""
    report.row(
        "machine",
        hardware(),
        note=f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores for this process",
    )
    report.row("torch", torch.__version__, note=f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for name in LIBRARIES:
        report.row(name, _version(name))
    if setting.cuda:
        _gpus(report)
        _nccl(setting, report)
    _refusals(report)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus(report: Report) -> None:
    for number in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(number)
        note = f"compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors"
        report.row(f"GPU {number}", p.name, note=f"{note}, {p.total_memory / 1e9:.1f} GB")
    report.row("driver", device._driver())
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        report.row("nvidia-smi", asked.stdout.strip() or asked.stderr.strip()[:200], note=ASKED)
    gpu = torch.device("cuda", 0)
    report.row("device of rank 0", str(device.rank_device(0, 0)), ok=device.rank_device(0, 0) == gpu)
    described = device.described(gpu)
    report.row("named as", str(described), ok=described["device"] == torch.cuda.get_device_name(0))


def _nccl(setting: Setting, report: Report) -> None:
    report.row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    join_alone(setting)
    x = torch.full((1 << 20,), 3.0, device=setting.device)
    dist.all_reduce(x)
    rows = [torch.empty_like(x)]
    dist.all_gather(rows, x)
    report.row("all_reduce and all_gather of one rank", ok=bool((rows[0] == 3).all()), note=dist.get_backend())


def join_alone(setting: Setting) -> None:
    """Make this process the only rank of a process group with the engine's backends; once a process, because DeepSpeed keeps its groups."""
    if dist.is_initialized():
        return
    os.environ.update(
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    )
    dist.init_process_group(device.backend(setting.device), store=dist.HashStore(), rank=0, world_size=1)


def _refusals(report: Report) -> None:
    """What `engine/device.py` must refuse, by standing in for torch's answers."""
    cuda: dict[str, Any] = {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda d: None}
    old = {**cuda, "get_device_capability": lambda d=None: (7, 5), "get_device_name": lambda d=None: "an older GPU"}
    grant = {"CUDA_VISIBLE_DEVICES": "0"}
    _refused(
        report, "GPU without a usable driver", 0, {**cuda, "is_available": lambda: False, "init": _no_driver}, grant
    )
    _refused(report, "second rank on one GPU", 1, cuda, grant)
    _refused(report, "bf16 before Ampere", 0, old, grant, "bf16")


def _no_driver() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system. Please check")


def _refused(
    report: Report,
    name: str,
    local_rank: int,
    answers: dict[str, Any],
    environment: dict[str, str],
    precision: str = "fp32",
) -> None:
    with ExitStack() as stack:
        for attribute, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, answer))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        try:
            found = device.rank_device(local_rank, local_rank, precision)
        except ConfigError as error:
            report.row(f"refused: {name}", str(error), ok="\n" not in str(error))
            return
    report.row(f"refused: {name}", f"accepted, on {found}", ok=False)
