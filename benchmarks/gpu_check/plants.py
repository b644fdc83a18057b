"""Faults for the test of the check: each must be noticed by its section. Only tests/benchmarks/test_gpu_check.py plants them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


PLANTS: dict[str, tuple[str, Callable[[], list[Patch]]]] = {
    "driver": ("environment", _driver),
    "informative": ("losses", _informative),
    "block": ("losses", _block),
}
"""By name: the section that must notice it, and the objects to replace."""


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have the fault `name` meanwhile; none for None."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in PLANTS[name][1]() if name else []:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield
