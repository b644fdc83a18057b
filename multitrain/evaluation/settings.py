"""Overrides on a stored configuration, for `multitrain evaluate CHECKPOINT … key=value`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError, RunConfig, validate
from multitrain.config.compose import compose_mapping, config_folders
from multitrain.config.overrides import split, value_of
from multitrain.config.paths import expanded


def with_overrides(config: RunConfig, overrides: Sequence[str], *, config_dirs: Sequence[str | Path] = ()) -> RunConfig:
    """`config` with ``key=value`` changes in the grammar of :mod:`multitrain.config.overrides`.

    ``data.root=DIR`` also moves the datasets' folders that lie under the stored root. A group, e.g. ``data=ssv2``, replaces
    the whole group.

    Args:
        config_dirs: folders with config groups of the user's own.

    Raises:
        ConfigError: one line that names the option, its value, and what would work.
    """
    values = config.model_dump(mode="json")
    folders = config_folders(config_dirs)
    for override in map(split, overrides):
        if override.deletes:
            raise ConfigError(f"{override.word}: a stored option cannot be taken away; give it another value")
        if any((folder / override.key).is_dir() for folder in folders):
            values[override.key] = compose_mapping([override.word], config_dirs=config_dirs).get(override.key)
            continue
        value = value_of(override)
        if override.key == "data.root" and isinstance(value, str):
            value = os.path.expanduser(value)
            _move(values["data"], value)
        _set(values, override.key, value)
    return validate(expanded(values))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; missing parts are created, so that the schema reports the error."""
    *parents, last = key.split(".")
    node = values
    for part in parents:
        inner = node.get(part)
        if not isinstance(inner, dict):
            inner = node[part] = {}
        node = inner
    node[last] = value


def _move(data: dict[str, Any], root: str) -> None:
    old = Path(data["root"])
    for dataset in data["datasets"].values():
        for option in ("annotations", "videos", "class_names"):
            path = dataset.get(option)
            if path is not None and Path(path).is_relative_to(old):
                dataset[option] = str(Path(root) / Path(path).relative_to(old))
