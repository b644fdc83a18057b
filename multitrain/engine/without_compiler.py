"""Start a rank without torch's compiler, which nothing here calls.

PyTorch imports ``torch._dynamo`` and ``torch._inductor`` as soon as an optimizer is made or stepped, and DeepSpeed for Muon
(`multitrain/engine/deepspeed.py`). Code that calls ``torch.compile`` all the same gets the compiler, as usual.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch.optim import Optimizer


def untraced() -> None:
    """Let the methods of optimizers that torch hides from its compiler be called without it (``torch/_compile.py``)."""
    for method in vars(Optimizer).values():
        if inspect.isfunction(method) and (plain := getattr(method, "__wrapped__", None)):
            plain.__dict__.setdefault("__dynamo_disable", plain)


def stepping(optimizer: Optimizer) -> None:
    """The same step, with its hooks and its name in profiles, without the graph breaks that a compiler would need.

    Not for an optimizer that is differentiated through (``differentiable=True``).
    """
    plain = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = functools.partial(Optimizer.profile_hook_step(plain), optimizer)  # type: ignore[method-assign]
