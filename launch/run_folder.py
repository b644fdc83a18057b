"""The folder of a run: chosen once, written completely or not at all, and found again when the run is resumed.

RUNS/NAME/config.yaml      the whole configuration, paths absolute
          overrides.yaml   the overrides that were typed, one entry per submission
          code/            the code that the ranks run, and that resumes the run
          class_names/     the names of each dataset's classes
          job.sh           the batch script
          env.txt          Python, packages, git revision, one entry per submission
          events.jsonl     first the submissions, then the events of the run itself
          lease/           which start of the run may write
          logs/            one file per rank

From its submission on a run reads this folder only. Its own code also submits it again, so that edits to the checkout, or its
removal, change nothing; `update_code=true` replaces the run's code by that of the checkout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from launch import branch, resume
from launch.resume import SUBMISSION_OPTIONS, Flat, key, options
from launch.snapshot import digest, environment, is_own_code, snapshot
from multitrain import lease
from multitrain.cluster import slurm
from multitrain.cluster.restarts import refuse_lost_checkpoints
from multitrain.config import ConfigError, RunConfig, automatic, compose, config_folder, dump, leaves, load, nearest
from multitrain.config.class_names import LOOKED_FOR, find_class_names, read_class_names
from multitrain.config.compose import compose_and_choose, example_of
from multitrain.config.reading import read_yaml, shown
from multitrain.config.run import check_run_name
from multitrain.config.typed import idle_words, refuse_typed
from multitrain.files import TEMPORARY, refuse_run, replace_text
from multitrain.order.batch import BatchShape, solve
from multitrain.records.events import Events, read

JOBS_FOLDER = ".jobs"
"""Folder beside the runs with one file per job of `slurm/train.sh`: the path of the run's folder, for later starts of the job."""


@dataclass(frozen=True)
class Run:
    """The run that a command line describes, before anything is written."""

    path: Path
    """The run's folder."""
    config: RunConfig
    """Its complete configuration, with absolute paths."""
    shape: BatchShape
    """How the effective batch is split into micro-batches."""
    typed: list[str]
    """The overrides of this submission."""
    config_dirs: list[str] = field(default_factory=list)
    """Folders with the user's own config groups."""
    from_scratch: bool = False
    """Whether to start a run whose checkpoints are gone from the beginning."""
    update_code: bool = False
    """Whether to resume with the code of this checkout."""
    origin: branch.Origin | None = None
    """What a new branch begins with."""
    idle: list[str] = field(default_factory=list)
    """Lines about words that were typed and change nothing."""
    chosen: list[str] = field(default_factory=list)
    """Lines about the values that were chosen for ``auto``."""

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


# ---------------------------------------------------------------------------------------------- from arguments to a run


def compose_run(words: Sequence[str], *, config_dirs: Sequence[str] = (), default_name: str | None = None) -> Run:
    """The run that a command line describes. Writes nothing.

    Args:
        words: overrides ``key=value``, and at most one plain word: the name or folder of an existing run.
        config_dirs: folders with the user's own config groups.
        default_name: the run's name without `name=`; default: experiment and time.

    Raises:
        ConfigError: an option is wrong, or does not fit the existing run; the message is one line.
        BatchShapeError: the effective batch does not divide among the GPUs.
    """
    typed = [w for w in words if "=" in w or w.startswith("~")]
    path = _folder(typed, [w for w in words if w not in typed], config_dirs, default_name)
    saved = load(path) if (path / "config.yaml").is_file() else None
    origin, chosen = None, list[automatic.Choice]()
    if saved:
        config, dirs = resume.resumed_config(saved, path, typed, config_dirs)
        new = resume.new_overrides(path, typed)
        refuse_typed(new, config, saved)
        resume.refuse_another_run(path.name, saved, config)
        resume.refuse_another_start(path, saved, config)
    else:
        dirs = list(config_dirs)
        refuse_run(path, run=path.parent)
        new = options(typed)
        if origin := _origin(typed, path.parent):
            config, dirs, typed = branch.config_of(origin, path, typed, dirs)
        else:
            composed, chosen = compose_and_choose(new, config_dirs=dirs)
            config = resume.with_absolute_paths(leaves(composed), path)
        refuse_typed(new, config)
    idle = idle_words(new, config)
    if config.update_code and not saved:
        idle.append("update_code=true: changes nothing, since a new run takes this checkout's code; leave it out")
    if config.optim.freeze and not (saved or origin or config.init_from or config.model.own_backbone):
        idle.append("optim.freeze without init_from: frozen tensors keep random initial values; add init_from=WEIGHTS")
    if not any((path / "checkpoints").glob("update-*")):
        config = resume.pinned(config)
    flags = {"from_scratch": config.from_scratch, "update_code": config.update_code}
    config = config.model_copy(update=dict.fromkeys(flags, False))
    shape = solve(
        config.effective_batch, nodes=config.nodes, gpus=config.gpus, micro_batch=config.micro_batch, group=config.group
    )
    run = Run(
        path, config, shape, typed, [str(Path(d).absolute()) for d in dirs], **flags, origin=origin, idle=idle,
        chosen=automatic.lines(chosen),
    )  # fmt: skip
    _refuse_wrong_start(run)
    _refuse_single_clips(config, shape)
    return run


