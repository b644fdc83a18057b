"""Draw the packages and their imports as docs/assets/packages.svg: ``python docs/packages.py``.

A package stands above all that it imports. An arrow is left out where a longer way says the same.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "packages.svg"
TOP = {"cli": "commands", "__main__": "commands", "sweep": "train"}
"""Modules beside the packages that are drawn as part of another box."""
WIDTH, HEIGHT, ACROSS, DOWN = 92, 30, 24, 44

Graph = Mapping[str, set[str]]


def imports() -> dict[str, set[str]]:
    """The packages and the root's modules, each with those that it imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for path in sorted([*ROOT.glob("multitrain/**/*.py"), *ROOT.glob("launch/*.py")]):
        relative = path.relative_to(ROOT).with_suffix("").parts
        me = _box(".".join(relative))
        if me is None:
            continue
        others = found.setdefault(me, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            others |= {box for name in names if (box := _box(name)) not in (None, me)}  # type: ignore[misc]
    return {me: others & set(found) for me, others in found.items()}


def _box(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    if parts[0] != "multitrain" or len(parts) < 2 or parts[1] == "__init__":
        return None
    return TOP.get(parts[1], parts[1])


def levels(graph: Graph) -> dict[str, int]:
    """The level of each package: one above the highest that it imports."""
    known: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in known:
            known[name] = 1 + max((level(other) for other in graph[name]), default=-1)
        return known[name]

    return {name: level(name) for name in graph}


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """The imports that no longer way implies."""
    below: dict[str, set[str]] = {}
    for name in sorted(graph, key=levels(graph).__getitem__):
        below[name] = set().union(*({other} | below[other] for other in graph[name]))
    return [
        (name, other)
        for name in sorted(graph)
        for other in sorted(graph[name])
        if not any(other in below[between] for between in graph[name])
    ]


def svg(graph: Graph) -> str:
    """The picture."""
    level = levels(graph)
    rows = [sorted(n for n in graph if level[n] == i) for i in range(max(level.values()), -1, -1)]
    width = max(len(row) for row in rows) * (WIDTH + ACROSS) + ACROSS
    place: dict[str, tuple[int, int]] = {}
    for y, row in enumerate(rows):
        left = (width - len(row) * (WIDTH + ACROSS) + ACROSS) // 2
        place |= {name: (left + x * (WIDTH + ACROSS), 12 + y * (HEIGHT + DOWN)) for x, name in enumerate(row)}
    height = 12 + len(rows) * (HEIGHT + DOWN) - DOWN + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for name, other in arrows(graph):
        (x, y), (u, v) = place[name], place[other]
        lines.append(f'<path d="M{x + WIDTH // 2} {y + HEIGHT} L{u + WIDTH // 2} {v}" stroke="#8b949e" fill="none"/>')
    for name, (x, y) in sorted(place.items()):
        lines.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#eef4fb" stroke="#0072b2"/>'
        )
        lines.append(f'<text x="{x + WIDTH // 2}" y="{y + HEIGHT // 2 + 4}" fill="#24292f">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg(imports()))
