"""The folder of a run: chosen once, written whole or not at all, and found again when the run is resumed.

RUNS/NAME/config.yaml      the whole configuration, paths absolute
          overrides.yaml   what was typed, one entry a submission
          code/            the code that the ranks run, and that resumes the run
          class_names/     the names of each dataset's classes
          job.sh           the batch script
          env.txt          Python, packages, git revision, one entry a submission
          events.jsonl     submissions first; then what the run itself tells
          lease/           which start of the run may write
          logs/            one file a rank

From its submission on a run reads this folder only. Submitting it again is done by its own code, so that a checkout that was
edited, moved or deleted changes nothing; `update_code=true` takes the code of the checkout.
"""

from __future__ import annotations

import contextlib
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

from multitrain import lease
from multitrain.config import ConfigError, RunConfig, compose, config_folder, dump, load, nearest, validate
from multitrain.config.class_names import LOOKED_FOR, find_class_names, read_class_names
from multitrain.config.reading import parse_yaml, read_yaml
from multitrain.files import replace_text
from multitrain.monitor import slurm
from multitrain.monitor.events import Events, read
from multitrain.order.batch import BatchShape, solve

ROOT = Path(__file__).resolve().parents[1]

FREE = re.compile(
    r"data\.(root|index|workers|prefetch|skip_cap|decoder|decode_timeout)"
    r"|data\.datasets\..+\.(annotations|videos|class_names|temporal_views|spatial_views|test_short_side)"
)
"""Options under `data` that a resumed run may change: where files lie, how fast they are read, how testing looks at them.
Whether other files hold the same videos is checked by the run itself, by content."""

JOBS = ".jobs"
"""Folder beside the runs: for each job of `slurm/train.sh` a file with the run's folder, which its later starts read."""
ONCE = ("name", "runs", "dry_run", "from_scratch", "update_code")
"""Options of one submission, or known otherwise; not part of what was typed for the run."""

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
    from_scratch: bool = False
    """Whether to start over a run whose checkpoints are gone."""
    update_code: bool = False
    """Whether to resume with the code of this checkout."""

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
    flags = {"from_scratch": config.from_scratch, "update_code": config.update_code}
    config = config.model_copy(update=dict.fromkeys(flags, False))
    shape = solve(
        config.effective_batch, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group
    )
    run = Run(path, config, shape, typed, [str(Path(d).absolute()) for d in dirs], **flags)
    _refuse_from_scratch(run)
    return run


def folder(words: Sequence[str], config_dirs: Sequence[str] = ()) -> Path | None:
    """The folder of the run that a command line resumes; None when it starts a new one.

    Raises:
        ConfigError: a plain word names no run.
    """
    typed = [w for w in words if "=" in w or w.startswith("~")]
    plain = [w for w in words if w not in typed]
    if not plain and not any(_key(o) == "name" for o in typed):
        return None
    path = _folder(typed, plain, config_dirs, None)
    return path if (path / "config.yaml").is_file() else None


def of_job(job: str, runs: Path) -> Path | None:
    """The run that a job of `slurm/train.sh` was the first to prepare."""
    with contextlib.suppress(OSError):
        return Path((runs / JOBS / job).read_text().strip())
    return None


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


