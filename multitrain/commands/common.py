"""Helpers that several verbs share: device, configuration, stop signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType

from multitrain.config import ConfigError, RunConfig

MODEL = "a .pyth or .safetensors file, a run's folder or its name in runs, or a checkpoint's folder"


def device(name: str | None, local_rank: int = 0) -> str:
    """The torch device to use: `name`, else the GPU of this rank, else the CPU.

    Raises:
        ConfigError: there is no such device, or no `name` is given and a GPU is here that this torch cannot use.
    """
    import torch

    from multitrain.engine.device import refuse_unused_gpu

    if name is None:
        if torch.cuda.is_available():
            return f"cuda:{local_rank % torch.cuda.device_count()}"
        refuse_unused_gpu(local_rank)
        return "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r}: no such device; use cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: {torch.cuda.device_count()} GPUs are visible here; use another number, or cpu"
        )
    return str(found)


def configured(run: str | None, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> RunConfig:
    """The default configuration, or that of a run, with overrides.

    Args:
        run: folder or name of a run; if None, the first of `overrides` if it is not ``key=value``.
        config_dirs: folders with the user's config groups.
    """
    from multitrain.config import compose, load
    from multitrain.config.typed import refuse_typed

    if run is None and overrides and "=" not in overrides[0] and not overrides[0].startswith("~"):
        run, *overrides = overrides
    if run is None:
        config = compose(overrides, config_dirs=config_dirs)
        refuse_typed(overrides, config)
        return config
    from multitrain.evaluation.settings import with_overrides

    return with_overrides(load(run), overrides, config_dirs=config_dirs)


def stored(model: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> RunConfig:
    """The configuration stored with weights, with overrides; `config_dirs` as for :func:`configured`."""
    from multitrain.evaluation.settings import with_overrides
    from multitrain.interop.weights import run_config

    return with_overrides(run_config(model), overrides, config_dirs=config_dirs)


class StopSignals:
    """Records SLURM's stop signals and Ctrl-C from its creation on; calling it returns whether one was received."""

    def __init__(self) -> None:
        from multitrain.cluster import slurm

        self.received: list[int] = []
        pid = os.getpid()

        def note(number: int, _frame: FrameType | None) -> None:
            if os.getpid() == pid:
                if number == signal.SIGINT and number in self.received:
                    raise KeyboardInterrupt
                self.received.append(number)

        for number in (*slurm.STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, note)
        slurm.unblock_stop_signals()

    def __call__(self) -> bool:
        return bool(self.received)
