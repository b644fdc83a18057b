"""Write the report of a run, one HTML page: curves, test accuracy, predictions on some test videos.

`multitrain report RUN` writes ``RUN/report/report.html`` (self-contained: mail it, open it anywhere), its plots as PNG files,
and ``report.md`` with the tables. Parts without data, such as a missing evaluation, are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.config import ConfigError, RunConfig, dump, load, validate
from multitrain.config.arguments import Parser
from multitrain.config.boundary import writing_to
from multitrain.config.reading import read_yaml
from multitrain.evaluation import pictures
from multitrain.evaluation.output_folders import result_folder
from multitrain.evaluation.pictures import Example, History
from multitrain.evaluation.scored import Scored, confused, hardest, newest_evaluation, read_evaluation
from multitrain.files import OutputFolder
from multitrain.interop.sharing import redact, shareable, shareable_overrides
from multitrain.records import events, jsonl, metrics
from multitrain.records.diagnosis import Finding, diagnose
from multitrain.records.progress import duration
from multitrain.report import page
from multitrain.report.interruptions import interruptions
from multitrain.report.status import resolve, status
from multitrain.text import markdown, printable, table


@dataclass(frozen=True)
class Report:
    """Result of :func:`write_report`."""

    page: Path
    """``report.html``."""
    table: str
    """Accuracy against chance, as text; empty without an evaluation."""
    notes: list[str] = field(default_factory=list)
    """Parts that could not be written, and the reasons."""


def write_report(
    run_dir: str | Path, *, evaluation: str | Path | None = None, out: str | Path | None = None, clips: int = 4
) -> Report:
    """Write the report of a run.

    Args:
        run_dir: the run's folder.
        evaluation: folder with the ``metrics.json`` of a test; default: the newest one in the run.
        out: folder to write to; default: ``RUN/report``, or ``report/RUN`` in the working folder for another user's run.
        clips: number of test videos shown per dataset.

    Raises:
        ConfigError: no run, no evaluation in the named folder, another file in the way, or matplotlib missing.
    """
    run_dir = Path(run_dir)
    config = load(run_dir)
    folder = Path(evaluation) if evaluation else newest_evaluation(run_dir)
    tested = read_evaluation(folder) if folder else {}
    history = read_history(run_dir, {name: t.chance for name, t in tested.items()})
    place = OutputFolder(out or result_folder(run_dir, "report"), "report", [run_dir])
    for file in ("report.html", "report.md", *(f"{name}.png" for name in IMAGES)):
        place.check(file, _is_report)
    with writing_to(place.root):
        place.root.mkdir(parents=True, exist_ok=True)
    examples, notes = pick_examples(run_dir, config, tested, clips)
    shown = _draw(history, examples, tested)
    for name, png in shown.items():
        place.write_bytes(f"{name}.png", png, _is_report)
    state = status(run_dir)
    hidden = _hosts(run_dir)
    summary = {key: redact(text, hidden) for key, text in summarise(config, history, state).items()}
    name = run_dir.resolve().name
    unread, unread_counts = _unread(run_dir, tested, notes)
    text = page.render(
        name=name,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        summary=summary,
        state=str(state["state"] or ""),
        pictures=shown,
        findings=[(printable(f.text), printable(f.remedy)) for f in _findings(history, config, state, tested)],
        accuracy=_rows(tested) if tested else [],
        bars=[(t.result.get("map") or t.result.get("top1") or 0.0, t.chance) for t in tested.values()],
        interruptions=_interruptions(history, hidden),
        confused={dataset: _confused(t) for dataset, t in tested.items() if confused(t, MAX_CONFUSED)},
        hardest={dataset: _hardest(t) for dataset, t in tested.items() if hardest(t)},
        unread=redact(unread, hidden),
        unread_counts=unread_counts,
        settings=_settings(run_dir, config, hidden),
    )
    place.write_text("report.md", _markdown(name, summary, tested), _is_report)
    written = place.write_text("report.html", text, _is_report)
    return Report(written, accuracy_table(tested), notes)


def _draw(history: History, examples: Sequence[Example], tested: Mapping[str, Scored]) -> dict[str, bytes]:
    """PNG images by name, those of :data:`IMAGES` for which there is data."""
    drawn = {"curves": pictures.curves(history)} if history.metrics else {}
    if examples:
        drawn["clips"] = pictures.film_strips(examples, list(examples[0].predictions))
    matrices = {name: t.confusion for name, t in tested.items() if t.confusion is not None}
    if matrices:
        drawn["confusion"] = pictures.confusion(matrices, {name: tested[name].class_names for name in matrices})
    return drawn


IMAGES = ("curves", "clips", "confusion")
"""Names of the image files, without ``.png``."""


def _is_report(content: bytes) -> bool:
    """Whether a file is part of a report by an earlier version, which kept no record."""
    head = content[:4096]
    return (
        b"MultiTrain</title>" in head or b"Matplotlib" in head or (head.startswith(b"# ") and b"* experiment: " in head)
    )


def read_history(run_dir: Path, chance: Mapping[str, float]) -> History:
    """The data of the curves; of a repeated validation the later one counts."""
    happened = events.read(run_dir / "events.jsonl")
    return History(
        metrics=metrics.read(run_dir / "metrics.jsonl"),
        validations={e["update"]: e["results"] for e in happened if e.get("event") == "validation"},
        interruptions=[i for i in interruptions(happened) if i["update"] is not None],
        chance=chance,
    )


def _findings(
    history: History, config: RunConfig, state: Mapping[str, Any], tested: Mapping[str, Scored]
) -> list[Finding]:
    """What is unusual in the run's updates, its last validation and its test."""
    last = history.validations[max(history.validations)] if history.validations else None
    found = diagnose(history.metrics[-MAX_DIAGNOSED:], config, state["total_updates"], last)
    for name, t in tested.items():
        matrix = t.confusion
        if matrix is None or len(matrix) < 2 or matrix.sum() < 20:
            continue
        shares = matrix.sum(0) / matrix.sum()
        most = int(shares.argmax())
        if shares[most] > 0.9 and matrix[most].sum() < 0.5 * matrix.sum():
            found.append(
                Finding(
                    f"one class {name}",
                    f"{name}: {shares[most]:.0%} of the test videos are predicted as {t.class_names[most]!r}",
                    "the head has learned nothing: look at the labels (multitrain data check, data show) and at its loss",
                )
            )
    return found


