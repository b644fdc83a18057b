"""Checkpoints in the published layout: a joint and a single model that are at hand everywhere, and the published ones beside."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published import SINGLE, SMALL, WHOLE, models

OF_WHOLE = [WHOLE / f"{name}.pyth" for name in models(WHOLE)]


@pytest.fixture(
    scope="session", params=["joint", SINGLE, *OF_WHOLE], ids=lambda p: p if isinstance(p, str) else f"whole-{p.stem}"
)
def pyth(request: pytest.FixtureRequest, joint_pyth: Path) -> Path:
    """A checkpoint in the published layout."""
    if isinstance(request.param, Path):
        return request.param
    return joint_pyth if request.param == "joint" else SMALL / f"{SINGLE}.pyth"