def _new_words(typed: Sequence[str], earlier: Sequence[str]) -> list[str]:
    """What was typed now and does not stand in the earlier submissions in the same words."""
    known = set(_options(earlier))
    return [o for o in _options(typed) if o not in known]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _folder(typed: list[str], plain: list[str], config_dirs: Sequence[str], default_name: str | None) -> Path:
    """The run's folder: of the run that a plain word names, or of the `name` that was typed, or a new one."""
    given = {_key(o): o.partition("=")[2].strip("'\"") for o in typed}
    usual = read_yaml(config_folder() / "config.yaml").get("runs", "runs")
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
        entries = parse_yaml(file.read_text(), file)
        return [{**entry, "overrides": [str(o) for o in entry["overrides"]]} for entry in entries or []]
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing, so the run cannot be resumed by name; restore it") from None
    except (OSError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({' '.join(str(error).split())}); restore it") from None


Flat = dict[tuple[str, ...], Any]
"""A configuration as leaves by path; names of datasets may hold dots."""


def _resumed(saved: RunConfig, path: Path, typed: list[str], config_dirs: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The configuration of a resumed run: as saved, and what newly typed options change.

    What they change is the difference of two compositions, with and without them, so that neither an edited YAML file,
    nor another working folder, nor another `MULTITRAIN_DATA` changes a run behind its owner's back. A word that stands in
    an earlier submission already changes nothing.
    """
    history = _history(path)
    dirs = list(dict.fromkeys([*(d for entry in history for d in entry.get("config_dirs", [])), *config_dirs]))
    result = _flat(saved)
    earlier = merge([entry["overrides"] for entry in history])
    new = _new_words(typed, earlier)
    if not new:
        return _placed(result, path), dirs
    frozen = [_frozen(path, i, d) for i, d in enumerate(dirs)]
    before = _flat(compose(_options(earlier), config_dirs=frozen))
    now = _flat(compose(_options(earlier, new), config_dirs=frozen))
    named = {_key(o) for o in new}
    for leaf in {**before, **now}:
        dotted = ".".join(leaf)
        is_named = "experiment" in named or any(dotted == k or dotted.startswith(k + ".") for k in named)
        if leaf in now and (is_named or before.get(leaf, ...) != now[leaf]):
            result[leaf] = now[leaf]
        elif leaf not in now:
            result.pop(leaf, None)
    return _placed(result, path), dirs


def _frozen(path: Path, number: int, folder: str) -> str:
    """The run's own copy of a folder with config groups, where its code is what resumes it."""
    copy = ROOT / "config_dirs" / str(number)
    return str(copy) if path / "code" == ROOT and copy.is_dir() else folder


def changed_since(path: Path, typed: Sequence[str], config_dirs: Sequence[str]) -> list[str]:
    """What this checkout would make of the run's first commands today that the run does not; a line each.

    The run keeps its own values and its own code.
    """
    notes = []
    if _options(typed):
        history = _history(path)
        dirs = list(dict.fromkeys([*(d for entry in history for d in entry.get("config_dirs", [])), *config_dirs]))
        try:
            today = _flat(compose(_options(*(entry["overrides"] for entry in history)), config_dirs=dirs))
        except ConfigError as error:
            notes.append(f"the configuration of this checkout cannot be composed ({error}); the run keeps its own")
        else:
            notes += _differences(_flat(load(path)), today, [entry["overrides"] for entry in history])
    if digest(path / "code") != _digest_here(path):
        notes.append(
            "the code of this checkout is not that of the run, which keeps its own; update_code=true takes this one"
        )
    return notes


def _differences(own: Flat, today: Flat, typed: Sequence[Sequence[str]]) -> list[str]:
    named = {_key(o) for o in _options(*typed)}
    differ = [
        f"{'.'.join(leaf)} is {today[leaf]} there and {own[leaf]} in the run"
        for leaf in today
        if leaf in own
        and own[leaf] != today[leaf]
        and leaf[0] not in ONCE
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
        "type the option to change it"
    ]


def _digest_here(path: Path) -> str:
    """What the digest of the run's snapshot would be if it were taken now."""
    with contextlib.ExitStack() as stack:
        import tempfile

        copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "code"
        snapshot(copy, [d for entry in _history(path) for d in entry.get("config_dirs", [])])
        return digest(copy)


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


def _refuse_from_scratch(run: Run) -> None:
    """Starting over is for runs whose checkpoints are gone; others are not thrown away.

    Raises:
        ConfigError: the run is new, or has checkpoints.
    """
    if not run.from_scratch:
        return
    found = sorted(p.name for p in (run.path / "checkpoints").glob("update-*"))
    if found or not run.exists:
        what = f"has checkpoints, up to {found[-1]}" if found else "is new"
        raise ConfigError(
            f"from_scratch=true: run {run.name!r} {what}; the option is for runs whose checkpoints are gone: "
            "leave it out, or give the new run another name (name=…)"
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
def claimed(path: Path) -> Iterator[None]:
    """Hold the lease of a run that exists, while its folder is written and its job is submitted.

    Raises:
        ConfigError: the run is going on, or is being submitted, elsewhere; says where.
    """
    job, restart = slurm.job_id(), slurm.restart_count()
    try:
        held = lease.acquire(
            path,
            job=job,
            restart=restart,
            alive=lambda holder: slurm.job_lives(str(holder.job), holder.restart, holder.cluster),
            patience=lease.PATIENCE if job else 0.0,
        )
    except lease.LeaseHeld as error:
        raise ConfigError(f"{error}; end that first{_how_to_end(path)}, or take another name: name=…") from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or path}: {error.strerror}; choose runs=FOLDER") from None
    with held:
        yield


def _how_to_end(path: Path) -> str:
    state = lease.newest(path)
    if state is None or state.holder is None:
        return ""
    return f" (scancel {state.holder.job})" if state.holder.job else f" (touch {path}/STOP)"


def write(run: Run) -> None:
    """Create the run's folder, or bring that of a resumed run up to date.

    A new folder appears complete or not at all. The snapshot of a resumed run stays, unless it is of a version that this
    one cannot resume, or `update_code` asks for this checkout's.

    Raises:
        ConfigError: the folder cannot be written, or another submission of the same name was faster.
    """
    new = run.path.with_name(f".{run.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        config = _with_own_class_names(run, new / "class_names")
        (new / "config.yaml").write_text(dump(config))
        (new / "overrides.yaml").write_text(_overrides_text(run))
        (new / "env.txt").write_text(_appended(run.path / "env.txt", environment()))
        if run.exists:
            _replace(run, new)
        else:
            snapshot(new / "code", run.config_dirs)
            (new / "logs").mkdir()
            run.path.parent.mkdir(parents=True, exist_ok=True)
            _appear(new, run.path)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or run.path}: {error.strerror}; choose runs=FOLDER") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


FIRST_HOST = 30.0
"""Seconds that another machine of `cluster=hosts` waits for what the first one writes, where they share the folder of runs."""


def wait_for_first_host(run: Run) -> None:
    """On the other machines: the run's folder as machine 0 writes it, or one of its own where they share no folder.

    Raises:
        ConfigError: the folder cannot be written.
    """
    deadline = time.monotonic() + FIRST_HOST
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError):
            if _machine_independent(load(run.path)) == _machine_independent(run.config):
                return
        time.sleep(0.5)
    write(run)


def _machine_independent(config: RunConfig) -> Flat:
    own = (("cluster", "node"),)
    return {leaf: v for leaf, v in _flat(config).items() if leaf not in own and leaf[-1] != "class_names"}


def _appear(new: Path, path: Path) -> None:
    try:
        new.rename(path)
    except OSError as error:
        if not path.exists():
            raise
        raise ConfigError(
            f"{path} is there already ({error.strerror}): another submission was faster, or the folder is no run's; "
            "submit again to resume that run, or take another name: name=…"
        ) from None


def _with_own_class_names(run: Run, folder: Path) -> RunConfig:
    """The configuration with the run's own copies of the files with class names, which go to `folder`."""
    datasets = {}
    for name, dataset in run.config.data.datasets.items():
        file = _names_of(dataset.class_names, dataset.annotations, dataset.classes)
        if file is not None:
            folder.mkdir(exist_ok=True)
            copy = f"{name}{file.suffix}"
            shutil.copyfile(file, folder / copy)
            dataset = dataset.model_copy(update={"class_names": str(run.path / "class_names" / copy)})
        datasets[name] = dataset
    return run.config.model_copy(update={"data": run.config.data.model_copy(update={"datasets": datasets})})


def _names_of(given: str | None, annotations: str, classes: int | None) -> Path | None:
    """The file with the names of a dataset's classes; None where there is none that fits."""
    if given is not None:
        return Path(given) if Path(given).is_file() else None
    if classes is None or find_class_names(Path(annotations), classes) is None:
        return None
    for file in (Path(annotations) / name for name in LOOKED_FOR):
        with contextlib.suppress(ConfigError):
            if file.is_file() and len(read_class_names(file)) == classes:
                return file
    return None


def remove(run: Run) -> None:
    """Take back the folder of a new run that could not be submitted."""
    shutil.rmtree(run.path, ignore_errors=True)


def record(run: Run, *, cluster: str, job: str | None = None) -> None:
    """Add the submission to the run's events."""
    flags = {"from_scratch": True} if run.from_scratch else {}
    Events(run.path / "events.jsonl", job=job, restart=0).write(
        "submit",
        cluster=cluster,
        nodes=run.config.nodes,
        gpus=run.config.gpus,
        overrides=run.typed,
        code=digest(run.path / "code"),
        **flags,
    )


def record_job(run: Path, job: str) -> None:
    """Remember which run a job of `slurm/train.sh` prepared, for its later starts."""
    pointer = run.parent / JOBS / job
    try:
        pointer.parent.mkdir(exist_ok=True)
        replace_text(pointer, f"{run}\n")
    except OSError as error:
        raise ConfigError(f"cannot write {pointer}: {error.strerror}; choose runs=FOLDER") from None


def jobs(path: Path) -> list[str]:
    """The ids of the SLURM jobs that a run has had, oldest first."""
    return list(dict.fromkeys(str(e["job"]) for e in read(path / "events.jsonl") if e.get("job")))


def _replace(run: Run, new: Path) -> None:
    path = run.path
    (path / "logs").mkdir(exist_ok=True)
    for name in ("STOP", "SAVE"):  # of a start that died before it saw it
        (path / name).unlink(missing_ok=True)
    if (new / "class_names").is_dir():
        (path / "class_names").mkdir(exist_ok=True)
        for file in (new / "class_names").iterdir():
            os.replace(file, path / "class_names" / file.name)
    for name in ("env.txt", "overrides.yaml", "config.yaml"):
        os.replace(new / name, path / name)
    if path / "code" == ROOT:
        return
    snapshot(new / "code", run.config_dirs)
    if digest(path / "code") != digest(new / "code"):
        old = new / "replaced"
        if (path / "code").exists():
            (path / "code").rename(old)
        (new / "code").rename(path / "code")


def _overrides_text(run: Run) -> str:
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "overrides": [o for o in run.typed if _key(o) not in ONCE],
        "config_dirs": run.config_dirs,
    }
    history = _history(run.path) if run.exists else []
    return yaml.safe_dump([*history, entry], sort_keys=False, allow_unicode=True)


