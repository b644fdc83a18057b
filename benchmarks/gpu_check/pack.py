"""Pack the check for a machine without package registries: python -m benchmarks.gpu_check.pack OUT.tar [--python 3.12] [--also NAME …]

The archive holds this checkout's code and the wheels that a machine with PyTorch usually lacks, in the versions installed here. Torch,
numpy and the packages of `THERE` must be on the machine; `--also` adds one that is not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("annotated-types", "av", "hjson", "hydra-core", "omegaconf", "pydantic", "pydantic-core", "typing-inspection")
SOURCES = ("antlr4-python3-runtime", "deepspeed")
"""Packages that the registry has as source only; they are pure Python, and their wheels are built here."""
THERE = (
    *(
        "torch",
        "numpy",
        "opencv-python-headless",
        "pillow",
        "pyyaml",
        "jinja2",
        "safetensors",
        "tqdm",
        "packaging",
        "psutil",
    ),
    *("einops", "msgpack", "ninja", "py-cpuinfo", "typing-extensions"),
)
CODE = ("multitrain", "launch", "configs", "benchmarks", "pyproject.toml", "LICENSE")
MOST = 60
"""MB that the archive may have."""
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
)
FOLDER = "multitrain-gpu-check"
RUN = (
    "tar xf {name} && cd {folder} && python3 -m pip install -q --no-index --no-deps --no-compile --target site wheels/*.whl && "
    "PYTHONPATH=$PWD/site python3 -m benchmarks.gpu_check"
)


def main(arguments: list[str] | None = None) -> int:
    """Write the archive and print its size and the command that unpacks and runs it; 1 if it is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.pack", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.tar")
    parser.add_argument("--python", default="3.12", help="Python of the machine (default 3.12)")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME", help="packages that the machine lacks besides")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder)
        _download([*NEEDED, *given.also], given.python, wheels)
        _build(wheels)
        with tarfile.open(given.out, "w") as archive:
            for wheel in sorted(wheels.glob("*.whl")):
                archive.add(wheel, f"{FOLDER}/wheels/{wheel.name}")
            for file in code():
                archive.add(ROOT / file, f"{FOLDER}/{file}")
    size = given.out.stat().st_size / 1e6
    print(f"{given.out}: {size:.1f} MB. There must be {', '.join(THERE)} on the machine; there:")
    print(RUN.format(name=given.out.name, folder=FOLDER))
    if size > MOST:
        print(f"error: more than {MOST} MB", file=sys.stderr)
    return int(size > MOST)


def code() -> list[str]:
    """The checkout's files that the check needs, without results and plots of other benchmarks."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    left_out = ("benchmarks/results/", "benchmarks/plots/")
    return [name for name in listed.stdout.splitlines() if not name.startswith(left_out) and (ROOT / name).is_file()]


def _pinned(names: list[str]) -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


def _download(names: list[str], python: str, to: Path) -> None:
    """Wheels for x86-64 Linux and CPython `python`."""
    platforms = [word for p in PLATFORMS for word in ("--platform", p)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(to)]
    options = ["--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*pip, *options, *_pinned(names)], check=True)


def _build(to: Path) -> None:
    """Wheels of the pure Python sources, without DeepSpeed's compiled operators."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(to)]
    subprocess.run([*pip, *_pinned(list(SOURCES))], env={**os.environ, "DS_BUILD_OPS": "0"}, check=True)


if __name__ == "__main__":
    sys.exit(main())
