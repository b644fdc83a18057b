"""The campaign on a real SLURM controller, which `slurm/devcluster` starts: what SLURM does to jobs, and worse.

One run over two of four virtual nodes (or `--nodes` and `--gpus` of it) is taken away again and again. It is submitted by
`launch/submit.py` at first, and by `sbatch slurm/train.sh` from the middle on, from a checkout of its own. It must come back by
itself, but not where it was cancelled; redo no more than what is promised; and, stopped at last, have the bits of a run that nobody
disturbed. Needs root, `slurm-wlm` and `munge`.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks import results
from benchmarks.drills.kinds import KINDS, Controlled, Kind, matching
from benchmarks.drills.run import write_data
from benchmarks.drills.strikes_controller import EVERY, NODES, WAYS, JobUnderTest
from tests.slurm.drill import Runs, reason_to_skip, started

RESULTS = results.FOLDER / "drills_controller.json"
COUNT = 2 * len(matching("controller"))
OVER = ("CANCELLED", "FAILED", "COMPLETED", "NODE_FAIL", "TIMEOUT", "BOOT_FAIL", "OUT_OF_MEMORY")
"""States of a job that does not come back."""
STAYS_AWAY = 6.0
"""Seconds after which a job that must stay away is looked at again."""
WENT_ON = "went on"
"""How a job comes through that no start of it ends."""
BROKE_OFF = "the campaign broke off"
Record = dict[str, Any]


def refusal() -> str | None:
    """Why no campaign can be had here; None when one can."""
    return reason_to_skip()


@dataclass(frozen=True)
class Outcome:
    """What a campaign found: one record an interruption, the updates of the run, and what is wrong with it ('' nothing)."""

    records: list[Record]
    updates: int
    trouble: str
    asked: int

    @property
    def good(self) -> bool:
        """Whether every promise was kept and the run has the undisturbed run's bits."""
        return not self.trouble and sum(r["kept"] for r in self.records) == len(self.records) == self.asked

    def facts(self) -> Record:
        """For the file of results."""
        return {"trouble": self.trouble, "updates": self.updates, "interruptions": self.records}

    def lines(self, seed: int) -> list[str]:
        """What to print at the end."""
        kept = sum(r["kept"] for r in self.records)
        same = f"after {self.updates} updates the run has the undisturbed run's weights and moments, every bit"
        return [f"{kept} of {len(self.records)} promises kept; {self.trouble or same}"]


