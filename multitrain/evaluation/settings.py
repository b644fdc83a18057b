"""A stored configuration with a few options changed: what `multitrain evaluate CHECKPOINT … key=value` works with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError, RunConfig, config_folder, validate
from multitrain.config.compose import compose_mapping


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with ``key=value`` changes in Hydra's grammar.

    ``data.root=DIR`` also moves the datasets' folders that lie under the stored root. A shipped group, e.g.
    ``data=ssv2``, replaces the whole group.

    Raises:
        ConfigError: one line that names the option, its value, and what would work.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    values = config.model_dump(mode="json")
    parser = OverridesParser.create()
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} is no override; write key=value, e.g. data.root=/datasets or eval.workers=4")
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text!r} is no override: {' '.join(str(error).split())[:160]}") from None
        key, value = parsed.key_or_group.lstrip("+"), parsed.value()
        if (config_folder() / key).is_dir():
            values[key] = compose_mapping([text])[key]
            continue
        if key == "data.root":
            _move(values["data"], str(value))
        _set(values, key, value)
    return validate(values)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; parts that are not there are made, so that the schema can name what is wrong with them."""
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


__all__ = ["with_overrides"]
