"""Checks before a submission writes anything: the folders, the initial weights and the data of runs.

A separate process checks weights and data, since submitting does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import run_folder
from launch.child_error import child_error
from launch.memory_estimate import forecast
from launch.rank import python_path
from launch.run_folder import Run
from launch.snapshot import ROOT, own_module
from multitrain.config import ConfigError, dump

NETWORK_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("model", "data", "activation_checkpointing", "precision"), True),
    "optim": {"freeze": True, "layer_decay": True},
    "loss": {"projection_weight": True, "informative_weight": True},
}
"""What :mod:`multitrain.commands.backbone_needs` depends on."""


def refuse_unstartable(runs: Sequence[Run], *, keep_index: bool) -> None:
    """Refuse runs that could not start; what several of them share is checked once.

    Args:
        keep_index: whether the index of the annotation files is written where the run reads it, or thrown away (a dry run, which
            prints what a node reads of packs).

    Raises:
        ConfigError: one line about the first of them that cannot start.
    """
    for run in runs:
        run_folder.check_places(run)
    for run in _distinct(runs, NETWORK_OPTIONS):
        treated = not run.config.optim.equal and run.config.cluster.check_data
        if (run.config.model.own_backbone and not run.exists) or treated:
            count_network(run)
    for run in _distinct(runs, dict.fromkeys(("init_from", "interpolate_positions", "model", "data"), True)):
        _check_weights(run)
    with contextlib.ExitStack() as stack:
        thrown_away = None if keep_index else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for run in _distinct(runs, dict.fromkeys(("data", "eval", "then"), True)):
            if run.config.cluster.check_data:
                index = str(thrown_away or run.index)
                clips = run.config.gpus * forecast(run.config, run.shape).gpu_clips
                said = _run_check("data", "multitrain.data.catalog", run, "--index", index, "--clips", f"{clips:g}")
                if not keep_index:
                    print("".join(f"# {line}\n" for line in said.splitlines() if line), end="", flush=True)


def _distinct(runs: Sequence[Run], options: dict[str, Any]) -> list[Run]:
    """The first run of each kind by these options, in pydantic's notation."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.config.model_dump_json(include=options), run)
    return list(found.values())


def _check_weights(run: Run) -> None:
    """Check the initial weights now, instead of hours later on the nodes.

    Raises:
        ConfigError: the file `init_from` does not exist, belongs to this run, is damaged, or does not fit the network.
    """
    path = run.config.init_from
    if path is None or run.exists:
        return
    if run.path in (Path(path).absolute(), *Path(path).absolute().parents):
        raise ConfigError(
            f"init_from={path}: lies in this run's own folder; to resume the run leave init_from out, to start another run from "
            "it give that run another name (name=…)"
        )
    if not run.config.cluster.check_data:
        return
    if not os.path.exists(path):
        raise ConfigError(
            f"init_from={path}: no such file or folder; give a .pyth, a .safetensors, a run's or checkpoint's folder, or a run's name"
        )
    _run_check("initial weights", "multitrain.commands.fits", run, prefix=f"init_from={path}: ")


def count_network(run: Run) -> dict[str, Any] | None:
    """What a separate process counts of a network (see :mod:`multitrain.commands.backbone_needs`); None for the published one, if all
    its tensors are trained alike.

    Raises:
        ConfigError: the network cannot be built; one line.
    """
    if run.config.model.backbone is None and run.config.optim.equal:
        return None
    found: dict[str, Any] = json.loads(_run_check("network", "multitrain.commands.backbone_needs", run))
    return found


def _python_path(run: Run) -> str:
    """PYTHONPATH with the code, and with the folder of the user's own backbone."""
    folders = [str(run.path / "code"), *run.config_dirs, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = own_module(run.config.model.backbone, [folder for folder in folders if folder])
    return os.pathsep.join([python_path(ROOT), *([str(own.parent)] if own else [])])


def _run_check(what: str, module: str, run: Run, *arguments: str, prefix: str = "") -> str:
    """Check the run's configuration with `module`, in a separate process, and return what it prints.

    Raises:
        ConfigError: after `prefix`, the line with which the module refused it, or how the process died.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(run.config))
        command = [sys.executable, "-m", module, str(file), *arguments]
        environment = {**os.environ, "PYTHONPATH": _python_path(run)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        skip = "submit where it has memory and its libraries, or without the check: cluster.check_data=false"
        raise ConfigError(
            prefix + child_error(f"the check of the {what} (python -m {module})", done.returncode, done.stderr, skip)
        )
    sys.stderr.write(done.stderr)
    return done.stdout


__all__ = ["refuse_unstartable"]
