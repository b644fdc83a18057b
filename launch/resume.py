"""The configuration of a resumed run: the saved one, changed by newly typed options."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.snapshot import ROOT, digest, is_own_code, snapshot
from multitrain.config import ConfigError, RunConfig, compose, leaves, load, validate
from multitrain.config.paths import is_remote
from multitrain.config.reading import parse_yaml
from multitrain.records.checkpoints import AVERAGE, BEST, LATEST, listed, pointed_to, update_of, verify_model

MUTABLE_DATA_OPTIONS = re.compile(
    r"data\.(root|index|workers|prefetch|skip_cap|decoder|decode_timeout|stage|stage_limit)"
    r"|data\.datasets\..+\.(annotations|videos|class_names|temporal_views|spatial_views|test_short_side)"
)
"""Options under `data` that a resumed run may change: the paths of files, how fast they are read and staged, the views of a test.
The run itself checks by content whether other files hold the same videos."""

SUBMISSION_OPTIONS = ("name", "runs", "dry_run", "from_scratch", "update_code")
"""Options of a single submission, which are not kept for the run."""

PATH_OPTIONS = re.compile(r"init_from|data\.(root|index)|data\.datasets\..+\.(annotations|videos|class_names)")
"""Options that are paths."""


def merge(lists: Sequence[Sequence[str]]) -> list[str]:
    """Merge the overrides of several submissions: for each option, and each config group, the last value counts."""
    last: dict[str, str] = {}
    for override in (o for overrides in lists for o in overrides):
        last.pop(key(override), None)
        last[key(override)] = override
    return list(last.values())


def options(*lists: Sequence[str]) -> list[str]:
    """The merged overrides without the run's name and folder."""
    return [o for o in merge(lists) if key(o) not in ("name", "runs")]


def _new_overrides(typed: Sequence[str], earlier: Sequence[str]) -> list[str]:
    """The overrides in `typed` that are not in `earlier`."""
    known = set(options(earlier))
    return [o for o in options(typed) if o not in known]


def new_overrides(path: Path, typed: Sequence[str]) -> list[str]:
    """The overrides that no earlier submission of the run has in the same form."""
    return _new_overrides(typed, merge([entry["overrides"] for entry in history(path)]))


def key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def history(path: Path) -> list[dict[str, Any]]:
    """The content of the run's ``overrides.yaml``, one entry per submission.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    file = path / "overrides.yaml"
    try:
        entries = parse_yaml(file.read_text(), file) or []
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so the run cannot be resumed by name; restore it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())}); restore it") from None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and _lists(e) for e in entries):
        raise ConfigError(f"{file} is not a list of submissions (overrides, config_dirs); restore it")
    return [{**entry, "overrides": [str(o) for o in entry["overrides"]]} for entry in entries]


def _lists(entry: dict[str, Any]) -> bool:
    return all(isinstance(values, list) for values in (entry.get("overrides"), entry.get("config_dirs", [])))


Flat = dict[tuple[str, ...], Any]
"""A configuration as values by path; a path is a tuple, since names of datasets may contain dots."""


def resumed_config(
    saved: RunConfig, path: Path, typed: list[str], config_dirs: Sequence[str]
) -> tuple[RunConfig, list[str]]:
    """The configuration of a resumed run, and all its folders of config groups: the saved one, changed by newly typed options.

    The changes are the difference between two compositions, with and without the new options. So neither an edited YAML file, nor
    another working folder, nor another `MULTITRAIN_DATA` changes a run unnoticed. An override of an earlier submission changes
    nothing.

    Raises:
        ConfigError: an option is wrong.
    """
    submissions = history(path)
    dirs = _config_dirs(submissions, config_dirs)
    result = leaves(saved)
    for leaf, value in result.items():  # the run's own copies, also after its folder was renamed
        own = path / "class_names" / Path(str(value)).name
        if leaf[-1] == "class_names" and value is not None and own.is_file():
            result[leaf] = str(own)
    earlier = merge([entry["overrides"] for entry in submissions])
    new = _new_overrides(typed, earlier)
    if not new:
        return with_absolute_paths(result, path), dirs
    frozen = [_frozen_config_dir(path, i, d) for i, d in enumerate(dirs)]
    before = leaves(compose(options(earlier), config_dirs=frozen, saved=saved))
    now = leaves(compose(options(earlier, new), config_dirs=frozen, saved=saved))
    named = {key(o) for o in new}
    for leaf in {**before, **now}:
        dotted = ".".join(leaf)
        is_named = "experiment" in named or any(dotted == k or dotted.startswith(k + ".") for k in named)
        if leaf in now and (is_named or before.get(leaf, ...) != now[leaf]):
            result[leaf] = now[leaf]
        elif leaf not in now:
            result.pop(leaf, None)
    return with_absolute_paths(result, path), dirs


def _frozen_config_dir(path: Path, number: int, folder: str) -> str:
    """The run's own copy of a folder with config groups, if the run's own code resumes it; otherwise the folder itself."""
    copy = ROOT / "config_dirs" / str(number)
    return str(copy) if is_own_code(path) and copy.is_dir() else folder


def changed_since(path: Path, typed: Sequence[str], config_dirs: Sequence[str]) -> list[str]:
    """Differences between this checkout and the run, one line each: of the configuration that its overrides give today, and of the code.

    The run keeps its own values and its own code.
    """
    notes = []
    if options(typed):
        submissions = history(path)
        dirs = _config_dirs(submissions, config_dirs)
        try:
            earlier = options(*(entry["overrides"] for entry in submissions))
            today = leaves(compose(earlier, config_dirs=dirs, saved=load(path)))
        except ConfigError as error:
            notes.append(f"the configuration of this checkout cannot be composed ({error}); the run keeps its own")
        else:
            notes += _differences(leaves(load(path)), today, [entry["overrides"] for entry in submissions])
    if digest(path / "code") != _digest_here(path):
        notes.append("the code of this checkout differs from the run's; the run keeps its own, unless update_code=true")
    return notes


def _differences(own: Flat, today: Flat, typed: Sequence[Sequence[str]]) -> list[str]:
    named = {key(o) for o in options(*typed)}
    differ = [
        f"{'.'.join(leaf)} is now {today[leaf]} and {own[leaf]} in the run"
        for leaf in today
        if leaf in own
        and own[leaf] != today[leaf]
        and leaf[0] not in SUBMISSION_OPTIONS
        and ".".join(leaf) not in named
        and not PATH_OPTIONS.fullmatch(".".join(leaf))
        and leaf != ("data", "root")
        and not (leaf[:2] == ("data", "datasets") and leaf[-1] in ("videos", "annotations", "class_names"))
    ]
    if not differ:
        return []
    more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
    return [
        f"the configuration of this checkout has changed since: {', '.join(differ[:3])}{more}; the run keeps its own, "
        "type an option to change it"
    ]


def _config_dirs(submissions: Sequence[Mapping[str, Any]], more: Sequence[str] = ()) -> list[str]:
    """The folders with the user's own config groups of all submissions, each once, in the order of the snapshot."""
    return list(dict.fromkeys([*(d for entry in submissions for d in entry.get("config_dirs", [])), *more]))


