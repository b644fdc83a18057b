"""A run as one page to look at: curves, figures on test videos, what was predicted on some of them.

`multitrain report RUN` writes ``RUN/report/report.html`` (self-contained: mail it, open it anywhere), the pictures in it as
PNG files, and ``report.md`` with the tables. What is not there yet, such as an evaluation, is left out.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError, RunConfig, dump, load
from multitrain.evaluation import pictures
from multitrain.evaluation.pictures import Example, History
from multitrain.monitor import events, metrics
from multitrain.monitor.progress import duration


@dataclass(frozen=True)
class Scored:
    """One dataset's test: figures and scores."""

    name: str
    result: Mapping[str, Any]
    """As in ``metrics.json``."""
    labels: np.ndarray
    """int [N], or bool [N, K] for several labels a video."""
    scores: np.ndarray
    """float32 [N, K]."""
    paths: np.ndarray
    """Below the video root, str [N]."""

    @property
    def class_names(self) -> list[str]:
        """Names by label; numbers where names are not known."""
        return self.result.get("class_names") or [str(i) for i in range(self.scores.shape[1])]

    @property
    def chance(self) -> float:
        """Percent that always guessing the most frequent class reaches."""
        frequency = (
            self.labels.mean(0) if self.labels.ndim == 2 else np.bincount(self.labels) / max(len(self.labels), 1)
        )
        return 100 * float(frequency.max(initial=0.0))

    def truth(self, i: int) -> tuple[str, ...]:
        """Names of the true labels of the i-th scored video."""
        own = np.flatnonzero(self.labels[i]) if self.labels.ndim == 2 else [self.labels[i]]
        return tuple(self.class_names[int(k)] for k in own)


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` made."""

    page: Path
    """``report.html``."""
    table: str
    """Accuracy against chance, as text; empty without an evaluation."""
    notes: list[str] = field(default_factory=list)
    """What could not be shown, and why."""


def write_report(
    run_dir: str | Path, *, evaluation: str | Path | None = None, out: str | Path | None = None, clips: int = 4
) -> Report:
    """Write the report of a run.

    Args:
        run_dir: the run's folder.
        evaluation: folder with the ``metrics.json`` of a test; the newest one in the run when not given.
        out: folder to write to; ``RUN/report`` when not given.
        clips: test videos of each dataset that are shown.

    Raises:
        ConfigError: no run there, no evaluation where one was named, or matplotlib missing.
    """
    run_dir = Path(run_dir)
    config = load(run_dir)
    folder = Path(evaluation) if evaluation else newest_evaluation(run_dir)
    tested = read_evaluation(folder) if folder else {}
    history = read_history(run_dir, {name: t.chance for name, t in tested.items()})
    out = Path(out) if out else run_dir / "report"
    out.mkdir(parents=True, exist_ok=True)
    examples, notes = pick_examples(run_dir, config, tested, clips)
    shown = {"curves": pictures.curves(history)} if history.metrics else {}
    if examples:
        shown["clips"] = pictures.film_strips(examples, list(examples[0].predictions))
    matrices = {name: _confusion(t) for name, t in tested.items() if "confusion" in t.result}
    if matrices:
        shown["confusion"] = pictures.confusion(matrices, {name: tested[name].class_names for name in matrices})
    for name, png in shown.items():
        _replace(out / f"{name}.png", png)
    table = accuracy_table(tested)
    summary = summarise(run_dir, config, history)
    _replace(out / "report.md", _markdown(run_dir.resolve().name, summary, tested).encode())
    _replace(out / "report.html", _page(run_dir.resolve().name, summary, tested, shown, notes, dump(config)).encode())
    return Report(out / "report.html", table, notes)


def newest_evaluation(run_dir: Path) -> Path | None:
    """The finished test of the newest checkpoint in a run's folder; validation files only where there is no test."""
    found = list((run_dir / "evaluation").glob("update-*/*/metrics.json"))
    order = {"test": 2, "val": 1}
    best = max(found, key=lambda p: (p.parts[-3], order.get(p.parts[-2], 0)), default=None)
    return best.parent if best else None


def read_evaluation(folder: str | Path) -> dict[str, Scored]:
    """The datasets of a finished evaluation that were scored by their own head.

    Raises:
        ConfigError: there is no finished evaluation.
    """
    folder = Path(folder)
    try:
        results = json.loads((folder / "metrics.json").read_text())["datasets"]
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder}: no metrics.json, so no finished evaluation; multitrain evaluate writes one"
        ) from None
    tested = {}
    for name, result in results.items():
        if result["head"] == result["dataset"]:
            with np.load(folder / name / "scores.npz") as file:
                tested[name] = Scored(name, result, file["labels"], file["scores"], file["paths"])
    return tested


def read_history(run_dir: Path, chance: Mapping[str, float]) -> History:
    """Curves of a run; of a validation done twice, the later one."""
    happened = events.read(run_dir / "events.jsonl")
    return History(
        metrics=metrics.read(run_dir / "metrics.jsonl"),
        validations={e["update"]: e["results"] for e in happened if e.get("event") == "validation"},
        restarts=[e["update"] for e in happened if e.get("event") == "resume"],
        chance=chance,
    )


def accuracy_table(tested: Mapping[str, Scored]) -> str:
    """Accuracy against chance as aligned text, one line a dataset."""
    if not tested:
        return ""
    rows = _rows(tested)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in aligned)


_HEADER = ("dataset", "test videos", "classes", "top-1 %", "top-5 %", "mAP %", "chance %")


def _rows(tested: Mapping[str, Scored]) -> list[tuple[str, ...]]:
    """Header and one row a dataset, without the columns that say nothing of any dataset."""
    rows = [_HEADER, *(_row(t) for t in tested.values())]
    kept = [c for c in range(len(_HEADER)) if any(row[c] != "–" for row in rows[1:])]
    return [tuple(row[c] for c in kept) for row in rows]


def _row(tested: Scored) -> tuple[str, ...]:
    r = tested.result
    videos = str(r["scored"]) if r["scored"] == r["videos"] else f"{r['scored']} of {r['videos']}"
    figures = ("–" if r.get(k) is None else f"{r[k]:.1f}" for k in ("top1", "top5", "map"))
    return (tested.name, videos, str(tested.scores.shape[1]), *figures, f"{tested.chance:.1f}")


def summarise(run_dir: Path, config: RunConfig, history: History) -> dict[str, str]:
    """The run in a few facts."""
    records = history.metrics
    facts = {"experiment": config.experiment_name, "datasets": ", ".join(config.data.datasets)}
    if records:
        last = records[-1]
        seconds = sum(r.get("seconds") or 0.0 for r in records)
        worlds = list(dict.fromkeys(r.get("world_size") for r in records if r.get("world_size")))
        facts |= {
            "updates": f"{last['update'] + 1} of {config.effective_batch} videos × {config.augment.copies} clips",
            "ranks": " → ".join(str(w) for w in worlds),
            "time in updates": duration(seconds),
            "interruptions": str(len(history.restarts)),
            "last loss": "–" if last.get("loss") is None else f"{last['loss']:.3f}",
        }
    model = config.model
    facts["network"] = (
        f"{model.depth} blocks, {model.frames} frames of {model.crop}×{model.crop} px, {config.precision}"
    )
    return facts


def pick_examples(
    run_dir: Path, config: RunConfig, tested: Mapping[str, Scored], count: int
) -> tuple[list[Example], list[str]]:
    """Some test videos of each dataset with the predictions of every head, and notes on what could not be read."""
    examples: list[Example] = []
    notes: list[str] = []
    if not tested or count < 1:
        return examples, notes
    from multitrain.data.decode import VideoError, open_video
    from multitrain.evaluation.predictor import load as load_model

    model = load_model(run_dir)
    for name, test in tested.items():
        for i in _chosen(test, count):
            path = Path(config.data.datasets[name].videos) / str(test.paths[i])
            try:
                with open_video(path, config.data.decoder) as video:
                    frames = video.frames(np.linspace(0, video.frame_count - 1, 6).round().astype(int))
                predictions = model.predict(path, top=3)
            except VideoError as error:
                notes.append(str(error))
                continue
            examples.append(Example(name, frames, test.truth(i), predictions))
    return examples, notes


def _chosen(tested: Scored, count: int) -> list[int]:
    """Videos of classes far apart; the last is the surest mistake, if there was one."""
    best = tested.scores.argmax(1) if len(tested.scores) else np.zeros(0, int)
    labels = tested.labels.argmax(1) if tested.labels.ndim == 2 else tested.labels
    wrong = np.flatnonzero(best != labels)
    right = np.flatnonzero(best == labels)
    order = [int(v) for _, v in sorted((int(np.sum(labels[:i] == labels[i])), int(i)) for i in right)]
    spread = order[: max(1, len(set(labels.tolist())))]
    stride = max(1, len(spread) // max(count, 1))
    chosen = list(dict.fromkeys([*spread[::stride], *order]))[: count - bool(len(wrong))]
    return [*chosen, int(wrong[tested.scores[wrong].max(1).argmax()])] if len(wrong) else chosen


def _confusion(tested: Scored) -> np.ndarray:
    classes = tested.scores.shape[1]
    matrix = np.zeros((classes, classes), int)
    for true, predicted, number in tested.result["confusion"]:
        matrix[true, predicted] = number
    return matrix


def _markdown(name: str, summary: Mapping[str, str], tested: Mapping[str, Scored]) -> str:
    lines = [f"# {name}", "", *(f"* {key}: {value}" for key, value in summary.items()), ""]
    if tested:
        head, *rows = _rows(tested)
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


_SECTIONS = {
    "curves": (
        "Training",
        "Thin lines are single updates, thick ones moving means. Dashed lines mark where the run was resumed.",
    ),
    "clips": (
        "What it says of test videos",
        "Each row is a video of the test split. The columns are the heads: every head answers for every video, in its own "
        "label space. Green: right; red: wrong (the surest mistake of a dataset is always shown); grey: the heads of the "
        "other datasets, which never saw a label for this video.",
    ),
    "confusion": ("Confusion on test videos", "Percent of the videos of each true class (row)."),
}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#24292f;background:#f6f8fa;margin:0}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 2px}h2{font-size:19px;margin:0 0 4px}
section{background:#fff;border:1px solid #d8dee4;border-radius:10px;padding:18px 22px;margin:18px 0}
p.note{color:#57606a;margin:0 0 12px}img{max-width:100%;height:auto;display:block}
table{border-collapse:collapse}th,td{padding:6px 16px 6px 0;border-bottom:1px solid #eaeef2;text-align:right}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:#57606a}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}dt{color:#57606a}dd{margin:0}
.bar{display:inline-block;width:160px;height:10px;background:#eaeef2;border-radius:5px;position:relative;overflow:hidden}
.bar i{position:absolute;left:0;top:0;bottom:0;background:#1a7f37}.bar b{position:absolute;top:0;bottom:0;width:2px;background:#cf222e}
pre{overflow:auto;font-size:12.5px;line-height:1.4}summary{cursor:pointer;color:#57606a}
"""


def _page(
    name: str,
    summary: Mapping[str, str],
    tested: Mapping[str, Scored],
    shown: Mapping[str, bytes],
    notes: Sequence[str],
    config: str,
) -> str:
    e = html.escape
    facts = "".join(f"<dt>{e(key)}</dt><dd>{e(value)}</dd>" for key, value in summary.items())
    parts = [f"<section><dl>{facts}</dl></section>"]
    if tested:
        parts.append(f"<section><h2>Accuracy</h2>{_html_table(tested)}</section>")
    for key, png in shown.items():
        title, note = _SECTIONS[key]
        image = base64.b64encode(png).decode()
        parts.append(
            f'<section><h2>{e(title)}</h2><p class="note">{e(note)}</p>'
            f'<img alt="{e(title)}" src="data:image/png;base64,{image}"></section>'
        )
    if notes:
        parts.append("<section><h2>Not shown</h2><ul>" + "".join(f"<li>{e(n)}</li>" for n in notes) + "</ul></section>")
    parts.append(f"<section><details><summary>Configuration</summary><pre>{e(config)}</pre></details></section>")
    made = f"{datetime.now():%Y-%m-%d %H:%M}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(name)} – MultiTrain</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<main><h1>{e(name)}</h1><p class="note">MultiTrain report, {made}</p>{"".join(parts)}</main></html>\n'
    )


def _html_table(tested: Mapping[str, Scored]) -> str:
    header, *table = _rows(tested)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header) + "<th>top-1, and chance in red</th>"
    rows = []
    for t, texts in zip(tested.values(), table, strict=True):
        cells = "".join(f"<td>{html.escape(c)}</td>" for c in texts)
        top = t.result.get("map") or t.result.get("top1") or 0.0
        bar = f'<span class="bar"><i style="width:{top:.1f}%"></i><b style="left:{t.chance:.1f}%"></b></span>'
        rows.append(f"<tr>{cells}<td>{bar}</td></tr>")
    note = (
        "Test videos were never trained on, and are not those of the validation curves. "
        "Chance is always guessing the most frequent class."
    )
    return f'<p class="note">{note}</p><table><tr>{head}</tr>{"".join(rows)}</table>'


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """``multitrain report RUN``."""
    parser = argparse.ArgumentParser(
        prog="multitrain report", description="Curves, figures and example clips of a run as one page."
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--evaluation", metavar="DIR", help="folder of a finished test (default: the run's newest)")
    parser.add_argument("--out", metavar="DIR", help="folder to write to (default: RUN/report)")
    parser.add_argument(
        "--clips", type=int, default=4, metavar="N", help="test videos of each dataset shown (default 4)"
    )
    given = parser.parse_args(arguments)
    report = write_report(given.run, evaluation=given.evaluation, out=given.out, clips=given.clips)
    for note in report.notes:
        print(f"not shown: {note}")
    if report.table:
        print(report.table)
    print(report.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
