"""Runs from Hydra's own command line: ``python -m multitrain.train -m hydra/launcher=submitit_slurm optim.lr=1e-4,2e-4``.

Each job of the sweep is a run of its own, ``RUNS/NAME-NUMBER``, which a job that comes back finds again. `launch/sweep.py`
does the same without Hydra's launcher, does not hold the terminal, and keeps a copy of the code.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from multitrain.cluster import slurm
from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError, RunConfig, compose, config_folder, dump, validate
from multitrain.config.arguments import answered, piped, typed_words
from multitrain.config.compose import forced
from multitrain.config.overrides import NotListed, combinations, readable, split, value_of
from multitrain.config.typed import equal_pair, refuse_typed

MULTIRUN = ("-m", "--multirun")
WAIT = 60.0
"""Seconds that a rank waits for rank 0 to write the run's configuration."""


class TrainingFailed(RuntimeError):
    """The ranks of a run have ended with an exit status that is not 0."""


def main(arguments: list[str]) -> int:
    """Compose with Hydra, with ``-m`` a job each. The exit status: 0; 1 when a run has failed; 2 refused."""
    return answered(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    flags, words, folders = _parsed(arguments)
    _refuse_points(words, folders, is_multirun=any(f in MULTIRUN for f in flags))
    folder = config_folder()
    groups = {p.name for p in folder.iterdir() if p.is_dir()}
    words = [readable(forced(w, groups)) for w in words]
    keys = {w.lstrip("+").partition("=")[0]: w.partition("=")[2] for w in words}
    name = keys.get("name") or f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = str(Path(keys.get("runs") or "runs").absolute())
    words = [w for w in words if w.lstrip("+").partition("=")[0] not in ("name", "runs")]
    words += [f"++name={name}", f"++runs={runs}"]
    if "hydra.sweep.dir" not in keys:
        words.append(f"hydra.sweep.dir={runs}/.sweeps/{name}")
    warnings.filterwarnings(
        "ignore", message="(?s).*ConfigStore schema"
    )  # the plugin's own, whose defaults ours replace
    sys.argv = [sys.argv[0], *flags, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints what a job raises itself, with the stack
    try:
        hydra.main(config_path=str(folder), config_name="config", version_base="1.3")(train_point)()
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.FAILED
    except (HydraException, OmegaConfBaseException, RuntimeError) as error:  # the last: submitit's
        raise ConfigError(
            f"{' '.join(str(error).split())}; python launch/sweep.py does without Hydra's launcher"
        ) from None
    return Exit.FINISHED


def _parsed(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Hydra's own flags with their values, the ``key=value`` words, and the folders of groups that the flags name."""
    from hydra._internal.utils import get_args_parser

    given, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    words: list[str] = typed_words([*unknown, *given.overrides])
    flags = list(arguments)
    for word in given.overrides:
        flags.remove(word)
    return flags, words, [given.config_dir] if given.config_dir else []


def _refuse_points(words: list[str], folders: list[str], *, is_multirun: bool) -> None:
    """Refuse on the command line what each run would refuse on its nodes.

    Raises:
        ConfigError: one line about the first run that cannot be.
    """
    for word in words:
        if word.startswith("hydra.searchpath="):
            found = value_of(split(word))
            folders += [str(place).removeprefix("file://") for place in (found if isinstance(found, list) else [found])]
    try:
        points = combinations([w for w in words if not split(w).key.startswith("hydra")])
    except NotListed:  # a sweeper of Hydra's picks the values; each job looks at its own
        return
    if len(points) > 1 and not is_multirun:
        raise ConfigError("several values and no -m; add it for a job each, or give one value")
    configs: list[RunConfig] = []
    for point in points:
        config = compose(point, config_dirs=folders)
        refuse_typed(point, config)
        if config.dry_run:
            raise ConfigError("dry_run: Hydra's launcher has none; use python launch/sweep.py … dry_run=true")
        configs.append(config)
    if equal_pair(configs):
        raise ConfigError("two of the runs would be the same; give each value once, and each option in one override")


def train_point(composed: Any) -> None:
    """One job of the sweep, on each of its ranks. Raises TrainingFailed, ConfigError."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    mapping = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(mapping, dict)
    if hydra.mode == RunMode.MULTIRUN:
        mapping["name"] = f"{mapping['name']}-{hydra.job.num}"
    config = validate({str(k): v for k, v in mapping.items()})
    run = Path(config.runs) / str(config.name)
    file = run / "config.yaml"
    place = slurm.rank_environment()
    if place["RANK"] == "0" and not file.exists():
        refuse_typed(hydra.overrides.task, config)
        (run / "logs").mkdir(parents=True, exist_ok=True)
        temporary = run / ".config.yaml.tmp"
        temporary.write_text(dump(config))
        os.replace(temporary, file)
    deadline = time.monotonic() + WAIT
    while not file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"{file}: rank 0 has not written it within {WAIT:g} s")
        time.sleep(0.1)
    status = _train(run, place)
    if status:
        # Hydra's launcher hands what a job raises back as a value, and SLURM would see exit status 0 (facebookresearch/hydra#1928),
        # so that chains with afterok went on.
        atexit.register(_fail)
        raise TrainingFailed(f"{run}: rank {place['RANK']} ended with exit status {status}; see {run}/events.jsonl")


def _fail() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _train(run: Path, place: dict[str, str]) -> int:
    """The training process, which looks after SLURM's signals itself; those to this process are left to it."""
    handled = (*slurm.STOP_SIGNALS, signal.SIGCONT)
    for number in handled:
        signal.signal(number, signal.SIG_IGN)

    def prepare() -> None:
        slurm.block_stop_signals()
        for number in handled:
            signal.signal(number, signal.SIG_DFL)

    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, **place, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-u", "-m", "multitrain.train", str(run)]
    return subprocess.run(command, env=environment, preexec_fn=prepare, check=False).returncode


if __name__ == "__main__":
    from multitrain import sweep  # whose names are found again when a job unpickles them, unlike those of __main__

    sys.exit(piped(lambda: sweep.main(sys.argv[1:])))