def _origin(typed: Sequence[str], runs: Path) -> branch.Origin | None:
    """The checkpoint that the typed ``branch_from`` names; None without one."""
    given = [_unquoted(o.partition("=")[2].strip()) for o in typed if key(o) == branch.OPTION]
    return branch.origin(given[-1], runs) if given and given[-1] not in ("", "null") else None


def tell_idle(runs: Sequence[Run]) -> None:
    """Print each line about a word that changes nothing in any of the runs, once, on standard error."""
    for line in runs[0].idle:
        if all(line in run.idle for run in runs):
            print(f"note: {line}", file=sys.stderr, flush=True)


def _refuse_single_clips(config: RunConfig, shape: BatchShape) -> None:
    """Refuse the informative loss with `scope=micro` if the ranks together hold one clip at a time, which has no variance.

    Raises:
        ConfigError: names the options to change.
    """
    held = shape.micro_batch * config.augment.copies * shape.world_size
    if config.loss.informative_weight > 0 and config.loss.scope == "micro" and held < 2:
        raise ConfigError(
            "loss.scope=micro with one clip at a time, which has no variance; use micro_batch=2 or more, augment.copies=2, "
            "loss.scope=update or loss.informative_weight=0"
        )


def check_places(run: Run) -> None:
    """Refuse a new run if its folder, or the folder of its index, cannot be created. Leaves no file behind.

    Raises:
        ConfigError: names the option to change.
    """
    if run.exists:
        return
    for option, place in {"runs": run.path.parent, "data.index": run.config.data.index}.items():
        if place is None:
            continue
        above = Path(place)
        while not os.path.lexists(above):
            above = above.parent
        try:
            os.rmdir(tempfile.mkdtemp(prefix=TEMPORARY, dir=above))
        except OSError as error:
            raise ConfigError(
                f"{option}={place}: no folder can be created in {above} ({error.strerror}); choose {option}=FOLDER"
            ) from None


def folder(words: Sequence[str], config_dirs: Sequence[str] = ()) -> Path | None:
    """The folder of the run that a command line resumes; None when it starts a new run.

    Raises:
        ConfigError: a plain word is not the name of a run.
    """
    typed = [w for w in words if "=" in w or w.startswith("~")]
    plain = [w for w in words if w not in typed]
    if not plain and not any(key(o) == "name" for o in typed):
        return None
    path = _folder(typed, plain, config_dirs, None)
    return path if (path / "config.yaml").is_file() else None


