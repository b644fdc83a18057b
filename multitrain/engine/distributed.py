"""From a placed process to a member of the process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from multitrain.cluster import slurm
from multitrain.config import ConfigError
from multitrain.engine.device import backend, described, rank_device
from multitrain.engine.store import listens_here_only, rendezvous


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run.

    `control` is a gloo group of all ranks for small agreements that must not wait for the device; `background` another one,
    for the threads that write checkpoints.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup
    background: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    @cached_property
    def hardware(self) -> dict[str, str]:
        """``device`` (the GPU's model, or cpu) and ``backend`` (nccl or gloo) of this rank."""
        return described(self.device)

    def max(self, value: int) -> int:
        """The largest `value` of any rank, on every rank; a collective, and so a barrier."""
        flag = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return int(flag.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks of a float64 CPU tensor [n], the same bits on every rank."""
        values = values.to("cpu", torch.float64)
        dist.all_reduce(values, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box


def join(
    expected_size: int, timeout: int, threads: int, collective_timeout: int | None = None, precision: str = "fp32"
) -> World:
    """Join the process group that the environment describes: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
    or SLURM's own variables.

    Args:
        expected_size: ranks that the configuration asks for.
        timeout: seconds that a rank waits for the others to join.
        threads: CPU threads for tensor operations.
        collective_timeout: seconds after which a collective fails; `timeout` when not given.
        precision: fp32, bf16 or fp16, which the device has to have.

    Raises:
        ConfigError: the environment places another number of ranks than the configuration says, or the rank has a GPU that it
            cannot use (:func:`multitrain.engine.device.rank_device`).
    """
    if "RANK" not in os.environ:
        os.environ.update(slurm.rank_environment() if "SLURM_PROCID" in os.environ else _alone())
    rank, size, local_rank = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size != expected_size:
        raise ConfigError(
            f"{size} ranks were started, but the run's configuration asks for {expected_size}; start it through "
            f"launch/submit.py, or submit it again with nodes= and gpus= that multiply to {size}"
        )
    torch.set_num_threads(threads)
    device = rank_device(rank, local_rank, precision)
    store = rendezvous(rank, size, listens_here_only(size), timeout)
    limit = timedelta(seconds=collective_timeout or timeout)
    dist.init_process_group(backend(device), store=store, rank=rank, world_size=size, timeout=limit)
    control, background = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
    return World(rank, size, local_rank, device, control, background)


def _alone() -> dict[str, str]:
    """The environment of a single process, for `python -m multitrain.train RUN` typed by hand."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
