"""The folder of a run: chosen once, written whole or not at all, and found again when the run is resumed.

RUNS/NAME/config.yaml      the whole configuration, paths absolute
          overrides.yaml   what was typed, one entry a submission
          code/            the code that the ranks run
          env.txt          Python, packages, git revision, one entry a submission
          events.jsonl     submissions first; then what the run itself tells
          logs/            one file a rank
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from multitrain.config import ConfigError, RunConfig, compose, config_folder, dump, load, nearest, validate
from multitrain.monitor.events import Events, read
from multitrain.order.batch import BatchShape, solve

ROOT = Path(__file__).resolve().parents[1]

FREE = re.compile(
    r"data\.(root|index|workers|prefetch|skip_cap|decoder|decode_timeout)"
    r"|data\.datasets\..+\.(annotations|videos|class_names|temporal_views|spatial_views|test_short_side)"
)
"""Options under `data` that a resumed run may change: where files lie, how fast they are read, how testing looks at them.
Whether other files hold the same videos is checked by the run itself, by content."""

PATH_OPTIONS = re.compile(r"init_from|data\.(root|index)|data\.datasets\..+\.(annotations|videos|class_names)")
"""Options that are paths."""


@dataclass(frozen=True)
class Run:
    """A run as asked for: what is there already, and what is to be written."""

    path: Path
    """The run's folder."""
    config: RunConfig
    """Its whole configuration; paths absolute."""
    shape: BatchShape
    """How an update is cut into micro-batches."""
    typed: list[str]
    """The overrides of this submission."""
    config_dirs: list[str] = field(default_factory=list)
    """Folders with config groups of the user's own."""

    @property
    def exists(self) -> bool:
        """Whether this resumes a run."""
        return (self.path / "config.yaml").is_file()

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def index(self) -> Path:
        """Folder of the memory-mapped annotation indices."""
        return Path(self.config.data.index or self.path.parent / ".index")


# --------------------------------------------------------------------------------------------------- from words to a run


def ask(words: Sequence[str], *, config_dirs: Sequence[str] = (), default_name: str | None = None) -> Run:
    """The run that a command line asks for. Writes nothing.

    Args:
        words: overrides ``key=value``, and at most one plain word: the name or folder of a run that exists.
        config_dirs: folders with config groups of the user's own.
        default_name: what the run is called when nobody names it; experiment and time when not given.

    Raises:
        ConfigError: one line.
        BatchShapeError: the effective batch does not divide among the GPUs.
    """
    typed = [w for w in words if "=" in w or w.startswith("~")]
    path = _folder(typed, [w for w in words if w not in typed], config_dirs, default_name)
    saved = load(path) if (path / "config.yaml").is_file() else None
    if saved:
        config, dirs = _resumed(saved, path, typed, config_dirs)
        _refuse_another_run(path.name, saved, config)
        _refuse_another_start(path, saved, config)
    else:
        dirs = list(config_dirs)
        config = _placed(_flat(compose(_options(typed), config_dirs=dirs)), path)
    shape = solve(
        config.effective_batch, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group
    )
    return Run(path, config, shape, typed, [str(Path(d).absolute()) for d in dirs])


def merge(lists: Sequence[Sequence[str]]) -> list[str]:
    """Overrides of several submissions as one list: for each option, and each config group, the last one counts."""
    last: dict[str, str] = {}
    for override in (o for overrides in lists for o in overrides):
        last.pop(_key(override), None)
        last[_key(override)] = override
    return list(last.values())


def _options(*lists: Sequence[str]) -> list[str]:
    """The merged overrides without the run's name and folder, which are known otherwise."""
    return [o for o in merge(lists) if _key(o) not in ("name", "runs")]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _folder(typed: list[str], plain: list[str], config_dirs: Sequence[str], default_name: str | None) -> Path:
    """The run's folder: of the run that a plain word names, or of the `name` that was typed, or a new one."""
    given = {_key(o): o.partition("=")[2].strip("'\"") for o in typed}
    usual = yaml.safe_load((config_folder() / "config.yaml").read_text()).get("runs", "runs")
    runs = Path(given.get("runs") or usual).absolute()
    name = None if given.get("name") in (None, "", "null") else given["name"]
    if plain:
        folder = _existing(plain, runs)
        if name not in (None, folder.name):
            raise ConfigError(f"name={name} and the run {folder.name!r} are two names; give one")
        return folder
    if name is None:
        config = compose(merge([typed]), config_dirs=config_dirs)
        name = config.name or f"{config.experiment_name}-{default_name or time.strftime('%Y%m%d-%H%M%S')}"
    if "/" in name:
        raise ConfigError(
            f"name={name} cannot be a folder name; give the folder of runs as runs=…, and a name without '/'"
        )
    return runs / name