def campaign(
    folder: Path, kinds: Sequence[Kind], given: argparse.Namespace, keep: Callable[[Outcome], None]
) -> Outcome:
    """Strike one run `--count` times; what was found is kept after each strike."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # the cluster is stopped on the way out
    shape = (given.nodes, given.gpus)
    ways = [given.way] if given.way else list(WAYS)
    with started(max(NODES, given.nodes), given.gpus) as (cluster, own):
        print(f"the cluster is in {cluster.folder}; it is stopped at the end, however that comes", flush=True)
        runs = Runs(cluster, own / "runs", write_data(own / "data"))
        return strike_all(runs, deal(kinds, given.count, given.seed, ways), given.seed, shape, keep)


def deal(kinds: Sequence[Kind], count: int, seed: int, ways: Sequence[str]) -> list[tuple[Kind, str]]:
    """`count` of the kinds, each as often as the others, in a random order, way by way; those with options of their own last."""
    found, left = [], (list(kinds) * count)[:count]
    for number, way in enumerate(ways):
        share = count // len(ways) + (number < count % len(ways))
        own, left = left[:share], left[share:]
        random.Random(f"{seed}-{way}").shuffle(own)
        found += [(kind, way) for kind in sorted(own, key=lambda k: of(k).options)]
    return found


def of(kind: Kind) -> Controlled:
    """What the kind does here."""
    assert kind.controller is not None
    return kind.controller


def strike_all(
    runs: Runs, kinds: Sequence[tuple[Kind, str]], seed: int, shape: tuple[int, int], keep: Callable[[Outcome], None]
) -> Outcome:
    """One run, struck by each of the kinds."""
    target = JobUnderTest(runs, "drilled", way=kinds[0][1], shape=shape)
    records: list[Record] = []
    try:
        target.submit(*of(kinds[0][0]).options)
        for number, (kind, way) in enumerate(kinds):
            if (of(kind).options, way) != (target.options, target.way):
                target.stop()
                target.way = way
                target.submit(*of(kind).options)
            records.append({"way": way, **inject(target, kind, random.Random(f"{seed}-{number}"))})
            print(_line(records[-1]), flush=True)
            keep(Outcome(records, target.position(), f"{BROKE_OFF}: it was ended", len(kinds)))
        updates = target.stop()
        return Outcome(records, updates, _difference(runs, target, updates), len(kinds))
    except (AssertionError, subprocess.SubprocessError) as error:
        print(f"\n{error}\n\n{target.last_words()}", flush=True)
        return Outcome(records, target.position(), f"{BROKE_OFF}: {str(error).splitlines()[0]}", len(kinds))


def inject(target: JobUnderTest, kind: Kind, chance: random.Random) -> Record:
    """One interruption, and the way back; the run is submitted again where its job does not come by itself."""
    cluster, runs, does = target.cluster, target.runs, of(kind)
    runs.reach(target.folder, target.job, target.position() + chance.randint(1, EVERY + 4))
    time.sleep(chance.uniform(0, 1))
    restarts = int(cluster.job(target.job).get("Restarts", "0"))
    before, events, saving = target.position(), len(runs.events(target.folder)), target.saving
    does.inject(target, chance)
    struck = len(runs.events(target.folder))  # an injection of two parts may let the run start in between
    begin, moment = time.monotonic(), time.time()
    asked, furthest, how, left = 0.0, before, "", 0.0

    def over() -> str:
        nonlocal asked, furthest, how, left
        started = [e for e in runs.events(target.folder)[struck:] if e["event"] in ("start", "resume")]
        furthest = furthest if started else max(furthest, target.position())
        if time.monotonic() > asked + 0.3:
            asked, how = time.monotonic(), how or _how(cluster.job(target.job), restarts)
            left = left or (0.0 if target.processes() else time.monotonic() - begin)
        if started and not how:
            return "in place"
        if WENT_ON in does.ways and not how and target.position() >= before + 3:
            return WENT_ON
        return how if how and left else ""

    cluster.until(over, f"the end of what '{kind.name}' struck at update {before}", seconds=240, pause=0.03)
    gone = time.monotonic()
    how = how or ("in place" if target.resumed(struck) is not None else WENT_ON)
    state = cluster.job(target.job)
    waits = target.seconds_until(state.get("EligibleTime")) if how == "requeued" else 0.0
    if how == "requeued":
        if "TimeLimit" in state and state["TimeLimit"] != target.LIMIT:
            cluster.run("scontrol", "update", f"jobid={target.job}", f"TimeLimit={target.LIMIT}")
        cluster.start_now(target.job)
    elif how not in ("in place", WENT_ON):
        time.sleep(STAYS_AWAY)
        how = how if cluster.job(target.job)["JobState"] == how else "back from the dead"
        gone += STAYS_AWAY
        begin += STAYS_AWAY
        target.submit(*target.options)
    runs.reach(target.folder, target.job, 0)
    resumed: int | None = furthest
    if how != WENT_ON:
        cluster.until(lambda: target.resumed(struck) is not None, "the next start", seconds=180)
        resumed = target.resumed(struck)
    assert resumed is not None
    cluster.until(lambda: target.position() > furthest, f"an update after {furthest}", seconds=180)
    further = time.monotonic() - begin
    does.undo(target)
    runs.reach(target.folder, target.job, target.position() + 1)
    lost = furthest - resumed
    said = runs.events(target.folder)[events:]
    stopped = [datetime.fromisoformat(e["time"]).timestamp() - moment for e in said if e["event"] == "signal"]
    returned = how in ("requeued", "in place", WENT_ON)
    return {
        "kind": kind.name,
        "update": before,
        "how": how,
        "over_seconds": round(gone - begin, 1),
        "ranks_gone_seconds": round(left, 1),
        "queue_seconds": round(waits, 1),
        "further_seconds": round(further, 1),
        "lost": lost,
        "returned": returned,
        "kept": how in does.ways and lost <= does.may_lose + (EVERY if saving and does.may_lose else 0),
        "signal_seconds": round(stopped[0], 1) if stopped else None,
        "said": [e["status"] for e in said if e["event"] in ("requeue", "end")],
    }


def _how(job: dict[str, str], restarts: int) -> str:
    """How the job ended; '' while it runs."""
    state = job["JobState"]
    if int(job.get("Restarts", "0")) > restarts:
        return "requeued" if state == "PENDING" else ""
    return state if state in OVER else ""


def _difference(runs: Runs, target: JobUnderTest, updates: int) -> str:
    """What distinguishes the run from an undisturbed one after `updates` updates; '' when nothing does."""
    reference = JobUnderTest(runs, "undisturbed", shape=target.shape)
    reference.submit(f"checkpoint.every={updates}")
    runs.reach(reference.folder, reference.job, updates + 1, seconds=120 + 5 * updates)
    reference.stop()
    try:
        runs.assert_same(target.folder, reference.folder, updates)
    except (AssertionError, OSError) as error:
        return f"the run DIFFERS from the undisturbed one: {error}"
    return ""


# --------------------------------------------------------------------------------------------------------- the result


def summary(outcome: Outcome) -> list[Record]:
    """The rows of `benchmarks/README.md`. A campaign that broke off says nothing of the bits."""
    records, trouble = outcome.records, outcome.trouble
    compared = not trouble.startswith(BROKE_OFF)
    kept = sum(r["kept"] for r in records)
    rows = [
        results.row(
            "interrupted runs with the undisturbed run's bits at the end",
            ours=float(not trouble) if compared else None,
            unit="runs",
            note=f"of 1, interrupted {len(records)} times by a real controller"
            if compared
            else f"{trouble[0].upper()}{trouble[1:]}.",
        ),
        results.row("promises kept", ours=kept, note=f"of {len(records)}"),
    ]
    for name, own in _by_kind(records).items():
        times = f"{len(own)} times; {', '.join(sorted({r['how'].lower() for r in own}))}"
        rows.append(results.row(f"{name}: updates lost at most", ours=_most(own, "lost"), unit="updates", note=times))
        further = _median(own, "further_seconds")
        rows.append(results.row(f"{name}: seconds to be further", ours=further, unit="s", note=_times(own)))
    in_place, queued = (
        _by_kind(records).get(name) for name in ("SIGKILL of a rank", "SIGKILL of a rank, no restarts in place")
    )
    if in_place and queued:
        waited = [r["further_seconds"] + r["queue_seconds"] for r in queued]
        rows.append(
            results.row(
                "rank killed: further in place, against through the queue",
                ours=_median(in_place, "further_seconds"),
                baseline=statistics.median(waited),
                unit="s",
                note="Baseline: `cluster.restarts_in_place=0`, with the seconds that SLURM lets a requeued job wait.",
            )
        )
    return rows


def _times(records: Sequence[Record]) -> str:
    """When the ranks had agreed to stop, when the job was over, and what SLURM would have added."""
    over = f"The job was over after {_median(records, 'over_seconds'):.1f} s"
    signals = [r["signal_seconds"] for r in records if r["signal_seconds"] is not None]
    over += f", the ranks had agreed to stop after {statistics.median(signals):.1f} s" if signals else ""
    queue = _median(records, "queue_seconds")
    return over + (f"; SLURM lets it wait for {queue:.0f} s more, which the drill did not." if queue else ".")


def table(records: Sequence[Record]) -> str:
    """One line a kind."""
    head = ("kind", "count", "kept", "lost at most", "came back", "over (s)", "in the queue (s)", "further (s)")
    lines = [head]
    for name, own in _by_kind(records).items():
        ways = ", ".join(sorted({r["how"] for r in own}))
        seconds = (f"{_median(own, key):.1f}" for key in ("over_seconds", "queue_seconds", "further_seconds"))
        lines.append((name, str(len(own)), str(sum(r["kept"] for r in own)), str(_most(own, "lost")), ways, *seconds))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _by_kind(records: Sequence[Record]) -> dict[str, list[Record]]:
    found = {name: [r for r in records if r["kind"] == name] for name in KINDS}
    return {name: own for name, own in found.items() if own}


def _median(records: Sequence[Record], key: str) -> float:
    return round(statistics.median(r[key] for r in records), 1)


def _most(records: Sequence[Record], key: str) -> float:
    return max(r[key] for r in records)


def _line(r: Record) -> str:
    return (
        f"{r['way']:9}  update {r['update']:4}  {r['kind']:34}  {r['how']:10}  over in {r['over_seconds']:5.1f} s, lost {r['lost']}, "
        f"further in {r['further_seconds']:5.1f} s{'' if r['kept'] else '  BROKEN PROMISE'}"
    )


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
