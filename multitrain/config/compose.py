"""Compose a checked configuration from a command line; read and write it as a file.

Hydra composes the YAML groups of `configs/`; the schema in this package checks the result. Every mistake becomes one
`ConfigError` with a message of one line.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from multitrain.config import automatic
from multitrain.config.aliases import suggestion
from multitrain.config.errors import ConfigError, nearest
from multitrain.config.overrides import Override, apply, group_word, in_quotes, is_group, split
from multitrain.config.paths import expanded, find_run
from multitrain.config.reading import DEEPEST, read_yaml, shown
from multitrain.config.run import RunConfig
from multitrain.config.schema import fields, option_type, schema_name


def config_folder() -> Path:
    """The shipped `configs/` folder: beside the package in a checkout or a run's code snapshot, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(
        f"no configs/config.yaml beside or inside {package}; reinstall multitrain, or run from a checkout"
    )


def compose(
    overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = (), saved: RunConfig | None = None
) -> RunConfig:
    """The configuration composed of the shipped groups and `overrides` (``key=value``, in Hydra's grammar).

    Args:
        overrides: e.g. ``["experiment=demo", "nodes=2", "cluster.partition=low"]``.
        config_dirs: folders with the user's own config groups, searched after the shipped ones.
        saved: where values of ``auto`` come from; None: they are chosen, see :mod:`multitrain.config.automatic`.

    Raises:
        ConfigError: one line that names the option, its value, and what would work.
    """
    return compose_and_choose(overrides, config_dirs=config_dirs, saved=saved)[0]


def compose_and_choose(
    overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = (), saved: RunConfig | None = None
) -> tuple[RunConfig, list[automatic.Choice]]:
    """Like :func:`compose`; also what was chosen for ``auto``, and why."""
    mapping = compose_mapping(overrides, config_dirs=config_dirs)
    chosen: list[automatic.Choice] = []
    if saved is not None:
        automatic.restore(mapping, saved.model_dump(mode="json"))
    else:
        chosen = automatic.resolve(mapping, config_folder())
    return validate(mapping, config_dirs=config_dirs), chosen


def compose_mapping(overrides: Sequence[str] = (), *, config_dirs: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Like :func:`compose`, but unchecked: plain nested dictionaries with resolved interpolations."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = config_folders(config_dirs)
    groups = {p.name for f in folders for p in f.iterdir() if p.is_dir()}
    chosen, set_here = [], []
    for override in map(split, overrides):
        if override.key.startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"{shown(override.word, 100)}: cannot be set here, Hydra's own options do nothing in a run; "
                "runs=FOLDER and name=NAME say where it lies, python launch/sweep.py starts several"
            )
        if is_group(override.key, groups):
            _refuse_no_group(override, folders, groups)
            chosen.append(group_word(override, folders, has_default=(folders[0] / override.key).is_dir()))
        else:
            set_here.append(override)
    if len(folders) > 1:
        scheme = checked_source()
        chosen.append("hydra.searchpath=[" + ",".join(in_quotes(f"{scheme}://{f}") for f in folders[1:]) + "]")
    at = ""
    try:
        composed = _composed(tuple(chosen)) if len(folders) == 1 else _compose_groups(chosen)
        for override in set_here:
            at = override.word
            apply(composed, override)
        at = ""
        return expanded(typing.cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True)))
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(_explain(error, folders, at)) from error


def _compose_groups(chosen: Sequence[str]) -> Any:
    """Compose the chosen groups, before options are set: an OmegaConf DictConfig with unresolved interpolations."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra_compose("config", overrides=list(chosen))


_shipped = functools.lru_cache(maxsize=64)(_compose_groups)  # the shipped files do not change while a process runs


def _composed(chosen: tuple[str, ...]) -> Any:
    return copy.deepcopy(_shipped(chosen))


def config_folders(config_dirs: Sequence[str | Path]) -> list[Path]:
    """The shipped folder of config groups, and the user's own. Raises ConfigError for a folder that does not exist."""
    folders = [config_folder()]
    for given in config_dirs:
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            what = "is a file; give the folder" if folder.exists() else "no such folder; give the one"
            raise ConfigError(f"--config-dir {given}: {what} that holds your groups, e.g. {given}/data/mine.yaml")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise ConfigError(f"--config-dir {given}: you may not read this folder; check its permissions")
        folders.append(folder)
    return folders


