"""The campaign on local processes: runs of `launch/submit.py … cluster=local`, each interrupted about ten times.

Six of ten runs keep their world size and must end with weights and moments bit-equal to the uninterrupted run's. The others change
world size, micro-batch and workers at every start, one of them its precision as well; they must have the same videos in every
update and a loss within the stated tolerance.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.drills.kinds import KINDS, Kind, Local, matching
from benchmarks.drills.run import (
    EVERY,
    LOSS_TOLERANCE,
    MIXED_TOLERANCE,
    UPDATES,
    RunHung,
    TinyRun,
    differences,
    small_disk,
    write_data,
)
from benchmarks.drills.strikes_local import fill_the_disk

RESULTS = results.FOLDER / "drills.json"
COUNT = 100
Record = dict[str, Any]
MIXED = "mixed"
"""Marks a run whose precision changes at every start."""
STRIKES = 10
"""Interruptions per run."""
SHAPES: list[tuple[str, int | None]] = [
    ("fp32", 2),
    ("fp32", None),
    ("bf16", 2),
    ("fp32", None),
    ("fp16", 2),
    ("fp32", 1),
    ("fp32", None),
    ("fp32", 2),
    ("bf16", 2),
    (MIXED, None),
]
"""Precision and world size of successive runs; None: changes at every start."""


def refusal() -> str | None:
    """The reason why no campaign can run on this machine, or None."""
    return None


def campaign(
    folder: Path, kinds: Sequence[Kind], given: argparse.Namespace, keep: Callable[[Outcome], None]
) -> Outcome:
    """Run until `--count` interruptions have happened; `keep` gets the results after each run."""
    count, seed, run = given.count, given.seed, given.run
    data = write_data(folder / "data") if not (folder / "data").is_dir() else folder / "data"
    references: dict[tuple[str, int], TinyRun] = {}
    records: list[Record] = []
    runs: list[Record] = []
    number = 0 if run is None else run
    while len(records) < count and (run is None or number == run):
        precision, world = SHAPES[number % len(SHAPES)]
        world = given.world or world
        key = ("fp32" if precision == MIXED else precision, world or 2)
        if key not in references:
            references[key] = uninterrupted(folder, data, *key)
        chance = random.Random(f"{seed}-{number}")
        dealt = share(kinds, seed, number, min(STRIKES, count - len(records)) if run is None else STRIKES)
        new, result = one_run(folder, data, number, chance, dealt, precision, world, references[key])
        records += new
        runs.append(result)
        keep(Outcome(records, runs))
        number += 1
    return Outcome(records, runs)


@dataclass(frozen=True)
class Outcome:
    """Result of a campaign: one record per interruption, and one per run."""

    records: list[Record]
    runs: list[Record]

    @property
    def good(self) -> bool:
        """Whether every run ended correctly, and no interruption cost more than guaranteed."""
        return not any(r["differences"] for r in self.runs) and all(r["kept"] for r in self.records)

    def facts(self) -> Record:
        """Facts for the raw result file."""
        return {
            "updates": UPDATES,
            "checkpoint_every": EVERY,
            "loss_tolerance": LOSS_TOLERANCE,
            "runs": self.runs,
            "interruptions": self.records,
        }

    def lines(self, seed: int) -> list[str]:
        """The lines to print at the end."""
        good = sum(not r["differences"] for r in self.runs)
        worst = max(
            (r["loss_difference"] for r in self.runs if not r["exact"] and r["precision"] != MIXED), default=0.0
        )
        return [
            f"{len(self.records)} interruptions of {len(self.runs)} runs; {good} runs ended like the uninterrupted one;",
            f"largest relative difference of a loss after a change of world size: {worst:.2g} (tolerance {LOSS_TOLERANCE:g})",
            *(
                f"run {r['run']}: {difference}; repeat it with --seed {seed} --run {r['run']}"
                for r in self.runs
                for difference in r["differences"]
            ),
        ]


def share(kinds: Sequence[Kind], seed: int, number: int, count: int) -> list[Kind]:
    """The kinds of run `number`: kinds are distributed over ten runs together, so that every kind occurs."""
    deck = deal(random.Random(f"{seed}-deck-{number // 10}"), kinds, 10 * STRIKES)
    return sorted(deck[number % 10 * STRIKES :][:count], key=lambda k: of(k).last)


def deal(chance: random.Random, kinds: Sequence[Kind], count: int) -> list[Kind]:
    """`count` kinds in random order, each in proportion to its weight as far as possible."""
    total = sum(k.weight for k in kinds)
    exact = {k.name: count * k.weight / total for k in kinds}
    dealt = [k for k in kinds for _ in range(int(exact[k.name]))]
    rest = sorted(kinds, key=lambda k: exact[k.name] % 1, reverse=True)
    dealt += (rest * count)[: count - len(dealt)]
    chance.shuffle(dealt)
    return dealt


def of(kind: Kind) -> Local:
    """The fault of this kind on this backend."""
    assert kind.local is not None
    return kind.local


def uninterrupted(folder: Path, data: Path, precision: str, world: int) -> TinyRun:
    """The uninterrupted run with which others are compared."""
    run = TinyRun(folder / "runs", f"reference-{precision}-{world}", data, {"precision": precision})
    run.runs.mkdir(exist_ok=True)
    if run.position() < UPDATES:
        run.start(world, micro_batch=2, **{"data.workers": 1})
        run.until(lambda: not run.running, "its end", 600)
        if run.code() != 0:
            raise SystemExit(f"the uninterrupted run failed:\n{run.said.read_text()[-3000:]}")
    print(f"uninterrupted run, {precision}, {world} ranks: {UPDATES} updates", flush=True)
    return run


def one_run(
    folder: Path,
    data: Path,
    number: int,
    chance: random.Random,
    kinds: list[Kind],
    precision: str,
    world: int | None,
    reference: TinyRun,
) -> tuple[list[Record], Record]:
    """Interrupt one run once by each of `kinds`."""
    own_disk = any(of(kind).inject is fill_the_disk for kind in kinds)
    records: list[Record] = []
    trouble: list[str] = []
    worst = float("inf")
    with small_disk(folder / f"disk-{number}") if own_disk else _folder(folder / "runs") as mounted:
        runs = folder / (f"disk-{number}" if own_disk else "runs")
        kinds = [k if mounted or of(k).inject is not fill_the_disk else KINDS["quota (EFBIG)"] for k in kinds]
        run = TinyRun(runs, f"drill-{number}", data, {} if precision == MIXED else {"precision": precision})
        step = (UPDATES - 5) / max(1, len(kinds))
        try:
            shapes = Shapes(world, precision == MIXED)
            shapes.start(run, chance)
            for i, kind in enumerate(kinds):
                at = of(kind).moment(1 + int(i * step) + chance.randrange(max(1, int(step))))
                if not run.reach(at):
                    if run.code() == 0:
                        break  # it was faster than the drill
                    trouble.append(f"it ended at update {run.position()} before '{kind.name}': {_last_words(run)}")
                    break
                records.append({"run": number, **run_drill(run, kind, chance, shapes)})
                print(_line(records[-1]), flush=True)
            run.until(lambda: not run.running, "its end", 600)
            if run.code() != 0:
                trouble.append(f"it ended with exit code {run.code()}: {_last_words(run)}")
        except RunHung as error:
            trouble.append(str(error))
        finally:
            run.end()
        if not trouble:
            trouble, worst = differences(
                run,
                reference,
                exact=world is not None,
                tolerance=MIXED_TOLERANCE if precision == MIXED else LOSS_TOLERANCE,
            )
    for record in records:
        record["equal"] = not trouble
    print(f"run {number}: {'; '.join(trouble) or 'like the uninterrupted one'}", flush=True)
    result = {"run": number, "precision": precision, "world": world, "exact": world is not None}
    return records, {**result, "differences": trouble, "loss_difference": worst}


def run_drill(run: TinyRun, kind: Kind, chance: random.Random, shapes: Shapes) -> Record:
    """Inject the fault, wait until the run has ended or continued, submit it again if it ended, and wait for progress."""
    local = of(kind)
    time.sleep(chance.uniform(0, 0.6))
    before, starts, phase = run.position(), run.count("start", "resume"), run.phase()
    struck, seen = time.monotonic(), len(run.records("events.jsonl"))
    stated: Record = {"kind": kind.name, "world": run.world, "phase": phase, "update": before}
    local.inject(run, chance)
    injected_at = time.monotonic()
    furthest = before

    def settled() -> bool:
        nonlocal furthest
        furthest = max(furthest, run.position())
        came_back = run.count("start", "resume") > starts and kind.name != "a signal while starting"
        goes_on = local.passes and furthest >= min(before + 3, UPDATES)
        return came_back or goes_on or (not run.running and not run.ranks())

    run.until(settled, f"the end of what '{kind.name}' struck at update {before}")
    if (
        local.undo and run.running
    ):  # what was taken back must not kill when the next strike comes, which would be blamed
        local.undo(run, chance)
        before = max(before, run.position())
        run.until(settled, f"an update after '{kind.name}' was taken back at update {before}")
    ended = not run.running
    stopped = time.monotonic()
    code = run.code()
    bound = local.may_lose + (EVERY * (run.failed_saves() + (phase == "saving")) if local.may_lose else 0)
    newest = furthest
    if ended:
        if local.undo:
            local.undo(run, chance)
        furthest = max(furthest, run.position())
        if local.after:
            local.after(run, chance)
        newest = run.newest()
        if code != 0:
            shapes.start(run, chance)
            run.until(lambda: run.began or not run.running, "the next start")
    resumed = run.resumed_at() if run.count("start", "resume") > starts and code != 0 else furthest
    run.until(lambda: run.position() > before or not run.running, f"an update after {before}")
    lost = max(0, furthest - resumed)
    kept = lost <= bound and (resumed == newest or not ended or code == 0)
    told = (
        []
        if kept
        else [
            {k: e[k] for k in ("event", "update", "reason", "status") if k in e}
            for e in run.records("events.jsonl")[seen:]
        ]
    )
    return {
        **stated,
        "told": told,
        "again": "submitted" if ended else "in place" if run.count("start", "resume") > starts else "went on",
        "code": code,
        "stop_seconds": round(stopped - injected_at, 2) if ended else None,
        "back_seconds": round(time.monotonic() - struck, 2),
        "lost": lost,
        "kept": kept,
    }


@dataclass(frozen=True)
class Shapes:
    """Starts a run, each time with another world size, micro-batch and precision if these are not constant."""

    world: int | None
    mixed: bool

    def start(self, run: TinyRun, chance: random.Random) -> None:
        """Submit the run, or submit it again."""
        workers = chance.choice((1, 1, 2))
        if self.world is not None:
            run.start(self.world, micro_batch=2, **{"data.workers": workers})
            return
        size = chance.choice((1, 2, 4))
        changes = {"precision": chance.choice(("fp32", "bf16"))} if self.mixed else {}
        run.start(size, micro_batch=chance.choice((2, 4)) if size < 4 else 2, **{"data.workers": workers}, **changes)


def _last_words(run: TinyRun) -> str:
    lines = run.said.read_text(errors="replace").strip().splitlines() if run.said.is_file() else []
    return " | ".join(lines[-3:])


def _line(r: Record) -> str:
    stop = f"stopped in {r['stop_seconds']:.1f} s" if r["stop_seconds"] is not None else r["again"]
    return (
        f"run {r['run']}  update {r['update']:2}  {r['world']} ranks  {r['phase']:10}  {r['kind']:26}  {stop}, "
        f"exit {r['code']}, lost {r['lost']}{'' if r['kept'] else ' (BROKEN PROMISE)'}, back in {r['back_seconds']:.1f} s"
    )


# --------------------------------------------------------------------------------------------------------- the result

# --------------------------------------------------------------------------------------------------------- the result

HEAD = (
    "kind",
    "count",
    "submitted again, in place, went on",
    "work lost: mean, most (updates)",
    "promised",
    "to stop: median, most (s)",
    "back: median, most (s)",
    "equal",
)


def table(records: Sequence[Record]) -> str:
    """The table, one line per kind."""
    rows: list[tuple[str, ...]] = [HEAD]
    for kind in matching("local"):
        name, own = kind.name, [r for r in records if r["kind"] == kind.name]
        if not own:
            continue
        lost = [r["lost"] for r in own]
        stops = [r["stop_seconds"] for r in own if r["stop_seconds"] is not None]
        back = [r["back_seconds"] for r in own]
        rows.append(
            (
                name,
                str(len(own)),
                ", ".join(str(sum(r["again"] == how for r in own)) for how in ("submitted", "in place", "went on")),
                f"{statistics.mean(lost):.1f}, {max(lost)}",
                f"≤ {of(kind).may_lose}",
                f"{statistics.median(stops):.1f}, {max(stops):.1f}" if stops else "–",
                f"{statistics.median(back):.1f}, {max(back):.1f}",
                f"{sum(r['equal'] for r in own)}/{len(own)}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def summary(outcome: Outcome) -> list[Record]:
    """The rows of `benchmarks/README.md`: how often each guarantee held."""
    records, runs = outcome.records, outcome.runs
    good, kept = (sum(not r["differences"] for r in runs), sum(r["kept"] for r in records))
    rows = [
        results.row("runs that ended like the uninterrupted one", ours=good, unit="runs", note=f"of {len(runs)}"),
        results.row("interruptions that cost no more than promised", ours=kept, unit="", note=f"of {len(records)}"),
    ]
    for name in KINDS:
        own = [r for r in records if r["kind"] == name]
        if own:
            median = statistics.median(r["back_seconds"] for r in own)
            back = f"{len(own)} times; back after {median:.1f} s (median)"
            lost = max(r["lost"] for r in own)
            rows.append(results.row(f"updates lost by {name}, at most", ours=lost, unit="updates", note=back))
    return rows


class _folder:
    """A plain folder, used in place of `small_disk`."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> bool:
        return False

    def __exit__(self, *_: object) -> None:
        pass