def _folder(typed: list[str], plain: list[str], config_dirs: Sequence[str], default_name: str | None) -> Path:
    """The run's folder: from the plain word, else from `name=`, else from the default name of a new run."""
    given = {key(o): _unquoted(o.partition("=")[2].strip()) for o in typed}
    usual = read_yaml(config_folder() / "config.yaml").get("runs", "runs")
    runs = Path(given.get("runs") or usual).absolute()
    name = None if given.get("name") in (None, "", "null") else given["name"]
    if plain:
        folder = _existing(plain, runs)
        if name not in (None, folder.name):
            raise ConfigError(f"name={name} contradicts the name of the run {folder.name!r}; give one of them")
        return folder
    if name is None:
        config = compose(resume.merge([typed]), config_dirs=config_dirs)
        name = config.name or f"{config.experiment_name}-{default_name or time.strftime('%Y%m%d-%H%M%S')}"
    if "/" in name:
        raise ConfigError(
            f"name={shown(name, 80)} cannot be a folder name; give the folder of runs as runs=…, and a name without '/'"
        )
    try:
        return runs / check_run_name(name, _NAME_OVERHEAD)
    except ValueError as error:
        raise ConfigError(f"name: {error}") from None


def _beside(folder: Path, name: str, process: int) -> Path:
    """The temporary folder in which a process writes a run's folder; the longest file name derived from a run's name."""
    return folder / f".{name}.new-{process}"


_NAME_OVERHEAD = len(_beside(Path(), "", 9_999_999).name)
"""Bytes by which that file name is longer than the run's name."""


def _unquoted(text: str) -> str:
    """The value without its enclosing quotation marks; a single mark is part of the value."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _existing(plain: list[str], runs: Path) -> Path:
    """The folder of the run that a plain word names. Raises ConfigError: there is no such run, or there are several words."""
    folder = Path(plain[0]) if (Path(plain[0]) / "overrides.yaml").is_file() else runs / plain[0]
    if len(plain) == 1 and (folder / "config.yaml").is_file():
        return folder.absolute()
    raise ConfigError(_no_run(plain[-1], runs))


def _no_run(word: str, runs: Path) -> str:
    """The message for a plain word that is not the name of a run, with what to type instead."""
    if (value := example_of(word)) is not None:
        return f"{word!r} is an option, which needs a value; write {word}={value}"
    known = [p.parent.name for p in runs.glob("*/config.yaml")]
    remedies = [nearest(word, known)] if known else []
    try:
        remedies.append(f"name={check_run_name(word, _NAME_OVERHEAD)} starts a new run")
    except ValueError:
        remedies.append("name=NAME starts a new run")
    return f"{shown(repr(word), 80)} is neither an option (key=value) nor a run in {runs}; {'; '.join(remedies)}"


def _refuse_wrong_start(run: Run) -> None:
    """Refuse to start a run with checkpoints from the beginning, or, without `from_scratch`, a run that has lost its checkpoints.

    Raises:
        ConfigError: `from_scratch` was typed for a run that is new or has checkpoints; or the run has lost them without it.
    """
    if not run.from_scratch:
        if run.exists:
            refuse_lost_checkpoints(run.path, read(run.path / "events.jsonl"))
        return
    found = sorted(p.name for p in (run.path / "checkpoints").glob("update-*"))
    if found or not run.exists:
        what = f"has checkpoints, up to {found[-1]}" if found else "is new"
        raise ConfigError(
            f"from_scratch=true: run {run.name!r} {what}; the option is for runs whose checkpoints are gone: "
            "leave it out, or give the new run another name (name=…)"
        )


# ------------------------------------------------------------------------------------------------------ on the disk


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold the lease of an existing run while its folder is written and its job is submitted.

    Raises:
        ConfigError: another start trains or submits the run; the message says where.
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
        raise ConfigError(f"{error}{_how_to_end(path)}") from None
    except lease.LeaseUnusable as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or path}: {error.strerror}; choose runs=FOLDER") from None
    with held:
        yield


def _how_to_end(path: Path) -> str:
    state = lease.newest(path)
    holder = state.holder if state else None
    if holder is not None and lease.is_copy(path, holder):
        return ", or choose another name: name=…"
    how = "" if holder is None else f" (scancel {holder.job})" if holder.job else f" (touch {path}/STOP)"
    return f"; stop that first{how}, or choose another name: name=…"


def write(run: Run) -> None:
    """Create the run's folder, or update that of a resumed run.

    A new folder appears complete or not at all. A resumed run keeps its snapshot of the code, unless this version cannot resume it,
    or `update_code` requests the code of this checkout.

    Raises:
        ConfigError: the folder cannot be written, or another submission of the same name was faster.
    """
    new = _beside(run.path.parent, run.name, os.getpid())
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
            snapshot(new / "code", run.config_dirs, run.config.model.backbone)
            (new / "logs").mkdir()
            if run.origin is not None:
                branch.copy(run.origin, new / "checkpoints")
            run.path.parent.mkdir(parents=True, exist_ok=True)
            _publish(new, run.path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename2 or error.filename or run.path}: {error.strerror}; choose runs=FOLDER"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


FIRST_HOST_TIMEOUT = 30.0
"""Seconds that the other machines of `cluster=hosts` wait for the first one to write the run's folder, if they share it."""


