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
from multitrain.config import ConfigError, config_folder, dump, validate
from multitrain.config.compose import forced

WAIT = 60.0
"""Seconds that a rank waits for rank 0 to write the run's configuration."""


class TrainingFailed(RuntimeError):
    """The ranks of a run have ended with an exit status that is not 0."""


def main(arguments: list[str]) -> None:
    """Compose with Hydra, with ``-m`` a job each; Hydra ends the process with status 1 when one has failed."""
    import hydra

    folder = config_folder()
    groups = {p.name for p in folder.iterdir() if p.is_dir()}
    words = [a if a.startswith("-") or "=" not in a else forced(a, groups) for a in arguments]
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
    sys.argv = [sys.argv[0], *words]
    hydra.main(config_path=str(folder), config_name="config", version_base="1.3")(train_point)()


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

    sweep.main(sys.argv[1:])