def _digest_here(path: Path) -> str:
    """The digest that a new snapshot of the code would have for this run."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "code"
        snapshot(copy, _config_dirs(history(path)), load(path).model.backbone, path / "code")
        return digest(copy)


def with_absolute_paths(flat: Flat, path: Path) -> RunConfig:
    """The validated configuration with the run's name and with absolute paths, since ranks run in another folder.

    Raises:
        ConfigError: a value is wrong.
    """
    nested: dict[str, Any] = {}
    for leaf, value in flat.items():
        at_address = leaf[-1] == "videos" and value is not None and is_remote(value)
        if value is not None and PATH_OPTIONS.fullmatch(".".join(leaf)) and not at_address:
            value = str(Path(value).expanduser().absolute())
        inner = nested
        for part in leaf[:-1]:
            inner = inner.setdefault(part, {})
        if value == {}:
            inner.setdefault(leaf[-1], {})
        else:
            inner[leaf[-1]] = value
    return validate({**nested, "name": path.name, "runs": str(path.parent)})


def refuse_another_run(name: str, saved: RunConfig, config: RunConfig) -> None:
    """Refuse to resume with other videos, another order of them, or another network.

    Raises:
        ConfigError: names the option, both values, and the remedy.
    """
    changed = changed_options(saved, config)
    if changed:
        k, before, now = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{k}: run {name!r} has {before}, and {now} was requested{more}; "
            f"that is another run: give it another name (name=…), or leave {k} as it is"
        )


def changed_options(saved: RunConfig, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """The options that a resumed run must keep and that differ: name, value of `saved`, value of `config`."""
    before, now = _frozen_options(saved), _frozen_options(config)
    pairs = [(k, before.get(k, "absent"), now.get(k, "absent")) for k in {**before, **now}]
    return [(k, old, new) for k, old, new in pairs if old != new]


def refuse_another_start(path: Path, saved: RunConfig, config: RunConfig) -> None:
    """Refuse other initial weights for a run that has a checkpoint: resuming would ignore them."""
    if config.branch_from != saved.branch_from:
        raise ConfigError(
            f"branch_from: run {path.name!r} exists, and begins with {saved.branch_from or 'update 0'}; a branch is a new run: give it "
            "another name (name=…), or leave branch_from out to resume"
        )
    done = max(map(update_of, listed(path / "checkpoints")), default=0)
    if config.updates is not None and config.updates != saved.updates and config.updates < done:
        raise ConfigError(
            f"updates={config.updates}: run {path.name!r} has completed {done}; for another end of its past start a branch: "
            f"branch_from={path.name}@UPDATE name=… updates={config.updates}"
        )
    started = any((path / "checkpoints").glob("update-*"))
    if started and config.init_from not in (saved.init_from, None):
        raise ConfigError(
            f"init_from: run {path.name!r} has checkpoints and resumes from the newest; initial weights are for new runs: "
            "give it another name (name=…), or leave init_from out to resume"
        )


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with the checkpoint that `init_from` stands for now, in place of a run or of its best or newest checkpoint: a run
    that is trained further, or gets better, would change the initial weights of one that starts later.
    """
    start = Path(config.init_from or "")
    found: Path | None = None
    if start.name in (BEST, LATEST) and start.is_file():
        name = pointed_to(start.parent, start.name)
        found = None if name is None else start.parent / name
        if found is not None and start.name == BEST and (found / AVERAGE).is_file():
            found = found / AVERAGE
    elif config.init_from and (start / "checkpoints").is_dir():
        found = next((c for c in listed(start / "checkpoints") if verify_model(c) is None), None)
    return config if found is None else config.model_copy(update={"init_from": str(found)})


def _frozen_options(config: RunConfig) -> dict[str, Any]:
    """The options that a resumed run must keep: seed, effective batch, mix group, model, and the order of the data; and what is frozen,
    because a checkpoint has no moments of frozen tensors."""
    kept = {".".join(leaf): value for leaf, value in leaves(config).items() if leaf[0] in ("data", "model")}
    return {
        "seed": config.seed,
        "effective_batch": config.effective_batch,
        "data.datasets": ", ".join(config.data.datasets),
        **{name: value for name, value in kept.items() if not MUTABLE_DATA_OPTIONS.fullmatch(name)},
        "augment.mix_group": config.group,
        "optim.freeze": list(config.optim.freeze),
    }