def _appended(file: Path, text: str) -> str:
    return (file.read_text() + "\n" if file.is_file() else "") + text


# ---------------------------------------------------------------------------------------------- code and environment

CODE = ("multitrain", "launch", "configs", "slurm", "pyproject.toml")
LARGEST = 1 << 20
"""Bytes of one file of a snapshot."""


def snapshot(target: Path, config_dirs: Sequence[str] = ()) -> None:
    """Copy the code to `target`: what git tracks, and new Python, shell and YAML files that it does not ignore; without git, all
    sources. No hidden file, and nothing behind a link.

    The user's own config groups go to ``target/config_dirs/0``, ``1`` … Of them only the groups that have a name of a
    shipped one are copied: the folder may hold anything else.

    Raises:
        ConfigError: a file is too large for code.
    """
    for file in sources():
        _copy(ROOT / file, target / file)
    configs = config_folder()
    if configs != ROOT / "configs":  # installed, not a checkout
        for file in _plain_files(configs, "*.yaml"):
            _copy(file, target / "configs" / file.relative_to(configs))
    groups = sorted(p.name for p in configs.iterdir() if p.is_dir())
    for i, folder in enumerate(config_dirs):
        for group in groups:
            for file in _plain_files(Path(folder) / group, "*.yaml"):
                _copy(file, target / "config_dirs" / str(i) / file.relative_to(folder))