def accuracy_table(tested: Mapping[str, Scored]) -> str:
    """Accuracy and chance level as aligned text, one line per dataset."""
    if not tested:
        return ""
    header, *rows = _rows(tested)
    return table(header, rows)


_HEADER = ("dataset", "videos", "classes", "top-1 % (95 % interval)", "top-5 %", "mAP % (95 % interval)", "chance %")


def _rows(tested: Mapping[str, Scored]) -> list[tuple[str, ...]]:
    """Header and one row per dataset, without columns that are empty for all datasets."""
    rows = [_HEADER, *(_row(t) for t in tested.values())]
    kept = [c for c in range(len(_HEADER)) if any(row[c] != "–" for row in rows[1:])]
    return [tuple(row[c] for c in kept) for row in rows]


def _row(tested: Scored) -> tuple[str, ...]:
    r = tested.result
    videos = str(r["scored"]) if r["scored"] == r["videos"] else f"{r['scored']} of {r['videos']}"
    classes = tested.scores.shape[1]
    top5 = "–" if r.get("top5") is None or classes <= 5 else f"{r['top5']:.1f}"  # with five classes it is always 100
    return (tested.name, videos, str(classes), _figure(r, "top1"), top5, _figure(r, "map"), f"{tested.chance:.1f}")


def _figure(result: Mapping[str, Any], measure: str) -> str:
    """A measure in percent with its 95 % interval, e.g. ``84.7 (84.2–85.2)``."""
    if result.get(measure) is None:
        return "–"
    ends = (result.get("intervals") or {}).get(measure)
    return f"{result[measure]:.1f}" + (f" ({ends[0]:.1f}–{ends[1]:.1f})" if ends else "")


