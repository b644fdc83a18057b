"""Faults for the test of the check: each must be noticed by its section. Only tests/benchmarks/test_gpu_check.py plants them.

`python -m benchmarks.gpu_check.plants [NAME …]` has each section run with its fault, on the CPU, and prints what failed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Patch = tuple[Any, str, Any]


def _driver() -> list[Patch]:
    from multitrain.engine import device

    return [(device, "refuse_unused_gpu", lambda rank: None)]


def _scaled(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """`function`, with its first result times `factor`."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out * factor if isinstance(out, torch.Tensor) else (out[0] * factor, *out[1:])

    return changed


def _informative() -> list[Patch]:
    from multitrain.loss import total

    return [(total, "informative_loss", _scaled(total.informative_loss, 1.01))]


def _block() -> list[Patch]:
    from multitrain.model import block

    return [(block, "skip_pool_backward", _scaled(block.skip_pool_backward, 1.01))]


def _noise() -> list[Patch]:
    """A backward pass with random rounding, as atomics have."""
    from multitrain.model import block

    real = block.head_pool_backward

    def noisy(*args: Any) -> Any:
        grad, filters = real(*args)
        return grad, filters + 1e-6 * filters.abs().max() * torch.rand_like(filters)

    return [(block, "head_pool_backward", noisy)]


def _moments() -> list[Patch]:
    """A checkpoint whose moments come back as zeros."""
    import shutil

    from benchmarks.gpu_check import resume
    from multitrain.engine import checkpoint

    real = resume._take_away

    def take_away(run: Path, to: Path) -> None:
        real(run, to)
        folder = checkpoint.folder_of(run / "checkpoints", resume.HALF)
        held = checkpoint.read(folder)
        weights, moments = (
            {n: t.clone() for n, t in held.weights.items()},
            {n: torch.zeros_like(t) for n, t in held.moments.items()},
        )
        shutil.rmtree(folder)
        checkpoint.write(
            run / "checkpoints", checkpoint.Checkpoint(weights, moments, held.state), (run / "config.yaml").read_text()
        )

    return [(resume, "_take_away", take_away)]


def _pooling() -> list[Patch]:
    from multitrain.model import pooling

    return [(pooling, "head_pool_backward", _scaled(pooling.head_pool_backward, 1.01))]


def _memory() -> list[Patch]:
    from launch import memory_estimate

    return [(memory_estimate, "clip_bytes", lambda model, mode: 1e9)]


def _surrogate() -> list[Patch]:
    from multitrain.engine import update

    real = update.embedding_gradient

    def changed(*args: Any) -> Any:
        value, gradient = real(*args)
        return value, gradient * 1.01

    return [(update, "embedding_gradient", changed)]


def _item() -> list[Patch]:
    from multitrain.loss import total

    real = total.clip_losses

    def reads(*args: Any) -> Any:
        out = real(*args)
        return out if float(out.detach().sum()) >= 0 else out * 0

    return [(total, "clip_losses", reads)]


def _idle() -> list[Patch]:
    from benchmarks.gpu_check import kernels

    return [(kernels, "_time", lambda event, setting: 0.0)]


def _swapped() -> list[Patch]:
    """Two videos of a micro-batch change places after their samples were noted."""
    from multitrain.data import loader

    real = loader._Part.batch

    def swapped(part: Any) -> Any:
        part.clips[: 2 * part.copies] = part.clips[: 2 * part.copies].roll(part.copies, 0)
        return real(part)

    return [(loader._Part, "batch", swapped)]


def _crash() -> list[Patch]:
    from benchmarks.gpu_check import environment

    return [(environment, "run", lambda setting, report: os._exit(139))]


def _hang() -> list[Patch]:
    from benchmarks.gpu_check import environment

    def hang(setting: Any, report: Any) -> None:
        report.row("before it hangs", 1)
        time.sleep(600)

    return [(environment, "run", hang)]


PLANTS: dict[str, tuple[str, Callable[[], list[Patch]]]] = {
    "driver": ("environment", _driver),
    "informative": ("losses", _informative),
    "block": ("losses", _block),
    "noise": ("bits", _noise),
    "moments": ("resume", _moments),
    "pooling": ("poolings", _pooling),
    "memory": ("speed", _memory),
    "surrogate": ("two_pass", _surrogate),
    "item": ("syncs", _item),
    "idle": ("kernels", _idle),
    "swapped": ("transfers", _swapped),
    "crash": ("environment", _crash),
    "hang": ("environment", _hang),
}
"""By name: the section that must notice it, and the objects to replace."""


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have the fault `name` meanwhile; none for None."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in PLANTS[name][1]() if name else []:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield


def main(names: list[str]) -> None:
    """Print, as JSON, the failed checks of each fault's section."""
    import importlib
    import json
    import tempfile

    from benchmarks.gpu_check.setting import Report, Setting

    torch.set_num_threads(1)
    found = {}
    for name in names:
        report = Report()
        with tempfile.TemporaryDirectory() as folder, planted(name):
            section = importlib.import_module(f"benchmarks.gpu_check.{PLANTS[name][0]}")
            section.run(Setting(torch.device("cpu"), True, Path(folder)), report)
        found[name] = report.failed
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:] or list(PLANTS))
