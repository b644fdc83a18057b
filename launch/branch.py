"""A run that begins with a checkpoint of another one (``branch_from=RUN@UPDATE``): to extend it, or to cool it down.

The branch continues the other run's order of samples, with its weights and moments. Everything else may be another: the length,
the schedule, the learning rate. The other run is only read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import resume
from multitrain.config import ConfigError, RunConfig, load
from multitrain.config.paths import find_run
from multitrain.config.reading import parse_json
from multitrain.records.checkpoints import BEST, listed, pointed_to, update_of, verify

OPTION = "branch_from"


@dataclass(frozen=True)
class Origin:
    """What a branch begins with: a checkpoint of the run in folder `run`."""

    run: Path
    checkpoint: Path


def origin(value: str, runs: Path) -> Origin:
    """The checkpoint that ``RUN``, ``RUN@UPDATE`` or ``RUN@best`` names; ``RUN`` is a folder, or a name in `runs`.

    Raises:
        ConfigError: there is no such run or checkpoint, or it is damaged.
    """
    value = re.sub(r"/(best|latest)/?$", lambda m: "@best" if m[1] == BEST else "", value)
    name, at, which = value.rpartition("@")
    if not at or not (which.isdecimal() or which == BEST):
        name, which = value, ""
    run = find_run(name, runs)
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{OPTION}={value}: {run} is no run; write {OPTION}=RUN@UPDATE, with the run's name or folder"
        )
    folder = run / "checkpoints"
    found = listed(folder)
    best = pointed_to(folder, BEST)
    wanted = {"": found[:1], BEST: [folder / best] if best else []}
    chosen = wanted.get(which, [c for c in found if which and which != BEST and update_of(c) == int(which)])
    if not chosen:
        there = ", ".join(str(update_of(c)) for c in reversed(found)) or "none"
        raise ConfigError(f"{OPTION}={value}: {run} has no such checkpoint; it has those after updates: {there}")
    reason = verify(chosen[0])
    if reason is not None:
        raise ConfigError(f"{OPTION}={value}: {chosen[0]}: {reason}; choose another checkpoint")
    return Origin(run.absolute(), chosen[0].absolute())


def config_of(
    found: Origin, path: Path, typed: list[str], config_dirs: Sequence[str]
) -> tuple[RunConfig, list[str], list[str]]:
    """The configuration of a branch in folder `path`: that of the other run, changed by what is typed; with the folders of config
    groups and the overrides that it stands on.

    Raises:
        ConfigError: an option is wrong, or would make the checkpoint useless: other videos, another order of them, another network.
    """
    if any(resume.key(o) == "init_from" for o in typed):
        raise ConfigError(f"{OPTION} and init_from: a branch has the weights of its checkpoint; leave one of them out")
    saved = load(found.run)
    config, dirs = resume.resumed_config(saved, found.run, typed, config_dirs)
    changed = resume.changed_options(saved, config)
    if changed:
        name, before, now = changed[0]
        raise ConfigError(
            f"{OPTION}: run {found.run.name!r} has {name}={before}, and {now} was requested; a branch keeps the videos, their order, "
            f"the network and what is frozen: leave {name} as it is, or start a run with init_from={found.checkpoint}"
        )
    done = update_of(found.checkpoint)
    if config.updates is not None and config.updates <= done:
        raise ConfigError(
            f"{OPTION}: the checkpoint is after update {done}, and the branch would end at updates={config.updates}; "
            f"set updates=N above {done}"
        )
    update = {"name": path.name, "runs": str(path.parent), "init_from": None, "interpolate_positions": False}
    earlier = [entry["overrides"] for entry in resume.history(found.run)]
    return config.model_copy(update=update), dirs, resume.merge([*earlier, typed])


def copy(found: Origin, checkpoints: Path) -> None:
    """Make the checkpoint, and the best one before it, those of the branch in folder `checkpoints`, by hard links where the file system has
    them.

    Raises:
        OSError: the folder cannot be written.
    """
    best = _best_of(found.checkpoint)
    for folder in {found.checkpoint, best or found.checkpoint}:
        target = checkpoints / folder.name
        target.mkdir(parents=True)
        for name in sorted(p.name for p in folder.iterdir() if p.is_file()):
            try:
                os.link(folder / name, target / name)
            except OSError:  # another file system, or another user's file
                shutil.copyfile(folder / name, target / name)
    if best is not None:
        (checkpoints / BEST).write_text(f"{best.name}\n")


def _best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint at the time of this one, if it is still there and valid."""
    state = parse_json((checkpoint / "state.json").read_bytes(), checkpoint / "state.json")
    update = (state.get("best") or {}).get("update")
    best = next((c for c in listed(checkpoint.parent) if update_of(c) == update), None)
    return None if best is None or verify(best) else best
