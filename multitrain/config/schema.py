"""Every option of the schema by its dotted name; entries of a mapping of settings are ``<name>``: ``data.datasets.<name>.flip``."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from multitrain.config.base import Settings
from multitrain.config.run import RunConfig

_ENTRY = re.compile(r"(data\.datasets)\.[^.]+")


def group(field: FieldInfo) -> tuple[type[Settings] | None, str]:
    """The settings below a field (None: it holds a value), and what stands between their names and the field's."""
    kind, between = field.annotation, "."
    if typing.get_origin(kind) is dict:
        kind, between = typing.get_args(kind)[1], ".<name>."
    return (kind, between) if isinstance(kind, type) and issubclass(kind, Settings) else (None, between)


@functools.cache
def fields(model: type[Settings] = RunConfig, prefix: str = "") -> Mapping[str, FieldInfo]:
    """The fields of `model` and of all settings below it, by dotted name, each group before its options."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        inner, between = group(field)
        if inner is not None:
            found |= fields(inner, f"{prefix}{name}{between}")
    return MappingProxyType(found)


def schema_name(option: str) -> str:
    """The name of a typed option in :func:`fields`: ``data.datasets.ssv2.flip`` → ``data.datasets.<name>.flip``."""
    return _ENTRY.sub(r"\1.<name>", option, count=1) if option.startswith("data.datasets.") else option


def option_type(option: str) -> Any:
    """The annotation of an option, or of an entry of one that holds a mapping (``cluster.sbatch.qos``); None for an unknown option."""
    name = schema_name(option)
    if (field := fields().get(name)) is not None:
        return field.annotation
    above = fields().get(name.rpartition(".")[0])
    if above is None or typing.get_origin(above.annotation) is not dict or group(above)[0] is not None:
        return None
    return typing.get_args(above.annotation)[1]
