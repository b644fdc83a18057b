"""From a command line to a checked configuration, and to and from a file.

Hydra puts the YAML groups of `configs/` together; the schema in this package checks the result. Every mistake becomes
one `ConfigError` of one line.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from multitrain.config.errors import ConfigError, nearest
from multitrain.config.run import RunConfig


def config_folder() -> Path:
    """The shipped `configs/` folder: beside the package in a checkout or a run's code snapshot, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"no configs/config.yaml beside or inside {package}; reinstall multitrain, or run from a checkout"
    )


def compose(overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()) -> RunConfig:
    """The configuration that `overrides` (``key=value``, in Hydra's grammar) make of the shipped groups.

    Args:
        overrides: e.g. ``["experiment=demo", "nodes=2", "cluster.partition=low"]``.
        config_dirs: more folders with config groups of your own, searched after the shipped ones.

    Raises:
        ConfigError: one line that names the option, its value, and what would work.
    """
    return validate(compose_mapping(overrides, config_dirs=config_dirs))


def compose_mapping(overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Like :func:`compose`, before the schema has checked it: plain nested dictionaries, interpolations resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = config_folder()
    folders = [folder, *(Path(d).resolve() for d in config_dirs)]
    groups = {p.name for f in folders if f.is_dir() for p in f.iterdir() if p.is_dir()}
    arguments = [forced(o, groups) for o in overrides]
    if config_dirs:
        arguments.append("hydra.searchpath=[" + ",".join(f"'file://{f}'" for f in folders[1:]) + "]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra_compose("config", overrides=arguments)
        return typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(_explain(error, folders)) from error


def validate(mapping: Mapping[str, Any]) -> RunConfig:
    """The typed configuration of plain nested dictionaries.

    Raises:
        ConfigError: the first problems found, in one line.
    """
    try:
        return RunConfig.model_validate(dict(mapping))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from error


def load(path: str | Path) -> RunConfig:
    """The configuration of a run: `path` is its folder or its `config.yaml`."""
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    try:
        mapping = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; a run's folder holds config.yaml, written when it is submitted"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: not YAML ({_flat(error)}); restore it from the run's checkpoint folder or submit anew"
        ) from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: holds no settings; restore it, or submit the run again")
    try:
        return validate(mapping)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def dump(config: RunConfig) -> str:
    """The configuration as YAML text that :func:`load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, e.g. ``optim.lr``; lists as they are."""

    def walk(mapping: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in mapping.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    return walk(config.model_dump(mode="json"), "")


def forced(override: str, groups: set[str]) -> str:
    """`key=value` → `++key=value`, so that the schema and not Hydra judges the name; groups, ``+``, ``~`` stay."""
    key, equals, _ = override.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"{override!r} is no override; write key=value, e.g. nodes=2 or cluster.partition=low")
    if (
        not equals
        or key[:1] in "+~"
        or key.split("@")[0].removeprefix("override ") in groups
        or key.startswith("hydra")
    ):
        return override
    return "++" + override


@functools.cache
def _fields(model: type[BaseModel], prefix: str = "") -> tuple[str, ...]:
    """Every option of the schema as a dotted name; entries of a mapping are shown as ``<name>``."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        nested = field.annotation
        if typing.get_origin(nested) is dict:
            nested, inner = typing.get_args(nested)[1], f"{prefix}{name}.<name>."
        else:
            inner = f"{prefix}{name}."
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            names.extend(_fields(nested, inner))
    return tuple(names)


def _one_line(error: ValidationError) -> str:
    """The first three problems of a validation, each with its dotted name, value and remedy."""
    problems = []
    for e in error.errors()[:3]:
        where = ".".join(str(p) for p in e["loc"])
        message = _flat(e["msg"].removeprefix("Value error, "))
        if e["type"] == "extra_forbidden":
            message = f"unknown option {where!r}; {_nearest_field(e['loc'])}"
        elif e["type"] == "missing":
            message = f"{where} is missing; {_described(e['loc'])}"
        elif e["type"] == "value_error":
            message = f"{where}: {message}" if where else message
        else:
            message = f"{where}={e['input']!r}: {message[0].lower() + message[1:]}"
        problems.append(message)
    more = len(error.errors()) - len(problems)
    return "; ".join(problems) + (f" (and {more} more)" if more else "")


def _schema_path(loc: tuple[str | int, ...]) -> list[str]:
    """A location with the keys of `data.datasets` replaced by ``<name>``, as in :func:`_fields`."""
    parts = [str(p) for p in loc]
    return ["<name>" if i == 2 and parts[:2] == ["data", "datasets"] else p for i, p in enumerate(parts)]


def _nearest_field(loc: tuple[str | int, ...]) -> str:
    """Options like the unknown one at `loc`: among its siblings, else anywhere by the last part of their names."""
    *parent, name = _schema_path(loc)
    known = _fields(RunConfig)
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == ".".join(parent)]
    elsewhere = sorted(k for k in known if k.rpartition(".")[2] == name)
    if elsewhere:
        return "did you mean " + " or ".join(map(repr, elsewhere[:3])) + "?"
    return nearest(name, siblings)


def _described(loc: tuple[str | int, ...]) -> str:
    model: Any = RunConfig
    for part in loc[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and str(part) in model.model_fields:
            annotation: Any = model.model_fields[str(part)].annotation
            model = typing.get_args(annotation)[1] if typing.get_origin(annotation) is dict else annotation
    if isinstance(model, type) and issubclass(model, BaseModel) and str(loc[-1]) in model.model_fields:
        text = model.model_fields[str(loc[-1])].description
        if text:
            return _flat(text)
    return "give it a value"


def _explain(error: Exception, folders: Sequence[Path]) -> str:
    """A Hydra or YAML error in one line, with the remedy."""
    missing = getattr(error, "missing_cfg_file", None)
    if missing is not None:
        group, _, name = str(missing).rpartition("/")
        group = group.removeprefix("/")
        known = sorted({p.stem for f in folders for p in (f / group).glob("*.yaml")})
        if name and known:
            return f"{group}={name}: there is no such {group}; {nearest(name, known)}"
    return _flat(error)


def _flat(value: object) -> str:
    return " ".join(str(value).split())


__all__ = ["compose", "compose_mapping", "config_folder", "dump", "forced", "load", "validate"]
