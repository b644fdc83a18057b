"""Tables and plots of all results: benchmarks/README.md, benchmarks/plots/, and the performance section of README.md.

python -m benchmarks.report
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

_HEAD = "| figure | ours | baseline | unit | ratio | at least | aim | reached |\n|---|---|---|---|---|---|---|---|"
_BOUND = re.compile(r"^(>=|<=|<|>)\s*([0-9][0-9_,.]*)\s*(.*)$")

Result = dict[str, Any]


def load(folder: Path = HERE / "results") -> list[Result]:
    """All results, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def reached(row: dict[str, Any], bound: str) -> bool | None:
    """Whether a row meets a bound such as ``">= 4.1×"`` (of the ratio) or ``"<= 1.5 ms"`` (of ours); None without a bound."""
    match = _BOUND.match(bound.strip())
    if match is None:
        return None
    sign, number, unit = match[1], float(match[2].replace(",", "").replace("_", "")), match[3]
    value = row["ratio"] if unit.startswith(("×", "x")) else row["ours"]
    if value is None:
        return None
    return bool(value >= number if sign[0] == ">" else value <= number)


def grade(row: dict[str, Any]) -> str:
    """Whether the bounds are met: "aim", "yes" or "**no**"; empty without a bound."""
    least, aim = reached(row, row["target"]), reached(row, row["aim"])
    if aim and least is not False:
        return "aim"
    return {True: "yes", False: "**no**", None: ""}[least]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, notes below."""
    lines, notes = [_HEAD], []
    for row in rows:
        mark = ""
        if row["note"]:
            notes.append(row["note"])
            mark = f" <sup>{len(notes)}</sup>"
        ratio = "" if row["ratio"] is None else f"{_figure(row['ratio'])}×"
        cells = [row["figure"] + mark, _figure(row["ours"]), _figure(row["baseline"]), row["unit"], ratio]
        lines.append("| " + " | ".join([*cells, row["target"], row["aim"], grade(row)]) + " |")
    return "\n".join(lines) + "".join(f"\n\n<sup>{n}</sup> {note}" for n, note in enumerate(notes, 1))


def _figure(value: float | None) -> str:
    """Three significant digits, without exponents."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = max(0, 2 - len(f"{int(abs(value))}") + (1 if abs(value) < 1 else 0) + 1)
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text and float(text) == int(float(text)) else text


def section(results: Sequence[Result]) -> str:
    """The performance section of README.md: all measurements with a target, and a link to the others."""
    rows = [row for result in results for row in result["rows"] if row["target"]]
    lines = ["| figure | ours | baseline | unit | ratio | at least | reached |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{_figure(row['ratio'])}×"
        cells = [row["figure"], _figure(row["ours"]), _figure(row["baseline"]), row["unit"], ratio, row["target"]]
        lines.append("| " + " | ".join([*cells, grade(row)]) + " |")
    grades = [grade(row) for row in rows]
    kept, beyond = sum(v in ("yes", "aim") for v in grades), grades.count("aim")
    said = f"{kept} of {len(rows)} figures are reached, {beyond} of them with the aim set beyond"
    sizes = {result["size"] for result in results}
    how = (
        "`make bench`"
        if sizes <= {"small"}
        else "`make bench-full`"
        if sizes == {"full"}
        else "`make bench` and `make bench-full`"
    )
    shown = [result for result in results if any(row["target"] for row in result["rows"])]
    places = "; ".join(sorted({result["hardware"] for result in shown}))
    return (
        f"Measured by {how} on {places}; baselines are plain formulations of the published code's arithmetic, in the same run "
        f"([how, plots, commands](benchmarks/README.md)). {said}.\n\n" + "\n".join(lines)
    )


def page(results: Sequence[Result]) -> str:
    """benchmarks/README.md."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.report` from `results/*.json`; do not edit. `make bench` measures everything at sizes "
        "that fit a machine of two cores, `make bench-full` at the real ones. Ratios are of one run, ours and the baseline taking "
        "turns, one thread, CPU seconds; the baselines in `baseline/` are plain formulations of what the published code computes. "
        "Run beside the published code itself on real clips, the loader's baseline took 8 to 11 % longer than it, so that the "
        "loader's ratios are up to a tenth too good; those of the model and of test views took 0.95 to 1.00 of its time.",
    ]
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        parts.append(f"## {result['name']}")
        parts.append(
            f"`{result['command']}` · {result['size']} sizes · {result['date']}\n<br>{result['hardware']} · {versions}"
        )
        if result["rows"]:
            parts.append(table(result["rows"]))
        if result.get("table"):
            parts.append(result["table"])
        for number, drawn in enumerate(result.get("plots", ())):
            parts.append(f"![{drawn['title']}](plots/{result['name']}-{number}.svg)")
            if drawn["note"]:
                parts.append(drawn["note"])
    return "\n\n".join(parts) + "\n"


def with_section(readme: str, results: Sequence[Result]) -> str:
    """README.md with the section between its markers. Raises ValueError when they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section(results)}\n{END}{after}"


def draw(results: Sequence[Result], folder: Path) -> None:
    """Every plot as an SVG file. Needs matplotlib (the extra `report`)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "multitrain", "svg.fonttype": "none", "font.size": 9, "font.sans-serif": ["DejaVu Sans"]}
    )
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for result in results:
        for number, drawn in enumerate(result.get("plots", ())):
            figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
            for label, points in drawn["lines"].items():
                marker = "o" if len(points) < 20 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3.5, label=label)
            axes.set(title=drawn["title"], xlabel=drawn["x"], ylabel=drawn["y"])
            _scale(axes, drawn)
            axes.grid(alpha=0.25)
            if len(drawn["lines"]) > 1:
                axes.legend(frameon=False)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            small = re.sub(r"(\.\d)\d{3,}", r"\1", re.sub(r"\s*\n\s*", "\n", text.getvalue()))  # coordinates, no labels
            (folder / f"{result['name']}-{number}.svg").write_text(small, encoding="utf-8")
            pyplot.close(figure)


def _scale(axes: Any, drawn: dict[str, Any]) -> None:
    """Logarithmic axes as asked; linear ones start at zero."""
    if "x" in drawn["log"]:
        axes.set_xscale("log")
        ticks = sorted({p[0] for points in drawn["lines"].values() for p in points})
        if len(ticks) <= 9:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
    if "y" in drawn["log"]:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def main() -> int:
    """Write everything."""
    results = load()
    (HERE / "README.md").write_text(page(results), encoding="utf-8")
    README.write_text(with_section(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, HERE / "plots")
    print(f"{HERE / 'README.md'}, and the performance section of {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
