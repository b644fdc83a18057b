"""The checkpoint folders of a run, and whether one is valid: its files match ``manifest.json``, which is written last."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from multitrain.config.paths import POINTERS
from multitrain.config.reading import parse_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"update-(\d{8,})$", re.ASCII)
_CHUNK = 1 << 24
AVERAGE = "ema.safetensors"
"""File of the averaged weights, in the checkpoints of a run with `ema.decay`."""
MODEL_FILE = "model.safetensors"
FILES = (MODEL_FILE, "optimizer.safetensors", "state.json", "config.yaml")
"""Files of every checkpoint."""
LATEST, BEST = POINTERS
"""Files beside the checkpoints that name the newest one, and the best one by `checkpoint.best`."""


def listed(checkpoints: Path) -> list[Path]:
    """Checkpoint folders under `checkpoints`, newest first, valid or not; temporary ones are not checkpoints."""
    if not checkpoints.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in checkpoints.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def update_of(folder: Path) -> int:
    """The number of completed updates in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("update-"))


def pointed_to(checkpoints: Path, pointer: str) -> str | None:
    """The name of the checkpoint's folder in the file ``latest`` or ``best``; None if there is none, or it names none."""
    try:
        name = (checkpoints / pointer).read_text(errors="replace")[:64].strip()
    except OSError:
        return None
    return name if _NAME.fullmatch(name) else None


def invalid_reason(folder: Path, required: Collection[str], hashed: Collection[str]) -> str | None:
    """Why `folder` is not a valid checkpoint; None when every file has the size in the manifest, and every one of `hashed` the SHA-256.

    Args:
        required: names of files that the manifest must list.
        hashed: names of files that are read and hashed, if listed. Only of these may the content be used.
    """
    try:
        entries = parse_json((folder / MANIFEST).read_bytes(), "it")["files"]
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing (it is written last)"
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name in required:
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, (size, digest) in files.items():
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            if name in hashed and sha256(folder / name) != digest:
                return f"{name} does not match its SHA-256"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None


def verify(folder: Path) -> str | None:
    """Why `folder` is not a valid checkpoint; None when every file matches its manifest."""
    return invalid_reason(folder, FILES, (*FILES, AVERAGE))


def verify_model(folder: Path) -> str | None:
    """The same for readers of the weights alone: the size of every file, and the content of those that they read."""
    return invalid_reason(folder, (MODEL_FILE,), (MODEL_FILE, "state.json"))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
