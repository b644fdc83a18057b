"""The accuracy under corruptions of the test videos, by kind and strength: a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitrain.data.corruptions import NAMES, Corruption
from multitrain.files import OutputFolder
from multitrain.plot_style import cycle, figure, label, png
from multitrain.records import jsonl
from multitrain.text import table

FOLDER = "perturb"
"""Folder inside that of the undisturbed test."""

Results = Mapping[str, Mapping[str, Any]]
"""Results by dataset, as in ``metrics.json``."""


def folder_of(out: Path, corruption: Corruption) -> Path:
    """Where the test under a corruption goes; `out`: folder of the undisturbed test."""
    return out / FOLDER / f"{corruption.name}-{corruption.strength}"


def corruptions(names: Sequence[str], strengths: Sequence[int]) -> list[Corruption]:
    """Every kind in every strength; ``all`` stands for every kind."""
    kinds = NAMES if "all" in names else dict.fromkeys(names)
    return [Corruption(name, strength) for name in kinds for strength in sorted(set(strengths))]


def write(out: Path, clean: Results, found: Mapping[Corruption, Results]) -> str:
    """Write ``perturb/robustness.json``, ``.txt`` and ``.png`` for tests under corruptions; returns the table.

    Args:
        out: folder of the undisturbed test.
        clean: its results.
        found: those under each corruption.
    """
    place = _place(out)
    values = {
        dataset: {
            "undisturbed": _value(result),
            "corrupted": {name: _by_strength(found, name, dataset) for name in _names(found)},
        }
        for dataset, result in clean.items()
        if _value(result) is not None
    }
    shown = text(values)
    content = {"measure": "top1, or map with several labels, percent", "datasets": values}
    place.write_text(f"{FOLDER}/robustness.json", jsonl.dumps(content, indent=1) + "\n")
    place.write_text(f"{FOLDER}/robustness.txt", shown + "\n")
    place.write_bytes(f"{FOLDER}/robustness.png", plot(values))
    return shown


def check(out: Path, asked: Sequence[Corruption]) -> None:
    """Raise ConfigError, before anything is tested, if another file or a link is in the way of an output."""
    place = _place(out)
    for name in FILES:
        place.check(f"{FOLDER}/{name}")
    for corruption in asked:
        place.target(folder_of(out, corruption).relative_to(out))


FILES = ("robustness.json", "robustness.txt", "robustness.png")


def _place(out: Path) -> OutputFolder:
    return OutputFolder(out, "evaluate --perturb")


def _names(found: Mapping[Corruption, Results]) -> list[str]:
    return list(dict.fromkeys(c.name for c in found))


def _by_strength(found: Mapping[Corruption, Results], name: str, dataset: str) -> dict[str, float | None]:
    return {str(c.strength): _value(results.get(dataset, {})) for c, results in found.items() if c.name == name}


def _value(result: Mapping[str, Any]) -> float | None:
    value = result.get("map") if result.get("map") is not None else result.get("top1")
    return None if value is None else float(value)


def text(values: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows: dataset and kind; columns: strengths, their mean, and its share of the undisturbed accuracy."""
    strengths = sorted({s for v in values.values() for kind in v["corrupted"].values() for s in kind}, key=int)
    header = ["dataset", "corruption", "none", *strengths, "mean", "kept"]
    rows = []
    for dataset, v in values.items():
        for name, by_strength in v["corrupted"].items():
            known = [value for value in by_strength.values() if value is not None]
            mean = sum(known) / len(known) if known else None
            cells = [_shown(v["undisturbed"]), *(_shown(by_strength.get(s)) for s in strengths), _shown(mean)]
            kept = f"{mean / v['undisturbed']:.0%}" if mean is not None and v["undisturbed"] else "–"
            rows.append([dataset, name, *cells, kept])
    return table(header, rows, left=2)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def plot(values: Mapping[str, Mapping[str, Any]]) -> bytes:
    """One panel per dataset: accuracy by strength, a line per kind, as PNG. 0 is the undisturbed test."""
    drawn, axes = figure(len(values), 1, width=5.5 * len(values) + 1.5, height=4.2)
    for axis, (dataset, v) in zip(axes[0], values.items(), strict=True):
        kinds = v["corrupted"]
        for colour, (name, by_strength) in zip(cycle(len(kinds)), kinds.items(), strict=True):
            points = [(int(s), value) for s, value in by_strength.items() if value is not None]
            axis.plot(
                *zip((0, v["undisturbed"]), *sorted(points)), marker="o", markersize=3.5, color=colour, label=name
            )
        axis.set_title(label(dataset), loc="left", size=10)
        axis.set_xlabel("strength (0: undisturbed)")
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 102)
        axis.set_xticks(range(6))
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(drawn)
