"""The options that are paths, and arguments that may be a run's name or a path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multitrain.config.errors import ConfigError

PATH_OPTIONS = re.compile(r"init_from|runs|data\.(root|index)|data\.datasets\..+\.(annotations|videos|class_names)")
"""Dotted names of the options that are paths."""

POINTERS = ("latest", "best")
"""Files in a run's ``checkpoints`` that name one of them; ``RUN/best`` stands for ``RUN/checkpoints/best``."""

WEIGHTS_OF_A_RUN = (*POINTERS, "ema")
"""Words after a run's folder or name that stand for some of its weights, e.g. ``first/best``."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
REMOTE = ("s3", "gs", "https", "http")
"""Schemes of addresses from which packs are read."""


def is_remote(path: str | Path) -> bool:
    """Whether `path` is an address (``s3://…``), and no path of this machine."""
    return _ADDRESS.match(str(path)) is not None


def check_address(address: str) -> str:
    """An address of a folder, without its final slash.

    Raises:
        ValueError: it is none that can be read, or it holds credentials. The message does not repeat it.
    """
    scheme, _, rest = address.partition("://")
    host = rest.partition("/")[0]
    if scheme not in REMOTE:
        raise ValueError(f"an address begins with {', '.join(f'{s}://' for s in REMOTE[:-1])}; this is another")
    if "@" in host or "?" in rest or "#" in rest:
        raise ValueError(
            "an address with a user, password, key or signature would be stored in the run; put credentials into the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ~/.netrc) and give the plain address of the folder"
        )
    if not host or any(c.isspace() or not c.isprintable() for c in address):
        raise ValueError("an address needs a host or bucket, and holds no blanks")
    return address.rstrip("/")


_OF_A_MODEL = ("config.yaml", "events.jsonl", "checkpoints", "model.safetensors", "manifest.json")


def find_run(word: str | Path, runs: str | Path = "runs") -> Path:
    """The path for an argument: the argument itself if it is a run, a checkpoint or a file, else the run of that name in `runs`.
    ``RUN/best`` and ``RUN/latest`` are files in the run's folder of checkpoints.

    An argument that is neither is returned unchanged; its reader reports what is missing.

    Raises:
        ConfigError: this user may not read the folder.
    """
    found = _find_run(word, runs)
    refuse_private(found)
    return found


def _find_run(word: str | Path, runs: str | Path) -> Path:
    path = Path(word)
    name = str(word)
    try:
        if path.name in POINTERS and len(path.parts) > 1 and not path.exists():
            pointer = _find_run(path.parent, runs) / "checkpoints" / path.name
            return pointer if pointer.is_file() else path
        if len(path.parts) != 1 or name.startswith(("~", ".")) or path.is_file() or _holds_model(path):
            return path
        named = Path(runs) / name
        return named if is_private(named) or _holds_model(named) else path
    except (OSError, ValueError):  # a name that no file can have
        return path


def refuse_private(path: Path) -> None:
    """Raise ConfigError when this user may not enter a folder above `path`, or not read the folder `path`; names its owner."""
    for folder in (*reversed(path.parents), path):
        if is_private(folder, reading=folder is path):
            raise ConfigError(
                f"{folder}: Permission denied{_belongs_to(folder)}; ask its owner to let you read it (chmod -R g+rX), or for a copy"
            )


def is_private(folder: Path, *, reading: bool = True) -> bool:
    """Whether `folder` is one that this user may not enter, or not list if `reading`."""
    try:
        return folder.is_dir() and not os.access(folder, os.X_OK | (os.R_OK if reading else 0))
    except (OSError, ValueError):  # below another such folder, or a name that no file can have
        return False


def _belongs_to(path: Path) -> str:
    import pwd

    try:
        return f"; it belongs to {pwd.getpwuid(path.stat().st_uid).pw_name}"
    except (OSError, KeyError):
        return ""


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_MODEL)


def expanded(mapping: dict[str, Any]) -> dict[str, Any]:
    """A composed configuration with ``~`` at the start of its paths as the home folder, and ``init_from`` as a path."""
    for node, key in _paths(mapping):
        if isinstance(node[key], str):
            node[key] = os.path.expanduser(node[key])
    start, runs = mapping.get("init_from"), mapping.get("runs")
    if isinstance(start, str) and start:
        mapping["init_from"] = str(find_run(start, runs if isinstance(runs, str) else "runs"))
    return mapping


def _paths(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")
        elif PATH_OPTIONS.fullmatch(f"{prefix}{key}"):
            yield node, key
