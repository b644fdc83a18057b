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


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material that only lies beside the developers' checkouts: golden values, real, odd and broken video files."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"the developers' test material is not at {folder}; everything else is tested without it")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `slow` run only when MULTITRAIN_SLOW=1."""
    if os.environ.get("MULTITRAIN_SLOW") == "1":
        return
    skip = pytest.mark.skip(reason="slow; set MULTITRAIN_SLOW=1 to run it")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three little datasets of real H.264 files: 14, 10 and 8 videos; one name has a dot, file names have blanks."""
    from support import write_dataset

    folder = tmp_path_factory.mktemp("tiny_data")
    for seed, (name, videos, classes) in enumerate([("stride", 14, 5), ("segment", 10, 3), ("with.dot", 8, 4)]):
        write_dataset(folder / name, videos, classes, seed)
    return folder
