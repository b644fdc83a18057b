"""Remove the names of machines, accounts, users and folders from a run's configuration, so that it can be shared."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from multitrain.config import ClusterConfig, RunConfig

LOCATION_OPTIONS = ("runs", "init_from", "data.root", "data.index", "monitor.wandb", "dry_run")
"""Options that locate files or accounts and do not affect the model."""
_PATH = re.compile(r"(?<![\w.:/-])(?:~[\w.-]*|file:/)?/[^\s'\"<>|:;,()\[\]{}]+")
"""An absolute path, or one that starts in a home folder."""


def shareable(run: RunConfig, classes: Mapping[str, int]) -> dict[str, Any]:
    """`run` as plain values that `validate` accepts, with default folder names and the default cluster.

    Args:
        run: the configuration.
        classes: class count by dataset; replaces the files of class names.
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
    cleaned: dict[str, Any] = redact(values)
    return cleaned


def shareable_overrides(words: Iterable[str]) -> list[str]:
    """The overrides (``key=value``) that affect the model, with paths redacted; those that only locate files are left out."""
    kept = []
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key in LOCATION_OPTIONS or (
            key.startswith(("cluster", "hydra", "data.datasets")) and _names_location(key, word)
        ):
            continue
        option, equals, value = word.partition("=")
        kept.append(option + equals + redact(value))
    return kept


def redact(value: Any, names: Iterable[str] = ()) -> Any:
    """`value` with every absolute path in its strings replaced by its last part, and names of machines and users by ``…``.

    Args:
        value: a string, or lists and dictionaries of strings and other plain values.
        names: machines and users to redact, in addition to the current ones.
    """
    if isinstance(value, dict):
        return {redact(key, names): redact(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "../")):
        return PurePosixPath(value).name
    text = _PATH.sub(lambda match: PurePosixPath(match[0]).name or "…", value)
    for name in (*names, *_private_names()):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "…", text)
    return text


def _names_location(key: str, word: str) -> bool:
    return not key.startswith("data.datasets") or "/" in word


def _private_names() -> list[str]:
    """The names of this user and this machine, except those that are ordinary words of a configuration."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user id has no entry in the password database
        user = ""
    host = socket.gethostname()
    found = {user, host, host.partition(".")[0], Path(os.path.expanduser("~")).name, os.environ.get("USER", "")}
    return sorted(found - {"", "root", "localhost", "run", "runs", "data", "model"}, key=len, reverse=True)


__all__ = ["LOCATION_OPTIONS", "redact", "shareable", "shareable_overrides"]