def summarise(config: RunConfig, history: History, state: Mapping[str, Any]) -> dict[str, str]:
    """Summary of the run."""
    records = history.metrics
    facts = {"experiment": config.experiment_name, "datasets": ", ".join(config.data.datasets)}
    if records:
        last = records[-1]
        seconds = sum(r.get("seconds") or 0.0 for r in records)
        worlds = [r["world_size"] for r in records if r.get("world_size")]
        changes = [w for w, before in zip(worlds, [None, *worlds]) if w != before]
        total = f" of {state['total_updates']}" if state["total_updates"] else ""
        facts |= {
            "updates": f"{last['update'] + 1}{total}, each of {config.effective_batch} videos × {config.augment.copies} clips",
            "ranks": " → ".join(str(w) for w in changes),
            "time in updates": duration(seconds),
            "interruptions": str(len(history.interruptions)),
            "last loss": "–" if last.get("loss") is None else f"{last['loss']:.3f}",
        }
    if state["eta_seconds"] is not None:
        facts["remaining"] = duration(state["eta_seconds"])
    if state["last_error"]:
        facts["last error"] = str(state["last_error"])
    model = config.model
    facts["network"] = (
        f"{model.depth} blocks, {model.frames} frames of {model.crop}×{model.crop} px, {config.precision}"
    )
    return facts


