"""A real SLURM for the tests in this folder, started once: sixteen virtual nodes of eight GPUs on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.drill import UPDATES, Cluster, Runs, reason_to_skip, started


@pytest.fixture(scope="session")
def devcluster() -> Iterator[Cluster]:
    """The cluster; SLURM_CONF points to it for the rest of the session."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(f"no SLURM to test on: {reason}")
    with started(16, 8) as (running, _):
        yield running


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
    assert len(runs.metrics(run)) == UPDATES
    assert {m["world_size"] for m in runs.metrics(run)} == {2}
    return run
