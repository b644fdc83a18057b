"""The ways of installing agree with each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

PYTHONS = ("3.10", "3.11", "3.12")


def project(root: Path) -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def makefile_torch(root: Path) -> str:
    found = re.search(r"^TORCH\s*\?=\s*(\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert found
    return found.group(1)


def test_conda_installs_what_make_installs(root: Path) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert makefile_torch(root) in pip
    assert "--editable .[all,dev]" in pip


def test_a_plain_install_resolves_to_the_torch_that_the_suite_ran_with(root: Path) -> None:
    """Newer versions were not tried; 2.9 computes conv3d in bf16 wrongly and slowly."""
    (torch,) = (r for r in map(Requirement, project(root)["dependencies"]) if r.name == "torch")
    tested = Requirement(makefile_torch(root))
    version = Version(next(iter(tested.specifier)).version)
    assert version in torch.specifier
    assert Version(f"{version.major}.{version.minor + 1}.0") not in torch.specifier
    assert Version(f"{version.major + 1}.0.0") not in torch.specifier
    for broken in ("2.9.0", "2.9.1"):
        assert Version(broken) not in torch.specifier


def test_all_ways_of_installing_take_the_same_pythons(root: Path) -> None:
    table = project(root)
    prefix = "Programming Language :: Python :: "
    assert tuple(c.removeprefix(prefix) for c in table["classifiers"] if c.startswith(prefix)) == PYTHONS
    takes = SpecifierSet(table["requires-python"])
    offered = [f"3.{minor}" for minor in range(6, 20)]
    assert tuple(python for python in offered if f"{python}.1" in takes) == PYTHONS
    check = re.search(r"\((3), (\d+)\) <= sys\.version_info < \((3), (\d+)\)", (root / "Makefile").read_text())
    assert check
    assert [int(n) for n in check.groups()] == [3, 10, 3, 13]
    for page in ("README.md", "docs/install.md", "docs/index.md"):
        assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (root / page).read_text(), page


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of a fresh virtual environment with a wheel of this checkout; the libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind
    for name in ("multitrain", "launch", "configs", "slurm"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    run(folder, sys.executable, "-m", "venv", "--without-pip", "venv")
    python = folder / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    text = run(
        folder, *pip, "wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-index", "-w", "out", "./source"
    )
    assert "Deprecat" not in text, text[text.index("Deprecat") - 500 :][:2000]
    (wheel,) = folder.glob("out/*.whl")
    run(folder, *pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    shutil.rmtree(source)
    (site,) = folder.glob("venv/lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def names(folder: Path) -> set[str]:
    """Of all files below `folder` but compiled ones."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def run(folder: Path, *command: str | Path) -> str:
    """Output of a command that must succeed, called in `folder` as from a new shell."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SLURM_", "PIP_", "MULTITRAIN_"))}
    done = subprocess.run(
        command, cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_an_installed_wheel_submits_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = run(tmp_path, installed / "python", "-c", "import multitrain, launch; print(multitrain.__file__)")
    assert str(installed.parent) in where
    text = run(
        tmp_path,
        installed / "multitrain",
        "submit",
        "nodes=2",
        "gpus=8",
        "name=first",
        "dry_run=true",
        "cluster.check_data=false",
    )
    assert "#SBATCH --nodes=2" in text
    assert "gpu" in text
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    assert "RUN" in run(tmp_path, installed / "multitrain", "submit", "--help")
    run(tmp_path, installed / "multitrain", "sweep", "--help")


def test_an_installed_wheel_has_all_that_the_checkout_reads(installed: Path, root: Path) -> None:
    (package,) = installed.parent.glob("lib/python*/site-packages/multitrain")
    for folder in ("configs", "slurm"):
        assert names(package / folder) == names(root / folder)
    assert os.access(package / "slurm/devcluster/start", os.X_OK)
    data = {p.relative_to(root) for p in (*root.glob("launch/*.json"), *root.glob("launch/*.sh"))} | {
        Path("multitrain/py.typed")
    }
    assert [name for name in data if not (package.parent / name).is_file()] == []


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
