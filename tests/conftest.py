"""Shared by all tests."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("multitrain", deadline=None, print_blob=True)  # a busy machine is no failure
settings.load_profile("multitrain")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


SHARED = ROOT.parent / "shared"


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(ROOT / "tests/published", id="small"),
        *(pytest.param(f, id="whole") for f in [SHARED / "golden"] if f.is_dir()),
    ],
)
def published(request: pytest.FixtureRequest) -> Path:
    """What the published code computed, for `benchmarks.published`: the folder here, and the developers' where it is there."""
    folder: Path = request.param
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], Path]) -> Path:
    """A folder that the first of pytest-xdist's workers fills, and that all of them read."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return write(factory.mktemp(name))
    folder = factory.getbasetemp().parent / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            write(factory.mktemp(name)).rename(folder)
    return folder


@pytest.fixture(scope="session")
def joint_pyth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model in the published layout: random weights, small hidden layers, the solver's options of a training run."""
    from support import write_joint_pyth

    return write_joint_pyth(tmp_path_factory.mktemp("joint") / "tiny_multi.pyth")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Playable files of unusual kinds, made here; beside them the developers' where they are there. Read only."""
    from material import write_odd

    return made_once(tmp_path_factory, "odd", write_odd)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken files, made here; beside them the developers' where they are there. Read only."""
    from material import write_broken

    return made_once(tmp_path_factory, "broken", write_broken)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material that only lies beside the developers' checkouts; where it is not there, tests of it are not collected.

    Each of them has a twin that makes its own files.
    """
    return SHARED


LONG = (
    "slurm/",
    "fuzz/",
    "test_packaging",
    *(f"engine/test_{name}" for name in ("counts", "elastic", "faults", "memory", "purge", "ref", "requeue", "resume")),
    *(f"engine/test_{name}" for name in ("skips", "slow", "stopping", "stor", "suspended", "update")),
    *(f"launch/test_{name}" for name in ("demo", "dry_run", "hang", "hosts", "local", "memory_estimate", "preflight")),
    *(f"launch/test_{name}" for name in ("supervisor", "sweep")),
    *(f"data/test_{name}" for name in ("decode", "large", "loader", "packs", "remote", "staging")),
    *(f"data/tools/test_{name}" for name in ("commands", "nothing_destroyed", "whole")),
    *(f"evaluation/test_{name}" for name in ("broken", "embed", "multi_label", "odd_videos", "predictor", "report")),
    *(f"evaluation/test_{name}" for name in ("two_users", "validation_images")),
    "model/test_co",
)
"""Beginnings of the files whose tests start processes or train for seconds; `make test-fast` leaves them out."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks: `slow` tests run only when MULTITRAIN_SLOW=1; `long` ones are left out by `make test-fast`.

    The tests on real controllers come first: they wait most, beside a worker that computes. The long ones are next, so that no
    worker is left with one at the end.
    """
    for item in items:
        name = item.path.relative_to(ROOT / "tests").as_posix()
        if name.startswith(LONG):
            item.add_marker(pytest.mark.long)
        if item.get_closest_marker("slow") and os.environ.get("MULTITRAIN_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow; set MULTITRAIN_SLOW=1 to run it"))
    if not (SHARED / "bugs").is_dir():
        beside = [item for item in items if "shared" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=beside)
        items[:] = [item for item in items if item not in beside]
    slurm = ROOT / "tests/slurm"
    items.sort(key=lambda item: (not item.path.is_relative_to(slurm), item.get_closest_marker("long") is None))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three little datasets of real H.264 files: 14, 10 and 8 videos; one name has a dot, file names have blanks."""
    from support import write_dataset

    folder = tmp_path_factory.mktemp("tiny_data")
    for seed, (name, videos, classes) in enumerate([("stride", 14, 5), ("segment", 10, 3), ("with.dot", 8, 4)]):
        write_dataset(folder / name, videos, classes, seed)
    return folder
