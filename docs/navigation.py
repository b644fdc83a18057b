"""The order of the pages for mkdocs. A page that is not named here stands at the end of its folder, so none is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

START = [
    "index.md",
    "install.md",
    "own-videos.md",
    "data.md",
    "million.md",
    "backbones.md",
    "weights.md",
    "slurm.md",
    "preflight.md",
]
START += ["gpu.md", "sweeps.md", "watching.md", "sharing.md"]
UNDERSTANDING = ["interruption.md", "guarantees", "design.md", "parity.md", "differences.md", "comparison.md"]
REFERENCE = ["configuration.md", "troubleshooting.md", "contributing.md"]


def on_config(config: Any) -> Any:
    """Fill in `nav` from what is there."""
    folder = Path(config["docs_dir"])
    named = {*START, *UNDERSTANDING, *REFERENCE}
    others = sorted(p.name for p in folder.iterdir() if p.name not in named and (p.is_dir() or p.suffix == ".md"))
    sections = {"Using it": START, "Understanding it": UNDERSTANDING, "Reference": [*REFERENCE, *others]}
    config["nav"] = [{title: _pages(folder, names)} for title, names in sections.items()]
    return config


def _pages(folder: Path, names: list[str]) -> list[Any]:
    pages: list[Any] = []
    for name in names:
        place = folder / name
        if place.is_dir():
            inside = [f"{name}/{p.name}" for p in sorted(place.glob("*.md"), key=lambda p: (p.stem != "index", p.name))]
            pages += [{name.capitalize(): inside}] if inside else []
        elif place.is_file():
            pages.append({"Start": name} if name == "index.md" else name)
    return pages
