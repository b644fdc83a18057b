"""Options of the cluster: where and how the ranks run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from multitrain.config.base import Settings


class ClusterConfig(Settings):
    """How ranks are placed: through SLURM, as processes of this machine, or on several machines without SLURM."""

    kind: Literal["slurm", "local", "hosts"] = "slurm"
    """`slurm` submits a job; `local` starts one process per rank on this machine; `hosts` does so on several machines."""
    rendezvous: str | None = None
    """`hosts`: address and port of rank 0, `address:port` of machine 0. Default with `hosts`: the first of them, and a port derived
    from the run's path."""
    node: int | None = Field(None, ge=0)
    """`hosts`: number of this machine, from 0. Type the same command on every machine, each with its own number."""
    hosts: list[str] = Field(default_factory=list)
    """`hosts`: names of the machines for `ssh`. A single command then starts all of them."""
    partition: str | None = None
    """SLURM partition; default: the cluster's."""
    account: str | None = None
    """SLURM account to charge."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """Required node features, e.g. `a100`."""
    reservation: str | None = None
    """SLURM reservation to run in."""
    nodelist: str | None = None
    """Nodes to use, in SLURM's notation."""
    exclude: str | None = None
    """Nodes to avoid, in SLURM's notation, e.g. one that preflight named."""
    time_limit: int | str = 1440
    """Wall-clock limit of one start of the job, in minutes, or in SLURM's own forms: `24:00:00`, `1-00:00:00`. The run continues in
    the next start."""
    lead_time: int = Field(120, ge=10)
    """Seconds before the time limit at which SLURM warns the job (`--signal=USR2@lead_time`)."""
    cpus_per_gpu: int = Field(8, ge=1)
    """CPU cores per rank (SLURM's `--cpus-per-task`)."""
    memory_per_node: str | int | None = None
    """Memory per node in SLURM's notation, e.g. `480G`; `0` for all of it; default: the partition's."""
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gres"
    """How GPUs are requested: `--gres=gpu:N`, `--gpus-per-node=N`, or not at all (CPU partitions)."""
    gpu_type: str | None = None
    """GPU type in the request, e.g. `a100` in `--gres=gpu:a100:8`."""
    gpu_memory: float | None = Field(None, gt=0)
    """Memory of a GPU in GB; `dry_run` warns if the batch shape does not fit. Not checked if not given."""
    gpu_clips: float | None = Field(None, gt=0)
    """Clips per second that a GPU trains on, from a run's log; `dry_run` uses an estimate if not given."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that run on the first node before the ranks start, e.g. `module load cuda`."""
    srun_args: list[str] = Field(default_factory=list)
    """Additional arguments of `srun`, e.g. `--container-image=…`."""
    sbatch: dict[str, bool | int | str] = Field(default_factory=dict)
    """Additional `#SBATCH` options by long name, e.g. `{mail-user: me@lab.org, exclusive: true}`."""
    python: str | None = None
    """The Python command of the ranks; default: the Python that submits. Containers: `apptainer exec --nv image.sif python`."""
    requeue: Literal["requeue", "resubmit"] = "requeue"
    """How the job is started again: `requeue` requeues it; `resubmit` submits a successor that starts when it has ended, for
    sites that forbid requeueing."""
    max_restarts: int = Field(10, ge=0)
    """Limit of automatic restarts after crashes (a killed rank, an error, a lost node), counted from the submission. Preemptions and
    time limits do not count. After an error in the configuration the run is not restarted."""
    max_stalled_restarts: int = Field(3, ge=1)
    """The run ends, and logs the reason, after this many consecutive restarts without a new checkpoint; preemptions do not count."""
    restarts_in_place: int = Field(3, ge=0)
    """If a rank dies while its node still works, all ranks are restarted within the allocation, at most this often in one start of
    the job; after that the job is requeued. 0: always requeue."""
    check_data: bool = True
    """Read the annotation files at submission, so that an error in them is refused at once. Set to false if the login node cannot
    read them."""

    @field_validator("rendezvous")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})", value)
            if match is None or not 0 < int(match.group(2)) < 65536:
                raise ValueError(f"{value!r} is not address:port, e.g. 10.0.1.6:23456")
        return value

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: list[str]) -> list[str]:
        for host in value:
            if re.fullmatch(r"[A-Za-z0-9_@.:\[\]][A-Za-z0-9_@.:\[\]-]*", host) is None:
                raise ValueError(f"{host!r} is not the name of a machine")
        return value

    @property
    def minutes(self) -> int:
        """`time_limit` in minutes."""
        return minutes(self.time_limit)

    @field_validator("time_limit")
    @classmethod
    def _readable(cls, value: int | str) -> int | str:
        minutes(value)
        return value


_FORM = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def minutes(limit: int | str) -> int:
    """A time limit in minutes, rounded up. `limit` is a number of minutes, or one of SLURM's own forms: ``minutes:seconds``,
    ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes`` and ``days-hours:minutes:seconds``.

    Raises:
        ValueError: it has none of these forms, or is not above zero.
    """
    match = _FORM.fullmatch(str(limit).strip())
    if match is None:
        raise ValueError(
            f"{limit!r} is not a time above zero; give minutes, or 24:00:00, or 1-00:00:00 (days-hours:minutes:seconds)"
        )
    parts = [int(p) for p in match["parts"].split(":")]
    if match["days"] is not None:
        hours, mins, seconds = [*parts, 0, 0][:3]
    else:
        hours, mins, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    total = ((int(match["days"] or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if total <= 0:
        raise ValueError(f"{limit!r} is not a time above zero; give minutes, e.g. 1440")
    return -(-total // 60)
