"""Interrupt runs of real processes at random moments, at least `--count` times, and show that nothing is left of it.

python benchmarks/drills/campaign.py                      100 interruptions on this machine
python benchmarks/drills/campaign.py --only "in a save"   kinds whose name holds these words
python benchmarks/drills/campaign.py --seed 7 --run 3     one run of a campaign once more

Runs are tiny, but real: `launch/submit.py … cluster=local`, processes, signals, video files, checkpoints. Each is struck
about ten times on its way to its last update. Six of ten keep their world size and must end with the uninterrupted run's
weights and moments, every bit; the others change world size, micro-batch and workers at every start, and must have the same
videos in every update and a loss within the stated tolerance. `controller.py` does the same on a real SLURM controller.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[:1] = [str(Path(__file__).resolve().parents[2])]

import argparse
import datetime
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import results
from benchmarks.drills.kinds import KINDS, Kind, deal
from benchmarks.drills.run import (
    EVERY,
    LOSS_TOLERANCE,
    UPDATES,
    Hung,
    TinyRun,
    differences,
    small_disk,
    write_data,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "drills.json"
STRIKES = 10
"""Interruptions a run."""
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
    ("fp32", None),
]
"""Precision and world size of the runs in turn; None: another one at every start."""
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when every run ended like the uninterrupted one and no promise was broken."""
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="interruptions (default 100)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of kinds, moments and world sizes (default 0)"
    )
    parser.add_argument("--only", metavar="WORDS", help="only kinds whose name holds these words")
    parser.add_argument("--run", type=int, metavar="I", help="only run number I of the campaign with this seed")
    parser.add_argument("--world", type=int, choices=(1, 2, 4), help="ranks of every run, at every start")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help=f"results (default {RESULTS})")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave all runs there")
    given = parser.parse_args(arguments)
    if given.only and not any(given.only.lower() in name.lower() for name in KINDS):
        print(f"error: no kind holds {given.only!r}; there are: {', '.join(KINDS)}", file=sys.stderr)
        return 2
    folder = given.keep or Path(tempfile.mkdtemp(prefix="drills-"))
    began = time.monotonic()
    try:
        records, runs = campaign(folder, given, lambda *found: save(given.out, given, *found, time.monotonic() - began))
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(records))
    good = sum(not r["differences"] for r in runs)
    print(f"\n{len(records)} interruptions of {len(runs)} runs; {good} runs ended like the uninterrupted one;")
    print(
        f"largest relative difference of a loss after a change of world size: "
        f"{max((r['loss_difference'] for r in runs if not r['exact']), default=0.0):.2g} (tolerance {LOSS_TOLERANCE:g})"
    )
    for r in runs:
        for difference in r["differences"]:
            print(f"run {r['run']}: {difference}; repeat it with --seed {given.seed} --run {r['run']}")
    print(f"{given.out}; {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if good == len(runs) and all(r["kept"] for r in records) else 1


def campaign(
    folder: Path, given: argparse.Namespace, keep: Callable[[list[Record], list[Record]], None]
) -> tuple[list[Record], list[Record]]:
    """Runs until as many interruptions as asked for have struck; one record an interruption, and one a run, kept after
    each run.
    """
    count, seed, only, run = given.count, given.seed, given.only, given.run
    data = write_data(folder / "data") if not (folder / "data").is_dir() else folder / "data"
    references: dict[tuple[str, int], TinyRun] = {}
    records: list[Record] = []
    runs: list[Record] = []
    number = 0 if run is None else run
    while len(records) < count and (run is None or number == run):
        precision, world = SHAPES[number % len(SHAPES)]
        world = given.world or world
        key = (precision, world or 2)
        if key not in references:
            references[key] = uninterrupted(folder, data, *key)
        chance = random.Random(f"{seed}-{number}")
        kinds = deal(chance, min(STRIKES, count - len(records)) if run is None else STRIKES, only=only)
        if only is None:
            kinds = _share(seed, number, len(kinds))
        new, result = one_run(folder, data, number, chance, kinds, precision, world, references[key])
        records += new
        runs.append(result)
        keep(records, runs)
        number += 1
    return records, runs


def _share(seed: int, number: int, count: int) -> list[Kind]:
    """The kinds of run `number`: the deck of ten runs is dealt as a whole, so that every kind comes."""
    deck = deal(random.Random(f"{seed}-deck-{number // 10}"), 10 * STRIKES)
    return deck[number % 10 * STRIKES :][:count]


def uninterrupted(folder: Path, data: Path, precision: str, world: int) -> TinyRun:
    """The run that all others are compared with."""
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
    """One run, struck once by each of `kinds` on its way."""
    own_disk = any("ENOSPC" in kind.name for kind in kinds)
    records: list[Record] = []
    trouble: list[str] = []
    worst = float("inf")
    with small_disk(folder / f"disk-{number}") if own_disk else _folder(folder / "runs") as mounted:
        runs = folder / (f"disk-{number}" if own_disk else "runs")
        kinds = [k if mounted or "ENOSPC" not in k.name else KINDS["quota (EFBIG)"] for k in kinds]
        run = TinyRun(runs, f"drill-{number}", data, {"precision": precision})
        step = (UPDATES - 5) / max(1, len(kinds))
        try:
            run.start(*(shape := _shape(chance, world))[:1], **shape[1])
            for i, kind in enumerate(kinds):
                at = kind.moment(1 + int(i * step) + chance.randrange(max(1, int(step))))
                if not run.reach(at):
                    if run.code() == 0:
                        break  # it was faster than the drill
                    trouble.append(f"it ended at update {run.position()} before '{kind.name}': {_last_words(run)}")
                    break
                records.append({"run": number, **strike(run, kind, chance, world)})
                print(_line(records[-1]), flush=True)
            run.until(lambda: not run.running, "its end", 600)
            if run.code() != 0:
                trouble.append(f"it ended with exit code {run.code()}: {_last_words(run)}")
        except Hung as error:
            trouble.append(str(error))
        finally:
            run.end()
        if not trouble:
            trouble, worst = differences(run, reference, exact=world is not None)
    for record in records:
        record["equal"] = not trouble
    print(f"run {number}: {'; '.join(trouble) or 'like the uninterrupted one'}", flush=True)
    result = {"run": number, "precision": precision, "world": world, "exact": world is not None}
    return records, {**result, "differences": trouble, "loss_difference": worst}


def strike(run: TinyRun, kind: Kind, chance: random.Random, world: int | None) -> Record:
    """One interruption: strike, wait until the run has ended or gone on, submit it again, wait until it is further."""
    time.sleep(chance.uniform(0, 0.6))
    before, starts, phase = run.position(), run.count("start", "resume"), run.phase()
    struck, seen = time.monotonic(), len(run.records("events.jsonl"))
    stated: Record = {"kind": kind.name, "world": run.world, "phase": phase, "update": before}
    kind.hit(run, chance)
    hit = time.monotonic()
    furthest = before

    def settled() -> bool:
        nonlocal furthest
        furthest = max(furthest, run.position())
        came_back = run.count("start", "resume") > starts and kind.name != "a signal while starting"
        goes_on = kind.passes and furthest >= min(before + 3, UPDATES)
        return came_back or goes_on or (not run.running and not run.ranks())

    run.until(settled, f"the end of what '{kind.name}' struck at update {before}")
    if kind.undo and run.running:  # what was taken back must not kill when the next strike comes, which would be blamed
        kind.undo(run, chance)
        before = max(before, run.position())
        run.until(settled, f"an update after '{kind.name}' was taken back at update {before}")
    ended = not run.running
    stopped = time.monotonic()
    code = run.code()
    bound = kind.may_lose + (EVERY * (run.failed_saves() + (phase == "saving")) if kind.may_lose else 0)
    newest = furthest
    if ended:
        if kind.undo:
            kind.undo(run, chance)
        furthest = max(furthest, run.position())
        if kind.after:
            kind.after(run, chance)
        newest = run.newest()
        if code != 0:
            shape = _shape(chance, world)
            run.start(shape[0], **shape[1])
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
        "stop_seconds": round(stopped - hit, 2) if ended else None,
        "back_seconds": round(time.monotonic() - struck, 2),
        "lost": lost,
        "kept": kept,
    }