def pick_examples(
    run_dir: Path, config: RunConfig, tested: Mapping[str, Scored], count: int
) -> tuple[list[Example], list[str]]:
    """Some test videos of each dataset with the predictions of every head, and notes on videos that could not be read."""
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
    """Videos of different classes; the last is the most confident mistake, if there is one."""
    best = tested.scores.argmax(1) if len(tested.scores) else np.zeros(0, int)
    labels = tested.labels.argmax(1) if tested.labels.ndim == 2 else tested.labels
    wrong = np.flatnonzero(best != labels)
    right = np.flatnonzero(best == labels)
    order = [int(v) for _, v in sorted((int(np.sum(labels[:i] == labels[i])), int(i)) for i in right)]
    spread = order[: max(1, len(set(labels.tolist())))]
    stride = max(1, len(spread) // max(count, 1))
    chosen = list(dict.fromkeys([*spread[::stride], *order]))[: count - bool(len(wrong))]
    return [*chosen, int(wrong[tested.scores[wrong].max(1).argmax()])] if len(wrong) else chosen


def _markdown(name: str, summary: Mapping[str, str], tested: Mapping[str, Scored]) -> str:
    lines = [f"# {markdown(name)}", "", *(f"* {key}: {markdown(value)}" for key, value in summary.items()), ""]
    if tested:
        head, *rows = _rows(tested)
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# -- sections ---------------------------------------------------------------------------------------------------------

MAX_CONFUSED = 8
"""Number of pairs of classes listed per dataset."""

MAX_UNREADABLE = 50
"""Limit of unreadable videos listed, for training and for each test."""


def _interruptions(history: History, hidden: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        (
            str(number),
            str(i["time"] or "")[:19].replace("T", " "),
            str(i["update"]),
            redact(str(i["reason"]), hidden),
            "–" if i["away_seconds"] is None else duration(i["away_seconds"]),
            str(i["redone"] or 0),
            str(i["world_size"] or "–"),
        )
        for number, i in enumerate(history.interruptions, 1)
    ]


def _confused(tested: Scored) -> list[tuple[str, ...]]:
    return [(true, taken, f"{times} of {of}") for true, taken, times, of in confused(tested, MAX_CONFUSED)]


def _hardest(tested: Scored) -> list[tuple[str, ...]]:
    return [
        (
            h.name,
            f"{h.right} of {h.videos}",
            f"{100 * h.right / h.videos:.0f} %",
            ", ".join(f"{o} ({n})" for o, n in h.predicted_as),
        )
        for h in hardest(tested)
    ]


def _unread(
    run_dir: Path, tested: Mapping[str, Scored], notes: Sequence[str]
) -> tuple[list[tuple[str, ...]], Counter[str]]:
    """Rows about the videos that could not be read, and the number of these videos by dataset."""
    skipped = list(jsonl.read(run_dir / "skipped.jsonl"))
    counts = Counter(str(r.get("dataset")) for r in skipped)
    rows = [
        ("training", str(r.get("dataset")), str(r.get("path")), _flat(r.get("reason")))
        for r in skipped[:MAX_UNREADABLE]
    ]
    for name, t in tested.items():
        counts[f"{name} (test)"] += len(t.unreadable)
        rows += [("test", name, str(r.get("path")), _flat(r.get("reason"))) for r in t.unreadable[:MAX_UNREADABLE]]
    return [*rows, *(("this report", "", "", _flat(note)) for note in notes)], counts


def _settings(run_dir: Path, config: RunConfig, hidden: Sequence[str]) -> dict[str, str]:
    """Texts by title: configuration, submissions, environment, events."""
    classes = {name: dataset.classes or 1 for name, dataset in config.data.datasets.items()}
    return {
        "Configuration": dump(validate(shareable(config, classes))),
        "Overrides": _typed(run_dir),
        "Environment": redact(_text(run_dir / "env.txt"), hidden),
        "Events": "\n".join(_event(e, hidden) for e in events.read(run_dir / "events.jsonl")[-MAX_EVENTS:]),
    }


MAX_DIAGNOSED = 20_000
"""Number of updates in which findings are looked for, the newest ones."""

MAX_EVENTS = 200
"""Number of events shown, the newest ones."""


def _typed(run_dir: Path) -> str:
    """The options of each submission, without paths."""
    try:
        return "\n".join(
            " ".join(shareable_overrides(str(word) for word in entry["overrides"]))
            for entry in read_yaml(run_dir / "overrides.yaml")
        )
    except (ConfigError, KeyError, TypeError):
        return ""


def _event(event: Mapping[str, Any], hidden: Sequence[str]) -> str:
    kept = {k: v for k, v in event.items() if k not in ("host", "pid", "job", "overrides")}
    return json.dumps(redact(kept, hidden), ensure_ascii=False)


def _hosts(run_dir: Path) -> list[str]:
    """Full and short names of the machines of a run."""
    names = {str(e["host"]) for e in events.read(run_dir / "events.jsonl") if e.get("host")}
    return sorted(names | {name.partition(".")[0] for name in names}, key=len, reverse=True)


def _text(file: Path, largest: int = 1 << 20) -> str:
    """The beginning of a text file; empty if there is no file."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        return opened.read(largest).decode(errors="replace")


def _flat(text: Any) -> str:
    return " ".join(str(text or "").split())


def main(arguments: Sequence[str] | None = None) -> int:
    """``multitrain report RUN``: write the report."""
    parser = Parser(
        "report",
        "Write a self-contained page about a run: curves, interruptions, test results, example clips, settings.",
        "multitrain report runs/first                    writes runs/first/report/report.html",
        "multitrain report runs/first --out /tmp/first   somewhere else",
        "multitrain report runs/first --json             for scripts: the path of the page and the results",
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its name in runs")
    parser.add_argument("--evaluation", metavar="DIR", help="folder of a finished test (default: the run's newest)")
    parser.add_argument(
        "--out", metavar="DIR", help="folder to write to (default: RUN/report; for another user's run report/RUN here)"
    )
    parser.add_argument(
        "--clips", type=int, default=4, metavar="N", help="test videos of each dataset shown (default 4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    report = write_report(resolve(given.run, "runs"), evaluation=given.evaluation, out=given.out, clips=given.clips)
    if given.json:
        print(json.dumps({"page": str(report.page), "table": report.table, "notes": report.notes}, ensure_ascii=False))
        return 0
    for note in report.notes:
        print(printable(f"not shown: {note}"))
    if report.table:
        print(report.table)
    print(report.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