def _copy(file: Path, copy: Path) -> None:
    if (size := file.stat().st_size) > LARGEST:
        raise ConfigError(
            f"{file} has {size / 1e6:.1f} MB, and the snapshot of the code takes files up to {LARGEST / 1e6:.1f} MB: "
            "move it out of the code, or add it to .gitignore"
        )
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)


def _plain_files(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder`: no link, nothing hidden, nothing below either."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    found = [p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink() and not p.name.startswith(".")]
    for inner in folder.iterdir():
        if not inner.name.startswith(".") and inner.name != "__pycache__":
            found += _plain_files(inner, pattern) if inner.is_dir() else []
    return sorted(found)


def sources() -> list[Path]:
    """The files of a snapshot, relative to the root of the checkout."""
    tracked = _git("ls-files", "--cached", "-z", "--", *CODE)
    if tracked:
        new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE) or ""
        files = [Path(name) for name in tracked.split("\0") if name]
        files += [Path(n) for n in new.split("\0") if n.endswith((".py", ".sh", ".yaml")) and "/." not in f"/{n}"]
    else:
        found = [
            p for name in CODE for p in ([ROOT / name] if (ROOT / name).is_file() else _plain_files(ROOT / name, "*"))
        ]
        kept = (p for p in found if p.suffix in (".py", ".yaml", ".toml", ".typed", ".txt", ".json", ".sh", ""))
        files = [p.relative_to(ROOT) for p in kept]
    return sorted({f for f in files if (ROOT / f).is_file() and not (ROOT / f).is_symlink()})


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
