"""Copy the checkout's code into a run's folder, which every start of the run uses; describe the environment as text."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from multitrain.config import ConfigError, config_folder

ROOT = Path(__file__).resolve().parents[1]
"""Root of the checkout, or of the run's own code."""
SNAPSHOT_PATHS = ("multitrain", "launch", "configs", "slurm", "pyproject.toml")
MAX_FILE_BYTES = 1 << 20
"""Largest file of a snapshot, in bytes."""


def is_own_code(run: Path) -> bool:
    """Whether this process runs the code in the folder of `run`, by whatever path or link that was given."""
    return (run / "code").resolve() == ROOT


def snapshot(
    target: Path, config_dirs: Sequence[str] = (), backbone: str | None = None, earlier: Path | None = None
) -> None:
    """Copy the code to `target`: files that git tracks, and new Python, shell and YAML files that it does not ignore; without git,
    all source files. Hidden files and links are left out.

    The user's own config groups go to ``target/config_dirs/0``, ``1`` … Only groups with the name of a shipped group are copied,
    since the folder may hold anything else.

    Args:
        target: the new folder.
        config_dirs: folders with the user's own config groups.
        backbone: `model.backbone` of the run; the user's file or package goes to `target`, where every start of the run finds it first.
        earlier: an older snapshot of the run, which has a copy of that file.

    Raises:
        ConfigError: a file is too large for code.
    """
    for file in sources():
        _copy(ROOT / file, target / file)
    configs = config_folder()
    if configs != ROOT / "configs":  # installed, not a checkout
        for file in _plain_files(configs, "*.yaml"):
            _copy(file, target / "configs" / file.relative_to(configs))
    own = own_module(backbone, [*config_dirs, *_python_path(), *([str(earlier)] if earlier else [])])
    if own is not None:
        for file in [own] if own.is_file() else _plain_files(own, "*.py"):
            _copy(file, target / file.relative_to(own.parent))
    groups = sorted(p.name for p in configs.iterdir() if p.is_dir())
    for i, folder in enumerate(config_dirs):
        for group in groups:
            for file in _plain_files(Path(folder) / group, "*.yaml"):
                _copy(file, target / "config_dirs" / str(i) / file.relative_to(folder))


def own_module(backbone: str | None, folders: Sequence[str]) -> Path | None:
    """The user's file ``package.py`` or folder ``package`` of ``model.backbone=package.module:function``; None if it needs none.

    Raises:
        ConfigError: it is in none of the folders.
    """
    if backbone is None or ":" not in backbone:
        return None
    name = backbone.partition(":")[0].partition(".")[0]
    for folder in folders:
        for found in (Path(folder) / name, Path(folder) / f"{name}.py"):
            if found.is_file() or (found.is_dir() and any(found.glob("*.py"))):
                return found.absolute()
    raise ConfigError(
        f"model.backbone={backbone}: no {name}.py or folder {name} in {', '.join(folders) or 'the Python path'}; "
        "give its folder: --config-dir FOLDER, or PYTHONPATH=FOLDER"
    )


def _python_path() -> list[str]:
    return [
        folder
        for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if folder and Path(folder).resolve() != ROOT
    ]


def _copy(file: Path, copy: Path) -> None:
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ConfigError(
            f"{file} has {size / 1e6:.1f} MB, and the snapshot of the code accepts files up to {MAX_FILE_BYTES / 1e6:.1f} MB: "
            "move it out of the code, or add it to .gitignore"
        )
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)


def _plain_files(folder: Path, pattern: str) -> list[Path]:
    """The files below `folder`, without links, hidden files, and the content of linked or hidden folders."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    found = [p for p in folder.glob(pattern) if p.is_file() and not p.is_symlink() and not p.name.startswith(".")]
    for inner in folder.iterdir():
        if not inner.name.startswith(".") and inner.name != "__pycache__":
            found += _plain_files(inner, pattern) if inner.is_dir() else []
    return sorted(found)


def sources() -> list[Path]:
    """The files of a snapshot, relative to the root of the checkout."""
    tracked = _git("ls-files", "--cached", "-z", "--", *SNAPSHOT_PATHS)
    if tracked:
        new = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *SNAPSHOT_PATHS) or ""
        files = [Path(name) for name in tracked.split("\0") if name]
        files += [Path(n) for n in new.split("\0") if n.endswith((".py", ".sh", ".yaml")) and "/." not in f"/{n}"]
    else:
        found = [
            p
            for name in SNAPSHOT_PATHS
            for p in ([ROOT / name] if (ROOT / name).is_file() else _plain_files(ROOT / name, "*"))
        ]
        kept = (p for p in found if p.suffix in (".py", ".yaml", ".toml", ".typed", ".txt", ".json", ".sh", ""))
        files = [p.relative_to(ROOT) for p in kept]
    return sorted({f for f in files if (ROOT / f).is_file() and not (ROOT / f).is_symlink()})


def digest(code: Path) -> str:
    """A short hash of the names and contents of the files under `code`."""
    total = hashlib.sha256()
    for file in sorted(p for p in code.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        total.update(f"{file.relative_to(code)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def environment() -> str:
    """Python, machine, git revision and installed packages, as text."""
    revision = (_git("rev-parse", "HEAD") or "").strip()
    changed = len((_git("status", "--porcelain") or "").splitlines())
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}, key=str.lower)
    return "\n".join(
        [
            f"time      {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
            f"host      {platform.node()}",
            f"platform  {platform.platform()}",
            f"python    {platform.python_version()} {sys.executable}",
            f"git       {revision or 'not a checkout'}{f' with {changed} changed files' if changed else ''}",
            *packages,
            "",
        ]
    )


def _git(*arguments: str) -> str | None:
    """The output of git in the checkout; None without git, or outside a checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
