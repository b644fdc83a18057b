"""Measure the bandwidth between ranks. `launch/preflight.py`, which does not import torch, runs it as a subprocess.

python -m multitrain.engine.bandwidth RANK WORLD_SIZE LOCAL_RANK ADDRESS PORT SECONDS      prints one JSON object
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from multitrain.config import ConfigError
from multitrain.engine.device import described, rank_device
from multitrain.engine.store import listens_here_only, rendezvous

ELEMENTS = 16 << 20
"""fp32 elements of the tensor on a GPU (64 MiB); a sixteenth of them on a CPU."""
REPETITIONS = 5
"""Repetitions that are measured, after one that is not."""


def bandwidth(rank: int, world: int, local: int, address: str, port: int, timeout: float) -> dict[str, Any]:
    """Bus bandwidth of an all-reduce over all ranks, and of the link to the next rank, in GB/s; or ``error`` with the reason.

    NCCL where there are GPUs, else gloo. The bus bandwidth counts 2 (W - 1) / W times the bytes, as NCCL's tests do.
    """
    device = rank_device(rank, local)
    cuda = device.type == "cuda"
    store = rendezvous(rank, world, listens_here_only(world), timeout)
    dist.init_process_group(
        described(device)["backend"],
        store=store,
        init_method=f"tcp://{address}:{port}" if store is None else None,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    values = torch.full((ELEMENTS if cuda else ELEMENTS // 16,), float(rank), device=device)
    size = values.numel() * values.element_size()
    dist.all_reduce(values)
    if values[-1].item() != world * (world - 1) / 2:
        return {"error": f"the sum of all ranks came out as {values[-1].item():g}, not {world * (world - 1) / 2:g}"}
    other = torch.empty_like(values)

    def ring() -> None:
        following, before = (rank + 1) % world, (rank - 1) % world
        both = [dist.P2POp(dist.isend, values, following), dist.P2POp(dist.irecv, other, before)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    reduced = 2 * (world - 1) / world * size / _seconds(lambda: dist.all_reduce(values), cuda)
    link = round(size / _seconds(ring, cuda) / 1e9, 3) if world > 1 else None
    dist.destroy_process_group()
    return {"allreduce_GB_s": round(reduced / 1e9, 3), "link_GB_s": link, **described(device)}


def _seconds(action: Callable[[], object], cuda: bool) -> float:
    action()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(REPETITIONS):
        action()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / REPETITIONS


def main(arguments: list[str]) -> int:
    """Print the result of :func:`bandwidth`, or its error, as JSON."""
    rank, world, local, address, port, timeout = arguments
    try:
        found = bandwidth(int(rank), int(world), int(local), address, int(port), float(timeout))
    except ConfigError as error:  # this torch cannot use the GPU
        found = {"error": str(error)}
    except (RuntimeError, ValueError, OSError) as error:  # torch's errors of rendezvous, NCCL and CUDA
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
