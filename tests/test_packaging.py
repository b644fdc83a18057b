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


def test_containers_install_what_make_installs_and_bring_the_whole_package(root: Path) -> None:
    dockerfile, definition = (root / f"containers/{n}" for n in ("Dockerfile", "multitrain.def"))
    for file in (dockerfile, definition):
        text = file.read_text()
        assert makefile_torch(root) in text, file.name
        assert "python:3.11-" in text
        assert "--editable '.[all]'" in text
        for part in ("pyproject.toml", "README.md", "multitrain", "launch", "configs"):
            assert re.search(rf"^(COPY .*|\s+){re.escape(part)} ", text, re.MULTILINE), f"{file.name}: {part}"
    packages = [
        set(re.search(r"--no-install-recommends ([\w -]+)", f.read_text())[1].split()) for f in (dockerfile, definition)
    ]  # type: ignore[index]
    assert packages[0] == packages[1]


def test_conda_uses_a_python_that_the_package_takes(root: Path) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (python,) = (d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert f"Programming Language :: Python :: {python.partition('=')[2]}" in (root / "pyproject.toml").read_text()
