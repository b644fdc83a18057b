"""Shared by all tests."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def joint_pyth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model in the published layout: random weights, small hidden layers, the solver's options of a training run."""
    from support import write_joint_pyth

    return write_joint_pyth(tmp_path_factory.mktemp("joint") / "tiny_multi.pyth")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Playable files of unusual kinds, made here; beside them the developers' where they are there."""
    from material import write_odd

    return write_odd(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Broken files, made here; beside them the developers' where they are there."""
    from material import write_broken

    return write_broken(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material that only lies beside the developers' checkouts; where it is not there, tests of it are not collected.

    Each of them has a twin that makes its own files.
    """
    return SHARED


LONG = (
    *(
        "slurm/",
        "engine/test_resume",
        "engine/test_stopping",
        "engine/test_update",
        "engine/test_refusing",
        "engine/test_elastic",
    ),
    *(
        "engine/test_slow",
        "engine/test_requeue",
        "engine/test_skips",
        "engine/test_counts",
        "engine/test_faults",
        "fuzz/",
    ),
    *("launch/test_demo", "launch/test_supervisor", "launch/test_preflight", "launch/test_sweep", "launch/test_local"),
    *(
        "data/test_loader",
        "evaluation/test_report",
        "evaluation/test_broken",
        "evaluation/test_predictor",
        "model/test_co",
    ),
    *(
        "launch/test_memory_estimate",
        "evaluation/test_multi_label",
        "evaluation/test_embed",
        "test_packaging",
        "data/test_decode",
    ),
)
"""Beginnings of the files whose tests start processes or train for seconds; `make test-fast` leaves them out."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks: `slow` tests run only when MULTITRAIN_SLOW=1; `long` ones are left out by `make test-fast`.

    The tests on real controllers come first: they wait most, beside a worker that computes.
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
    items.sort(key=lambda item: not item.path.is_relative_to(ROOT / "tests/slurm"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three little datasets of real H.264 files: 14, 10 and 8 videos; one name has a dot, file names have blanks."""
    from support import write_dataset

    folder = tmp_path_factory.mktemp("tiny_data")
    for seed, (name, videos, classes) in enumerate([("stride", 14, 5), ("segment", 10, 3), ("with.dot", 8, 4)]):
        write_dataset(folder / name, videos, classes, seed)
    return folder