@functools.cache
def checked_source() -> str:
    """Hydra's name for folders whose files are read within the limits of :mod:`multitrain.config.reading`."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigResult

    class CheckedConfigSource(FileConfigSource):
        @staticmethod
        def scheme() -> str:
            return "checked"

        def load_config(self, config_path: str) -> ConfigResult:
            file = Path(self.path) / self._normalize_file_name(config_path)
            if file.exists():
                found = read_yaml(file)
                if not isinstance(found, (dict, type(None))):
                    raise ConfigError(f"{file}: holds no settings; write name: value lines")
            return super().load_config(config_path)

    Plugins.instance().register(CheckedConfigSource)
    return CheckedConfigSource.scheme()


def validate(mapping: Mapping[str, Any], *, config_dirs: Sequence[str | Path] = ()) -> RunConfig:
    """The typed configuration from plain nested dictionaries.

    Args:
        config_dirs: folders with the user's own config groups, whose choices messages list as well.

    Raises:
        ConfigError: the first problems found, in one line.
    """
    try:
        return RunConfig.model_validate(dict(mapping))
    except ValidationError as error:
        raise ConfigError(_one_line(error, config_dirs)) from error


def load(path: str | Path) -> RunConfig:
    """The configuration of a run: `path` is its folder, its `config.yaml`, or its name in `runs`."""
    path = find_run(path)
    file = path / "config.yaml" if path.is_dir() else path
    if _is_missing(file):
        if len(path.parts) == 1 and file is path:
            raise ConfigError(
                f"{shown(path)}: no such run, neither a folder here nor a name in `runs`; multitrain status lists them"
            )
        raise ConfigError(f"{file}: no such file; a run's folder holds config.yaml, written when it is submitted")
    mapping = read_yaml(file)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: holds no settings; restore it, or submit the run again")
    try:
        return validate(mapping)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _is_missing(file: Path) -> bool:
    """Whether the file does not exist; a file in a folder without read permission is not missing."""
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def dump(config: RunConfig) -> str:
    """The configuration as YAML text, from which :func:`load` reads an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def leaves(config: RunConfig) -> dict[tuple[str, ...], Any]:
    """Every setting by its path, e.g. ``("optim", "lr")``; lists and empty mappings stay as they are."""
    found: dict[tuple[str, ...], Any] = {}

    def walk(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk((*path, str(key)), inner)
        else:
            found[path] = value

    walk((), config.model_dump(mode="json"))
    return found


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, e.g. ``optim.lr``; lists and empty mappings stay as they are."""
    return {".".join(path): value for path, value in leaves(config).items()}


def forced(override: str, groups: set[str]) -> str:
    """`key=value` → `++key=value`, so that the schema, not Hydra, checks the name; groups, ``+`` and ``~`` stay unchanged."""
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


def example_of(option: str) -> str | None:
    """An example value for ``option=``; None if the schema has no such option."""
    if option not in fields():
        return None
    default = fields()[option].default if "." not in option else None
    return {False: "true", True: "false"}[default] if isinstance(default, bool) else "VALUE"


def _refuse_no_group(override: Override, folders: Sequence[Path], groups: set[str]) -> None:
    """Refuse a key with ``/`` that is not a group: options are written with dots. Raises ConfigError."""
    group = override.key.split("@")[0]
    if override.deletes or "/" not in group or group.startswith("hydra") or any((f / group).is_dir() for f in folders):
        return
    dotted = group.replace("/", ".")
    remedy = f"write {dotted}={override.text or 'VALUE'}" if dotted in fields() else nearest(group, groups)
    raise ConfigError(f"{shown(override.word, 100)}: there is no config group {shown(group, 60)!r}; {remedy}")


def _one_line(error: ValidationError, config_dirs: Sequence[str | Path] = ()) -> str:
    """The first three problems of a validation in one line, each with its dotted name, value and remedy."""
    problems = []
    for e in error.errors()[:3]:
        where = shown(".".join(str(p) for p in e["loc"]), 100)
        message = _flat(e["msg"].removeprefix("Value error, "))
        if e["input"] == automatic.AUTO and (said := _not_chosen(e["loc"])):
            problems.append(said)
            continue
        if e["type"] == "int_parsing_size":
            message = "a number of so many digits is too large"
        if e["type"] == "extra_forbidden":
            loc = _typed_at(e["loc"], e["input"])
            message = (
                f"unknown option {shown('.'.join(map(str, loc)), 100)!r}; {_nearest_field(e['loc'], str(loc[-1]))}"
            )
        elif (listed := _list_problem(e)) is not None:
            message = listed
        elif e["type"] == "bool_parsing":
            message = f"{where}={shown(repr(e['input']), 80)}: is true or false"
        elif e["type"] == "missing":
            message = f"{where} is missing; {_described(e['loc'], config_dirs)}"
        elif e["type"] == "value_error":
            message = f"{where}: {message}" if where else message
        elif e["type"] in ("tuple_type", "list_type"):
            message = f"{where}={shown(repr(e['input']), 80)}: is a list; write {where}=[VALUE,VALUE]"
        elif e["type"] in ("model_type", "dict_type"):
            message = f"{where}={shown(repr(e['input']), 80)}: {where} holds several options; set one of them: {where}.NAME=VALUE"
        else:
            message = f"{where}={shown(repr(e['input']), 80)}: {message[0].lower() + message[1:].partition(', unable to parse')[0]}"
        problems.append(message)
    more = len(error.errors()) - len(problems)
    return "; ".join(problems) + (f" (and {more} more)" if more else "")


def _not_chosen(loc: tuple[str | int, ...]) -> str:
    """The message for an ``auto`` that nothing has replaced; empty for another problem."""
    option = ".".join(map(str, loc))
    if option.endswith(f".{automatic.CHOOSE}"):
        option = option.rpartition(".")[0]
    elif option not in automatic.SOLVERS:
        return f"{shown(option, 100)}=auto: this option is never chosen; give it a value" if option in fields() else ""
    return f"{option}=auto: is chosen by python launch/submit.py and launch/sweep.py only; give it a value"


def _list_problem(e: Any) -> str | None:
    """The message for a list of the wrong length; None for other problems."""
    loc, given = e["loc"], e["input"]
    if e["type"] == "missing" and loc and isinstance(loc[-1], int):
        loc = loc[:-1]
    elif e["type"] not in ("too_long", "too_short"):
        return None
    where = ".".join(map(str, loc))
    kinds = typing.get_args(option_type(where))
    count = len(kinds) if kinds and ... not in kinds else e.get("ctx", {}).get("max_length", "fewer")
    return f"{where}={shown(str(given).replace(' ', ''), 80)}: is a list of {count} values, not of {len(given)}"


def _typed_at(loc: tuple[str | int, ...], value: Any) -> tuple[str | int, ...]:
    """The full name of an unknown option, e.g. ``TRAIN.BATCH_SIZE``, of which the error gives the first part only."""
    while isinstance(value, dict) and len(value) == 1 and len(loc) < DEEPEST:
        ((name, value),) = value.items()
        loc = (*loc, str(name))
    return loc


def _nearest_field(loc: tuple[str | int, ...], name: str) -> str:
    """A hint with options similar to the unknown one at `loc`, called `name`: by the last part of their names, by the names of other
    projects, else among its siblings."""
    known = fields()
    parent = schema_name(".".join(map(str, loc))).rpartition(".")[0]
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    same = sorted(k for k in known if k.rpartition(".")[2] == name.lower().replace("-", "_"))
    if same:
        return "did you mean " + " or ".join(map(repr, same[:3])) + "?"
    if (hint := suggestion(name)) is not None:
        return f"use {hint}"
    closest = difflib.get_close_matches(name[:200], sorted({k.rpartition(".")[2] for k in known}), n=1, cutoff=0.75)
    if closest and closest[0] not in siblings:
        found = sorted(k for k in known if k.rpartition(".")[2] in closest)
        return "did you mean " + " or ".join(map(repr, found[:3])) + "?"
    return nearest(name, siblings, most=len(siblings))


def _described(loc: tuple[str | int, ...], config_dirs: Sequence[str | Path] = ()) -> str:
    field = fields().get(schema_name(".".join(map(str, loc))))
    if field is not None and field.description:
        return _flat(field.description)
    known = sorted({p.stem for f in config_folders(config_dirs) for p in (f / str(loc[-1])).glob("*.yaml")})
    return f"choose one: {', '.join(f'{loc[-1]}={name}' for name in known)}" if known else "give it a value"


def _explain(error: Exception, folders: Sequence[Path], at: str) -> str:
    """An error of Hydra, OmegaConf or YAML in one line, with the remedy; `at`: the override that caused it, if known."""
    missing = getattr(error, "missing_cfg_file", None)
    if missing is not None:
        return _no_such_choice(str(missing), folders)
    text = _flat(error).partition(" See https://hydra.cc")[0]
    where = at.partition("=")[0] or str(getattr(error, "full_key", None) or "")
    if found := re.search(r"Environment variable '(\w+)' not found", text):
        option = where or "an option"
        return f"{option}: the environment variable {found[1]} is not set; export {found[1]}=…, or give {option}=…"
    if found := re.match(r"Could not (?:override|append to config|delete).*?'(hydra[^']*)'", text):
        return f"{found[1]}: Hydra has no such option here; leave it out"
    if found := re.search(r"Interpolation key '([^']*)' not found", text):
        return f"{where}: ${{{found[1]}}} names no option; correct it, or write \\${{ for these two characters"
    if type(error).__module__.startswith("omegaconf") and ("${" in at or "nterpolation" in text):
        return f"{shown(at or where, 100)}: '${{' begins the name of another option, as in ${{data.root}}; correct it, or write \\${{"
    if type(error).__module__.startswith("omegaconf") or not at:
        return shown(f"{at}: {text}" if at else text, 300)
    return f"{shown(at, 100)}: cannot be read; write key=value, with the value in quotation marks when it has special characters"


def _no_such_choice(missing: str, folders: Sequence[Path]) -> str:
    group, _, name = missing.rpartition("/")
    group = group.removeprefix("/")
    known = sorted({p.stem for f in folders for p in (f / group).glob("*.yaml")})
    for folder in folders[1:]:
        if (folder / f"{name}.yaml").is_file():
            return f"{group}={name}: {folder}/{name}.yaml is not in a group; move it to {folder}/{group}/{name}.yaml"
    if name and known:
        hint = "" if len(folders) > 1 else "; choices of your own need --config-dir DIR (DIR/data/mine.yaml)"
        return f"{group}={name}: there is no such {group}; {nearest(name, known)}{hint if group == 'data' else ''}"
    return f"{missing}: no such file in {', '.join(map(str, folders))}; correct the name in the 'defaults' list that asks for it"


def _flat(value: object) -> str:
    return " ".join(str(value).split())
