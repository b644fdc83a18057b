"""The campaign on a real SLURM controller, which `slurm/devcluster` starts.

One run on two of four virtual nodes (change with `--nodes` and `--gpus`) is interrupted repeatedly. The first half of the campaign
submits it with `launch/submit.py`, the second half with `sbatch slurm/train.sh`, each from its own checkout. The run must restart by
itself unless it was cancelled, repeat no more updates than guaranteed, and end with the same bits as an uninterrupted run. Needs root,
`slurm-wlm` and `munge`.
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
"""States of a job that SLURM does not start again."""
STAYS_AWAY = 6.0
"""Seconds after which the drill checks again that a cancelled job was not requeued."""
WENT_ON = "went on"
"""Outcomes after which the start that was interrupted still runs."""
BROKE_OFF = "the campaign broke off"
Record = dict[str, Any]


def refusal() -> str | None:
    """The reason why no campaign can run on this machine, or None."""
    return reason_to_skip()


@dataclass(frozen=True)
class Outcome:
    """Result of a campaign: one record per interruption, the updates of the run, and its problem ('' if none)."""

    records: list[Record]
    updates: int
    trouble: str
    asked: int

    @property
    def good(self) -> bool:
        """Whether every guarantee held and the run has the same bits as the uninterrupted one."""
        return not self.trouble and sum(r["kept"] for r in self.records) == len(self.records) == self.asked

    def facts(self) -> Record:
        """Facts for the raw result file."""
        return {"trouble": self.trouble, "updates": self.updates, "interruptions": self.records}

    def lines(self, seed: int) -> list[str]:
        """The lines to print at the end."""
        kept = sum(r["kept"] for r in self.records)
        same = f"after {self.updates} updates the run has the undisturbed run's weights and moments, every bit"
        return [f"{kept} of {len(self.records)} promises kept; {self.trouble or same}"]


def campaign(
    folder: Path, kinds: Sequence[Kind], given: argparse.Namespace, keep: Callable[[Outcome], None]
) -> Outcome:
    """Interrupt one run `--count` times; `keep` gets the results after each interruption."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # the cluster is stopped on the way out
    shape = (given.nodes, given.gpus)
    ways = [given.way] if given.way else list(WAYS)
    with started(max(NODES, given.nodes), given.gpus) as (cluster, own):
        print(f"the cluster is in {cluster.folder}; it is stopped at the end, however that comes", flush=True)
        runs = Runs(cluster, own / "runs", write_data(own / "data"))
        return strike_all(runs, deal(kinds, given.count, given.seed, ways), given.seed, shape, keep)


def deal(kinds: Sequence[Kind], count: int, seed: int, ways: Sequence[str]) -> list[tuple[Kind, str]]:
    """`count` kinds in random order, grouped by the way of submission, each equally often; kinds with their own options last."""
    found, left = [], (list(kinds) * count)[:count]
    for number, way in enumerate(ways):
        share = count // len(ways) + (number < count % len(ways))
        own, left = left[:share], left[share:]
        random.Random(f"{seed}-{way}").shuffle(own)
        found += [(kind, way) for kind in sorted(own, key=lambda k: of(k).options)]
    return found


def of(kind: Kind) -> Controlled:
    """The fault of this kind on this backend."""
    assert kind.controller is not None
    return kind.controller


def strike_all(
    runs: Runs, kinds: Sequence[tuple[Kind, str]], seed: int, shape: tuple[int, int], keep: Callable[[Outcome], None]
) -> Outcome:
    """Interrupt one run by each of the kinds."""
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
    """Interrupt the run, wait until it makes progress again, and submit it again if its job was not requeued."""
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
    """State in which the job ended; '' while it runs."""
    state = job["JobState"]
    if int(job.get("Restarts", "0")) > restarts:
        return "requeued" if state == "PENDING" else ""
    return state if state in OVER else ""


def _difference(runs: Runs, target: JobUnderTest, updates: int) -> str:
    """Differences from an uninterrupted run after `updates` updates; '' if there are none."""
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
    """The rows of `benchmarks/README.md`. An incomplete campaign has no row about equal bits."""
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
    """Seconds until the ranks had agreed to stop, until the job had ended, and that SLURM would have added."""
    over = f"The job was over after {_median(records, 'over_seconds'):.1f} s"
    signals = [r["signal_seconds"] for r in records if r["signal_seconds"] is not None]
    over += f", the ranks had agreed to stop after {statistics.median(signals):.1f} s" if signals else ""
    queue = _median(records, "queue_seconds")
    return over + (f"; SLURM lets it wait for {queue:.0f} s more, which the drill did not." if queue else ".")


def table(records: Sequence[Record]) -> str:
    """The table, one line per kind."""
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
