"""Resolve a path to a model's `.safetensors` file, and verify the checkpoint it belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from multitrain.config import ConfigError
from multitrain.config.paths import POINTERS, find_run
from multitrain.interop.state_dict_report import abbreviated
from multitrain.records.checkpoints import BEST, MANIFEST, invalid_reason, listed, pointed_to

MODEL_FILE = "model.safetensors"


def resolve_model_file(path: Path) -> Path:
    """The `.safetensors` file for `path`: the file itself, a checkpoint folder's, or that of a run's newest valid checkpoint.

    Raises:
        ConfigError: there is none, or it is damaged; the message names what was found.
    """
    path = find_run(path)
    if path.name in POINTERS:
        path = _pointed_to(path)
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


def _pointed_to(path: Path) -> Path:
    """The checkpoint's folder that a file ``latest`` or ``best`` names; other paths stay as they are."""
    if path.is_file():
        name = pointed_to(path.parent, path.name)
        if name is None:
            raise ConfigError(f"{path}: names no checkpoint; give a checkpoint's folder (update-…), or the run's")
        return path.parent / name
    if path.name == BEST and not path.exists() and (path.parent / "checkpoints").is_dir():
        raise ConfigError(
            f"{path}: the run keeps no best checkpoint; train with checkpoint.best=val/DATASET/top1, or give the run's folder"
        )
    return path


def _in_folder(path: Path) -> Path:
    if path.name.startswith("update-"):
        reason = _invalid_reason(path)
        if reason:
            raise ConfigError(
                f"{path}: {reason}; use an older checkpoint of the run, or the run's folder to have the newest whole one found"
            )
        return path / MODEL_FILE
    if (path / MODEL_FILE).is_file():  # written by `multitrain convert`, or a checkpoint under another name
        reason = _invalid_reason(path) if (path / MANIFEST).is_file() else None
        if reason:
            raise ConfigError(f"{path}: {reason}; write or copy it again")
        return path / MODEL_FILE
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    damaged: list[str] = []
    for checkpoint in listed(folder):
        reason = _invalid_reason(checkpoint)
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


def _invalid_reason(folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not valid, or None. Checks every file's size, and the SHA-256 of the files read from here."""
    return invalid_reason(folder, (MODEL_FILE,), (MODEL_FILE, "state.json"))


def belongs_to_run(folder: Path) -> bool:
    """Whether `folder` is a run's folder, its folder of checkpoints, or a checkpoint, into which no command writes other files."""
    marks = ("checkpoints", "events.jsonl", "overrides.yaml", "lease", "state.json")
    return any((folder / mark).exists() for mark in marks) or next(folder.glob("update-*"), None) is not None


__all__ = ["MODEL_FILE", "belongs_to_run", "resolve_model_file"]
