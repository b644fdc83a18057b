"""What of a run's configuration can be given away: nothing in it names a machine, an account, a user or a folder."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from multitrain.config import ClusterConfig, RunConfig

PLACES = ("runs", "init_from", "data.root", "data.index", "monitor.wandb", "dry_run")
"""Options that say where something lies, not how the model was made."""
_PATH = re.compile(r"(?<![\w.:/-])(?:~[\w.-]*|file:/)?/[^\s'\"<>|:;,()\[\]{}]+")
"""An absolute path, or one that begins in a home folder."""


def shareable(run: RunConfig, classes: Mapping[str, int]) -> dict[str, Any]:
    """`run` as plain values that validate to a configuration again, with folders by their usual names and no cluster.

    Args:
        run: the configuration.
        classes: by dataset; they stand for files of class names.
    """
    values = run.model_dump(mode="json")
    defaults = type(run).model_fields
    values |= {"runs": "runs", "init_from": run.init_from and PurePosixPath(run.init_from).name}
    values["cluster"] = ClusterConfig().model_dump(mode="json")
    values["dry_run"] = defaults["dry_run"].default
    values["data"] |= {"root": "datasets", "index": None}
    values["monitor"]["wandb"] = None
    for name, entry in values["data"]["datasets"].items():
        entry |= {"annotations": f"datasets/{name}", "videos": f"datasets/{name}/videos", "class_names": None}
        entry["classes"] = entry["classes"] or classes.get(name, 1)
    cleaned: dict[str, Any] = without_places(values)
    return cleaned


def shareable_words(words: Iterable[str]) -> list[str]:
    """Overrides (``key=value``) that say how a model was made; those that say where are left out."""
    kept = []
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key in PLACES or (key.startswith(("cluster", "hydra", "data.datasets")) and _says_where(key, word)):
            continue
        option, equals, value = word.partition("=")
        kept.append(option + equals + without_places(value))
    return kept


def without_places(value: Any, names: Iterable[str] = ()) -> Any:
    """`value` with every absolute path in its texts replaced by the last part of it, and names of machines and users by ``…``.

    Args:
        value: a text, or lists and dictionaries of texts and other plain values.
        names: machines and users, beside this one and this machine.
    """
    if isinstance(value, dict):
        return {without_places(key, names): without_places(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "../")):
        return PurePosixPath(value).name
    text = _PATH.sub(lambda match: PurePosixPath(match[0]).name or "…", value)
    for name in (*names, *_names()):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "…", text)
    return text


def _says_where(key: str, word: str) -> bool:
    return not key.startswith("data.datasets") or "/" in word


def _names() -> list[str]:
    """This user and this machine, where their names are not ordinary words of a configuration."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in the system's table
        user = ""
    host = socket.gethostname()
    found = {user, host, host.partition(".")[0], Path(os.path.expanduser("~")).name, os.environ.get("USER", "")}
    return sorted(found - {"", "root", "localhost", "run", "runs", "data", "model"}, key=len, reverse=True)


__all__ = ["PLACES", "shareable", "shareable_words", "without_places"]
