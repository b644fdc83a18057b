"""Resolve a path to a model's `.safetensors` file, and verify the checkpoint it belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from multitrain.config import ConfigError
from multitrain.config.paths import WEIGHTS_OF_A_RUN, find_run
from multitrain.interop.state_dict_report import abbreviated
from multitrain.records.checkpoints import (
    AVERAGE,
    BEST,
    LATEST,
    MANIFEST,
    MODEL_FILE,
    invalid_reason,
    listed,
    pointed_to,
    verify_model,
)

EMA = WEIGHTS_OF_A_RUN[-1]


def resolve_model_file(path: Path) -> Path:
    """The `.safetensors` file for `path`: the file itself, a checkpoint folder's, or that of a run's newest valid checkpoint.

    Raises:
        ConfigError: there is none, or it is damaged; the message names what was found.
    """
    path = find_run(path)
    if path.name in (LATEST, BEST) and path.is_file():
        return _pointed_to(path)
    if path.name in (BEST, EMA) and not path.exists() and len(path.parts) > 1:
        return _of_run(find_run(path.parent), path.name)
    if path.is_dir():
        return _in_folder(path)
    if not os.path.exists(path):
        raise ConfigError(
            f"{path}: no such file or folder, nor a run of that name; give a .pyth or .safetensors file, a run's folder or name, "
            "or a checkpoint's folder"
        )
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path}: cannot hold a model; give a .pyth or .safetensors file, a run's folder or a checkpoint's folder"
        )
    return path


def _pointed_to(pointer: Path) -> Path:
    """The weights of the checkpoint that a file ``latest`` or ``best`` names; of the best one, those that were validated."""
    name = pointed_to(pointer.parent, pointer.name)
    if name is None:
        raise ConfigError(f"{pointer}: names no checkpoint; give a checkpoint's folder (update-…), or the run's")
    file = _in_folder(pointer.parent / name)
    return _average_beside(file) or file if pointer.name == BEST else file


def _of_run(run: Path, name: str) -> Path:
    """``RUN/ema``: the averaged weights of the run's newest valid checkpoint.

    Raises:
        ConfigError: the run has no such weights.
    """
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{run}: no run of that name, and {name} stands for weights of a run; give RUN/{name}")
    average = _average_beside(_in_folder(run)) if name == EMA else None
    if average is None:
        option = "ema.decay=0.9999" if name == EMA else "checkpoint.best=val/DATASET/top1"
        raise ConfigError(f"{run}: has no {name} weights yet; train with {option}, or give the run's folder")
    return average


def _average_beside(model: Path) -> Path | None:
    """The averaged weights in the checkpoint of `model`, verified; None where there are none.

    Raises:
        ConfigError: they are damaged.
    """
    file = model.with_name(AVERAGE)
    if not file.is_file():
        return None
    if reason := invalid_reason(file.parent, (AVERAGE,), (AVERAGE, "state.json")):
        raise ConfigError(f"{file.parent}: {reason}; use an older checkpoint of the run")
    return file


def _in_folder(path: Path) -> Path:
    if path.name.startswith("update-"):
        reason = verify_model(path)
        if reason:
            raise ConfigError(
                f"{path}: {reason}; use an older checkpoint of the run, or the run's folder to have the newest whole one found"
            )
        return path / MODEL_FILE
    if (path / MODEL_FILE).is_file():  # written by `multitrain convert`, or a checkpoint under another name
        reason = verify_model(path) if (path / MANIFEST).is_file() else None
        if reason:
            raise ConfigError(f"{path}: {reason}; write or copy it again")
        return path / MODEL_FILE
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    damaged: list[str] = []
    for checkpoint in listed(folder):
        reason = verify_model(checkpoint)
        if reason is None:
            return checkpoint / MODEL_FILE
        damaged.append(f"{checkpoint.name}: {reason}")
    if damaged:
        raise ConfigError(f"{path}: no checkpoint is whole ({abbreviated(damaged, 2)}); restore one from a backup")
    files = sorted(p for p in path.iterdir() if p.suffix in (".pyth", ".safetensors"))
    hint = (
        f"it has {abbreviated([p.name for p in files], 3)}: give that file"
        if files
        else "give a run's folder, a checkpoint's folder or a file"
    )
    raise ConfigError(f"{path}: holds no checkpoint (checkpoints/update-…); {hint}")


def unused_average(path: str | Path) -> Path | None:
    """The averaged weights beside the weights that `path` stands for, if it has some and stands for the others."""
    path = Path(path)
    if path.name in WEIGHTS_OF_A_RUN[1:] or not find_run(path).is_dir():
        return None
    average = resolve_model_file(path).with_name(AVERAGE)
    return average if average.is_file() else None


def belongs_to_run(folder: Path) -> bool:
    """Whether `folder` is a run's folder, its folder of checkpoints, or a checkpoint, into which no command writes other files."""
    marks = ("checkpoints", "events.jsonl", "overrides.yaml", "lease", "state.json")
    return any((folder / mark).exists() for mark in marks) or next(folder.glob("update-*"), None) is not None


__all__ = ["MODEL_FILE", "belongs_to_run", "resolve_model_file", "unused_average"]