def wait_for_first_host(run: Run) -> None:
    """On the other machines: wait until machine 0 has written the run's folder; without a shared folder, write it here.

    Raises:
        ConfigError: the folder cannot be written.
    """
    deadline = time.monotonic() + FIRST_HOST_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(ConfigError):
            if _machine_independent(load(run.path)) == _machine_independent(run.config):
                return
        time.sleep(0.5)
    write(run)


def _machine_independent(config: RunConfig) -> Flat:
    own = (("cluster", "node"),)
    return {leaf: v for leaf, v in leaves(config).items() if leaf not in own and leaf[-1] != "class_names"}


def _publish(new: Path, path: Path) -> None:
    try:
        new.rename(path)
    except OSError as error:
        if not path.exists():
            raise
        raise ConfigError(
            f"{path} exists already ({error.strerror}): another submission was faster, or it is not the folder of a run; "
            "submit again to resume that run, or choose another name: name=…"
        ) from None


def _with_own_class_names(run: Run, folder: Path) -> RunConfig:
    """Copy the files with class names to `folder`; the configuration with the paths of the copies."""
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
    """The file with the names of a dataset's classes; None when no file has as many names as the dataset has classes."""
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
    """Delete the folder of a new run that could not be submitted."""
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
    """Record the run that a job of `slurm/train.sh` prepared, for later starts of the job."""
    pointer = run.parent / JOBS_FOLDER / job
    try:
        pointer.parent.mkdir(exist_ok=True)
        replace_text(pointer, f"{run}\n")
    except OSError as error:
        raise ConfigError(f"cannot write {pointer}: {error.strerror}; choose runs=FOLDER") from None


def jobs(path: Path) -> list[str]:
    """The ids of all SLURM jobs of a run, oldest first."""
    return list(dict.fromkeys(str(e["job"]) for e in read(path / "events.jsonl") if e.get("job")))


def _replace(run: Run, new: Path) -> None:
    path = run.path
    (path / "logs").mkdir(exist_ok=True)
    for name in ("STOP", "SAVE"):  # left by a start that died before it read them
        (path / name).unlink(missing_ok=True)
    if (new / "class_names").is_dir():
        if (path / "class_names").is_symlink():
            raise ConfigError(f"{path / 'class_names'} is a link, which is not followed; remove it")
        (path / "class_names").mkdir(exist_ok=True)
        for file in (new / "class_names").iterdir():
            os.replace(file, path / "class_names" / file.name)
    for name in ("env.txt", "overrides.yaml", "config.yaml"):
        os.replace(new / name, path / name)
    if is_own_code(path):
        return
    snapshot(new / "code", run.config_dirs, run.config.model.backbone, path / "code")
    if digest(path / "code") != digest(new / "code"):
        old = new / "replaced"
        if (path / "code").exists():
            (path / "code").rename(old)
        (new / "code").rename(path / "code")


def _overrides_text(run: Run) -> str:
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "overrides": [o for o in run.typed if key(o) not in SUBMISSION_OPTIONS],
        "config_dirs": run.config_dirs,
    }
    history = resume.history(run.path) if run.exists else []
    return yaml.safe_dump([*history, entry], sort_keys=False, allow_unicode=True)


def _appended(file: Path, text: str) -> str:
    return (file.read_text() + "\n" if file.is_file() else "") + text