def _existing(plain: list[str], runs: Path) -> Path:
    """The folder of the run that the plain words of a command line name."""
    folder = Path(plain[0]) if (Path(plain[0]) / "overrides.yaml").is_file() else runs / plain[0]
    if len(plain) == 1 and (folder / "config.yaml").is_file():
        return folder.absolute()
    known = [p.parent.name for p in runs.glob("*/config.yaml")]
    raise ConfigError(
        f"{plain[-1]!r} is neither an option (key=value) nor a run in {runs}; "
        f"{nearest(plain[-1], known) + ' ' if known else ''}name={plain[-1]} starts a new run"
    )


def _history(path: Path) -> list[dict[str, Any]]:
    """What was typed for a run so far, one entry a submission."""
    file = path / "overrides.yaml"
    try:
        entries = yaml.safe_load(file.read_text())
        return [{**entry, "overrides": [str(o) for o in entry["overrides"]]} for entry in entries or []]
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so the run cannot be resumed by name; restore it") from None
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())}); restore it") from None


Flat = dict[tuple[str, ...], Any]
"""A configuration as leaves by path; names of datasets may hold dots."""


def _resumed(saved: RunConfig, path: Path, typed: list[str], config_dirs: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The configuration of a resumed run: as saved, and what the new options change.

    What they change is the difference of two compositions, with and without them, so that neither an edited YAML file,
    nor another working folder, nor another `MULTITRAIN_DATA` changes a run behind its owner's back.
    """
    history = _history(path)
    dirs = list(dict.fromkeys([*(d for entry in history for d in entry.get("config_dirs", [])), *config_dirs]))
    result = _flat(saved)
    if not _options(typed):
        return _placed(result, path), dirs
    earlier = [entry["overrides"] for entry in history]
    before = _flat(compose(_options(*earlier), config_dirs=dirs))
    now = _flat(compose(_options(*earlier, typed), config_dirs=dirs))
    named = {_key(o) for o in typed}
    for leaf in {**before, **now}:
        dotted = ".".join(leaf)
        is_named = "experiment" in named or any(dotted == k or dotted.startswith(k + ".") for k in named)
        if leaf in now and (is_named or before.get(leaf, ...) != now[leaf]):
            result[leaf] = now[leaf]
        elif leaf not in now:
            result.pop(leaf, None)
    return _placed(result, path), dirs


def _placed(flat: Flat, path: Path) -> RunConfig:
    """The configuration with its name, and with absolute paths, since ranks run in another folder."""
    nested: dict[str, Any] = {}
    for leaf, value in flat.items():
        if value is not None and PATH_OPTIONS.fullmatch(".".join(leaf)):
            value = str(Path(value).expanduser().absolute())
        inner = nested
        for part in leaf[:-1]:
            inner = inner.setdefault(part, {})
        if value == {}:
            inner.setdefault(leaf[-1], {})
        else:
            inner[leaf[-1]] = value
    return validate({**nested, "name": path.name, "runs": str(path.parent)})


def _flat(config: RunConfig) -> Flat:
    flat: Flat = {}

    def add(leaf: tuple[str, ...], value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add((*leaf, key), inner)
        else:
            flat[leaf] = value

    add((), config.model_dump(mode="json"))
    return flat


def _refuse_another_run(name: str, saved: RunConfig, config: RunConfig) -> None:
    """Refuse to go on with other videos, another order of them, or another network.

    Raises:
        ConfigError: names the option, both values, and the remedy.
    """
    before, now = _fixed(saved), _fixed(config)
    changed = [k for k in {**before, **now} if before.get(k, "absent") != now.get(k, "absent")]
    if changed:
        k = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{k}: run {name!r} has {before.get(k, 'absent')}, and {now.get(k, 'absent')} was asked for{more}; "
            f"that is another run: give it another name (name=…), or leave {k} as it is"
        )


def _refuse_another_start(path: Path, saved: RunConfig, config: RunConfig) -> None:
    """Refuse other initial weights for a run that has a checkpoint: resuming would leave them out in silence."""
    started = any((path / "checkpoints").glob("update-*"))
    if started and config.init_from not in (saved.init_from, None):
        raise ConfigError(
            f"init_from: run {path.name!r} has checkpoints and goes on from the newest; initial weights are for new runs: "
            "give it another name (name=…), or leave init_from out to resume"
        )


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The options that a resumed run must keep: seed, effective batch, mix group, model, and the data's plan."""
    kept = {".".join(leaf): value for leaf, value in _flat(config).items() if leaf[0] in ("data", "model")}
    return {
        "seed": config.seed,
        "effective_batch": config.effective_batch,
        "data.datasets": ", ".join(config.data.datasets),
        **{name: value for name, value in kept.items() if not FREE.fullmatch(name)},
        "augment.mix_group": config.group,
    }


# ------------------------------------------------------------------------------------------------------ on the disk


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run's lock: for a submission, or as long as a local run lasts. Two at once would write over each other.

    Raises:
        ConfigError: another process of this machine holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise ConfigError(
                f"run {path.name!r} is being run or submitted by process {holder} of this machine; "
                f"end that first (kill {holder}), or take another name: name=…"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write(run: Run) -> None:
    """Create the run's folder, or bring that of a resumed run up to date.

    A new folder appears complete or not at all. The snapshot of a resumed run is replaced when the code has changed.
    """
    new = run.path.with_name(f".{run.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        snapshot(new / "code", run.config_dirs)
        (new / "config.yaml").write_text(dump(run.config))
        (new / "overrides.yaml").write_text(_overrides_text(run))
        (new / "env.txt").write_text(_appended(run.path / "env.txt", environment()))
        if run.exists:
            _replace(run.path, new)
        else:
            (new / "logs").mkdir()
            run.path.parent.mkdir(parents=True, exist_ok=True)
            new.rename(run.path)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or run.path}: {error.strerror}; choose runs=FOLDER") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove(run: Run) -> None:
    """Take back the folder of a new run that could not be submitted."""
    shutil.rmtree(run.path, ignore_errors=True)


def record(run: Run, *, cluster: str, job: str | None = None) -> None:
    """Add the submission to the run's events."""
    events = run.path / "events.jsonl"
    Events(events, job=job, restart=0).write(
        "submit",
        cluster=cluster,
        nodes=run.config.nodes,
        gpus=run.config.gpus,
        overrides=run.typed,
        code=digest(run.path / "code"),
    )


def jobs(path: Path) -> list[str]:
    """The ids of the SLURM jobs that a run has had, oldest first."""
    return list(dict.fromkeys(str(e["job"]) for e in read(path / "events.jsonl") if e.get("job")))


def _replace(path: Path, new: Path) -> None:
    (path / "logs").mkdir(exist_ok=True)
    (path / "STOP").unlink(missing_ok=True)  # of a start that died before it saw it
    for name in ("env.txt", "overrides.yaml", "config.yaml"):
        os.replace(new / name, path / name)
    if digest(path / "code") != digest(new / "code"):
        old = new / "replaced"
        if (path / "code").exists():
            (path / "code").rename(old)
        (new / "code").rename(path / "code")


def _overrides_text(run: Run) -> str:
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "overrides": [o for o in run.typed if _key(o) not in ("name", "runs", "dry_run")],
        "config_dirs": run.config_dirs,
    }
    history = _history(run.path) if run.exists else []
    return yaml.safe_dump([*history, entry], sort_keys=False, allow_unicode=True)


def _appended(file: Path, text: str) -> str:
    return (file.read_text() + "\n" if file.is_file() else "") + text


# ---------------------------------------------------------------------------------------------- code and environment

CODE = ("multitrain", "launch", "configs", "pyproject.toml")
LARGEST = 1 << 20


def snapshot(target: Path, config_dirs: Sequence[str] = ()) -> None:
    """Copy the code to `target`: what git tracks, and new files that it does not ignore; without git, all sources.

    The user's own config groups go to ``target/config_dirs/0``, ``1`` …
    """
    for file in sources():
        copy = target / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy)
    configs = config_folder()
    if configs != ROOT / "configs":  # installed, not a checkout
        shutil.copytree(configs, target / "configs", dirs_exist_ok=True)
    for i, folder in enumerate(config_dirs):
        for file in sorted(Path(folder).rglob("*.yaml")):
            copy = target / "config_dirs" / str(i) / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def sources() -> list[Path]:
    """The files of a snapshot, relative to the root of the checkout."""
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *CODE)
    if listed:
        files = [Path(name) for name in listed.split("\0") if name]
    else:
        found = (p for name in CODE for p in [ROOT / name, *(ROOT / name).rglob("*")])
        kept = (p for p in found if p.suffix in (".py", ".yaml", ".toml", ".typed", ".txt", ".json"))
        files = [p.relative_to(ROOT) for p in kept]
    return sorted({f for f in files if (ROOT / f).is_file() and (ROOT / f).stat().st_size <= LARGEST})


def digest(code: Path) -> str:
    """A short hash of the names and contents of the files under `code`."""
    total = hashlib.sha256()
    for file in sorted(p for p in code.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        total.update(f"{file.relative_to(code)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def environment() -> str:
    """Python, machine, git revision and installed packages, as text."""
    revision = (_git("rev-parse", "HEAD") or "").strip()
    changed = len((_git("status", "--porcelain") or "").splitlines())
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}, key=str.lower)
    return "\n".join(
        [
            f"time      {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
            f"host      {platform.node()}",
            f"platform  {platform.platform()}",
            f"python    {platform.python_version()} {sys.executable}",
            f"git       {revision or 'not a checkout'}{f' with {changed} changed files' if changed else ''}",
            *packages,
            "",
        ]
    )


def _git(*arguments: str) -> str | None:
    """The output of git in the checkout; None without git, or outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