def _shape(chance: random.Random, world: int | None) -> tuple[int, dict[str, Any]]:
    """World size, micro-batch and workers of a start; only the workers change where the world is constant."""
    workers = chance.choice((1, 1, 2))
    if world is not None:
        return world, {"micro_batch": 2, "data.workers": workers}
    size = chance.choice((1, 2, 4))
    return size, {"micro_batch": chance.choice((2, 4)) if size < 4 else 2, "data.workers": workers}


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


def table(records: list[Record]) -> str:
    """One line a kind."""
    rows: list[tuple[str, ...]] = [HEAD]
    for name, kind in KINDS.items():
        own = [r for r in records if r["kind"] == name]
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
                f"≤ {kind.may_lose}",
                f"{statistics.median(stops):.1f}, {max(stops):.1f}" if stops else "–",
                f"{statistics.median(back):.1f}, {max(back):.1f}",
                f"{sum(r['equal'] for r in own)}/{len(own)}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def summary(records: list[Record], runs: list[Record]) -> list[Record]:
    """The rows of `benchmarks/README.md`: how much of each promise held."""
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


def save(out: Path, given: argparse.Namespace, records: list[Record], runs: list[Record], seconds: float) -> None:
    """Everything as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": "drills",
        "command": f"python benchmarks/drills/campaign.py --count {given.count} --seed {given.seed}"
        + (f" --only '{given.only}'" if given.only else "")
        + (f" --world {given.world}" if given.world is not None else "")
        + (f" --run {given.run}" if given.run is not None else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "hardware": results.hardware(),
        "versions": results.versions(),
        "size": "small",
        "rows": summary(records, runs),
        "plots": [],
        "seconds": round(seconds),
        "updates": UPDATES,
        "checkpoint_every": EVERY,
        "loss_tolerance": LOSS_TOLERANCE,
        "runs": runs,
        "interruptions": records,
    }
    out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


class _folder:
    """A plain folder, where `small_disk` would be one of its own."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> bool:
        return False

    def __exit__(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
