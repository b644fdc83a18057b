"""An update of the engine compared with plain DDP and AdamW: two gloo ranks, five million parameters, fp32.

python -m benchmarks.engine [--full]

Both alternate in the same two processes, with the same initial weights and batches; the final weights are compared. Network and
batch are small, so that the time of the update dominates.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.results import row, save
from multitrain.config import EngineConfig, OptimConfig

RANKS, LR, WIDTH, DEPTH, BATCH = 2, 1e-3, 640, 12, 32


def network() -> nn.Module:
    """4.9 million parameters in 48 tensors."""
    torch.manual_seed(0)
    layers = [[nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()] for _ in range(DEPTH)]
    return nn.Sequential(*(m for layer in layers for m in layer))


class Plain:
    """DistributedDataParallel, gradient clipping, AdamW."""

    def __init__(self, optim: OptimConfig) -> None:
        from multitrain.engine.parameters import parameter_groups

        self.model = network()
        self._ddp = nn.parallel.DistributedDataParallel(self.model)
        groups = parameter_groups(self.model, optim)
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps)
        self._clip = optim.clip_norm

    def update(self, x: Tensor) -> None:
        self._ddp(x).square().mean().backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on this rank."""
        return _bytes(t for s in self.optimizer.state.values() for t in s.values() if t.ndim)


class Ours:
    """The engine."""

    def __init__(self, optim: OptimConfig) -> None:
        from multitrain.engine.deepspeed import Engine

        self.model = network()
        self.engine = Engine(self.model, optim, EngineConfig(), "fp32", torch.device("cpu"))

    def update(self, x: Tensor) -> None:
        with self.engine.autocast():
            loss = self.model(x).square().mean()
        self.engine.backward(loss)
        self.engine.update(LR)

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on this rank: its shard of both moments, and of the weights that it steps."""
        inner = self.engine._engine.optimizer.optimizer
        shards = [p for g in inner.param_groups for p in g["params"]]
        return _bytes([*shards, *(t for s in inner.state.values() for t in s.values() if t.ndim)])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rank(out: Path, updates: int, rounds: int) -> None:
    """One rank's measurements, written to `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    optim = OptimConfig()
    sides = {"ours": Ours(optim), "plain": Plain(optim)}
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            gc.collect()
            dist.barrier()
            spent = _timed(sides[name].update, x, updates)
            if number:
                times[name].append(spent)
    pairs = zip(sides["ours"].model.parameters(), sides["plain"].model.parameters())
    apart = max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs if float(b.detach().norm()))
    found = {"times": times, "bytes": {n: s.state_bytes() for n, s in sides.items()}, "apart": apart}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _timed(update: Callable[[Tensor], None], x: Tensor, updates: int) -> tuple[float, float]:
    """CPU and wall seconds of an update."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(updates):
        update(x)
    return (time.process_time() - cpu) / updates, (time.perf_counter() - wall) / updates


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more updates")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    updates, rounds = (20, 15) if given.full else (10, 7)
    if given.rank:
        rank(given.rank, updates, rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        _start(Path(folder), given.full)
        found = [json.loads((Path(folder) / f"{n}.json").read_text()) for n in range(RANKS)]
    cpu = {n: statistics.median(t[0] for f in found for t in f["times"][n]) * 1e3 for n in ("ours", "plain")}
    wall = {n: statistics.median(t[1] for f in found for t in f["times"][n]) * 1e3 for n in ("ours", "plain")}
    held = {n: max(f["bytes"][n] for f in found) / 2**20 for n in ("ours", "plain")}
    millions = sum(p.numel() for p in network().parameters()) / 1e6
    apart = max(f["apart"] for f in found)
    note = (
        f"{RANKS} gloo ranks, {millions:.1f} M parameters, fp32, {BATCH} rows; the weights then differ by {apart:.0e}"
    )
    rows = [
        row("update, CPU time a rank", ours=cpu["ours"], baseline=cpu["plain"], unit="CPU ms", note=note),
        row(
            "update of the engine ÷ plain DDP's",
            ours=cpu["ours"] / cpu["plain"],
            unit="times",
            target="<= 1.35 times",
            aim="<= 1.1 times",
        ),
        row("update, wall time", ours=wall["ours"], baseline=wall["plain"], unit="ms"),
        row(
            "optimizer state a rank",
            ours=held["ours"],
            baseline=held["plain"],
            unit="MiB",
            note="Both moments, and ours the rank's shard of the weights that it steps; ours falls with the number of ranks.",
        ),
    ]
    save("engine", rows, size="full" if given.full else "small")


def _start(folder: Path, full: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.engine", "--rank", str(folder), *(["--full"] if full else [])]
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(RANKS)
    ]
    try:
        codes = [process.wait(300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
