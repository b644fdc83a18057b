"""A real SLURM for the tests in this folder, started once: sixteen virtual nodes of eight GPUs on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.drill import DEVCLUSTER, Cluster, Runs, reason_to_skip


@pytest.fixture(scope="session")
def devcluster() -> Iterator[Cluster]:
    """The cluster; SLURM_CONF points to it for the rest of the session."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(f"no SLURM to test on: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="mtdc-", dir="/tmp"))
    start = [str(DEVCLUSTER / "start"), "--nodes", "16", "--gpus", "8", "--dir", str(folder / "slurm")]
    done = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    configuration = done.stdout.strip().removeprefix("export SLURM_CONF=")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = configuration
    try:
        yield Cluster(folder / "slurm", configuration)
    finally:
        subprocess.run([str(DEVCLUSTER / "stop"), "--dir", str(folder / "slurm")], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def cluster(devcluster: Cluster) -> Iterator[Cluster]:
    """The cluster with an empty queue, before and after."""
    devcluster.clear()
    yield devcluster
    devcluster.clear()


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path, tiny_data: Path) -> Runs:
    """Submits runs to the cluster, into a folder of the test's own."""
    return Runs(cluster, tmp_path / "runs", tiny_data)


@pytest.fixture(scope="session")
def reference(devcluster: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run, placed by SLURM over two nodes."""
    runs = Runs(devcluster, tmp_path_factory.mktemp("reference"), tiny_data)
    run, job = runs.submit("undisturbed")
    runs.finish(run, job)
    assert len(runs.metrics(run)) == 12
    assert {m["world_size"] for m in runs.metrics(run)} == {2}
    return run
