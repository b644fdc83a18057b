"""The ways of installing agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


def makefile_torch(root: Path) -> str:
    found = re.search(r"^TORCH\s*\?=\s*(\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found.group(1)


def test_conda_installs_what_make_installs(root: Path) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert makefile_torch(root) in pip
    assert "--editable .[all,dev]" in pip


def test_every_library_of_the_mission_is_in_an_extra_or_the_core(root: Path) -> None:
    text = (root / "pyproject.toml").read_text()
    for library in ("torch", "decord", "submitit", "hydra-core", "hydra-submitit-launcher", "deepspeed", "fvcore"):
        assert f'"{library}' in text, library
    for library in ("tensorboard", "pytest", "av"):
        assert f'"{library}' in text, library


def test_the_version_is_one(root: Path) -> None:
    import multitrain

    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == multitrain.__version__
    assert f"## [{multitrain.__version__}]" in (root / "CHANGELOG.md").read_text()
