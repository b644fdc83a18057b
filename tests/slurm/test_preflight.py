"""Preflight on a real controller: 128 processes over sixteen virtual nodes, and the node with a missing GPU by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.drill import Cluster

pytestmark = pytest.mark.slurm

STEP = ["srun", "--partition=low", "--cpus-per-task=1", "--mem=0"]
PREFLIGHT = [sys.executable, "-m", "launch.preflight"]
NVIDIA_SMI = """#!/bin/sh
# Eight GPUs a node, of which node5 has lost number 3. A mock: there are no GPUs here; granting them is SLURM's own work.
for i in 0 1 2 3 4 5 6 7; do
    [ "$SLURMD_NODENAME.$i" = node5.3 ] || echo "$i, GPU-$SLURMD_NODENAME-$i, H100, , 0"
done
"""


def test_128_processes_each_with_its_own_gpu_and_node(cluster: Cluster, tmp_path: Path, root: Path) -> None:
    begin = time.monotonic()
    step = [*STEP, "--nodes=16", "--ntasks-per-node=8", "--gres=gpu:8"]
    done = subprocess.run(
        [*step, *PREFLIGHT, "--dir", str(tmp_path), "--json"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [f for f in said["findings"] if f["fatal"]] == [], "a disk may be slow on a busy machine"
    rows = said["rows"]
    assert [r["rank"] for r in rows] == list(range(128))
    assert {(r["node"], r["gpu"]) for r in rows} == {(f"node{n}", str(g)) for n in range(1, 17) for g in range(8)}
    assert {r["gpus"] for r in rows} == {8}
    assert sum(r["write_MB_s"] is not None for r in rows) == 16, "one write a node"
    print(f"128 processes looked at their nodes in {time.monotonic() - begin:.0f} s")


def test_the_node_that_has_lost_a_gpu_is_named(
    cluster: Cluster, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(NVIDIA_SMI)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    step = [*STEP, "--nodelist=node[4-6]", "--nodes=3", "--ntasks-per-node=8", "--gres=gpu:8"]
    done = subprocess.run(
        [*step, *PREFLIGHT, "--dir", str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "node5 does not show GPU 3 that SLURM granted; it shows 7" in done.stderr
    assert "cluster.exclude=node5 (sbatch --exclude=node5)" in done.stderr
    assert "node4 " not in done.stderr
    missing = [line.split()[:3] for line in done.stdout.splitlines() if "missing" in line]
    assert missing == [["11", "node5", "3"]]


def test_a_node_whose_ranks_do_not_answer_is_named(cluster: Cluster, tmp_path: Path, root: Path) -> None:
    frozen = (
        f'[ "$SLURMD_NODENAME" = node2 ] && exec sleep 20; exec {" ".join(PREFLIGHT)} --dir {tmp_path} --patience 6'
    )
    step = [*STEP, "--nodelist=node[1-3]", "--nodes=3", "--ntasks-per-node=2", "sh", "-c", frozen]
    done = subprocess.run(step, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ranks 2-3 on node2 did not answer within 6 s" in done.stderr
    assert "cluster.exclude=node2" in done.stderr
