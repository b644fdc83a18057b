"""The layers of the packages: which may import which, and what stays light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = [
    {"text"},
    {"errors"},
    {"files", "intervals", "lease", "plot_style"},
    {"config", "order"},
    {"cluster", "loss", "model"},
    {"records"},
    {"data", "interop"},
    {"evaluation"},
    {"engine"},
    {"report"},
    {"train", "sweep", "cli", "commands", "launch", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "deepspeed": {"multitrain/engine/deepspeed.py"},
    "decord": {"multitrain/data/decode/decord.py"},
    "submitit": {"launch/slurm.py"},
}


def files(root: Path) -> list[Path]:
    return sorted([*root.glob("multitrain/**/*.py"), *root.glob("launch/**/*.py")])


def package(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return parts[0] if parts[0] == "launch" else parts[1]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_packages_import_only_from_layers_below(root: Path) -> None:
    wrong = []
    for path in files(root):
        relative = path.relative_to(root)
        me = package(relative)
        for name in imports(path):
            parts = name.split(".")
            other = {"launch": "launch", "multitrain": parts[1] if len(parts) > 1 else ""}.get(parts[0], "")
            if me in LAYER and other in LAYER and other != me and LAYER[other] >= LAYER[me]:
                wrong.append(f"{relative} imports {name}")
    assert wrong == []


def test_launch_imports_nothing_that_computes(root: Path) -> None:
    allowed = {"config", "order", "cluster", "records", "report", "errors", "files", "lease", "plot_style", "text", ""}
    for path in root.glob("launch/**/*.py"):
        for name in imports(path):
            if name.startswith("multitrain"):
                assert [*name.split("."), ""][1] in allowed, f"{path.name} imports {name}"


def test_each_heavy_library_is_imported_in_one_place(root: Path) -> None:
    for path in files(root):
        relative = str(path.relative_to(root))
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or relative in allowed, f"{relative} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "multitrain",
        "multitrain.config",
        "multitrain.order",
        "multitrain.cluster.slurm",
        "multitrain.records.events",
        "multitrain.report.status",
        "multitrain.data.catalog",
        "multitrain.engine.interruption",
        "multitrain.cli",
        "launch.submit",
    ],
)
def test_what_must_be_light_imports_no_torch(root: Path, module: str) -> None:
    heavy = "[m for m in ('torch', 'cv2', 'av', 'deepspeed') if m in sys.modules]"
    code = f"import sys, {module}; sys.exit(' '.join({heavy}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{module} imports {done.stderr}"


def test_the_picture_of_the_packages_is_that_of_the_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "docs"))
    packages = importlib.import_module("packages")
    assert packages.PICTURE.read_text() == packages.svg(packages.imports()), "run: python docs/packages.py"
