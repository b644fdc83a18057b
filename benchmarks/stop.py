"""From a signal to a verified checkpoint, and to the last process gone, with the recommended model's state.

python -m benchmarks.stop [--full] [--stops N] [--ranks N] [--seed S]

A real run of the full-size network with its AdamW moments, through ``launch/submit.py … cluster=local``: clips are small, so that
an update is short on a CPU; what has to be written is not. SIGCONT and SIGTERM come to every process, as SLURM sends them, at random
moments of an update; then the run is submitted again, and must go on exactly where it was. Where a private SLURM can run (root,
`slurm-wlm`, `munge`), the last stop is on a real controller: two nodes, `scancel --signal=USR2`, until the job is in the queue again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.drills.run import TinyRun, newest_update, write_data
from multitrain.engine import checkpoint as ck
from tests.slurm.drill import Runs, ranks_of_all_starts, reason_to_skip, started

OVERRIDES = {
    "model": "mvit_b24_32x3",  # its state; of clips as small as it takes
    "model.frames": 8,
    "model.crop": 64,
    "data": "released",
    "effective_batch": 8,
    "micro_batch": 2,
    "updates": 1000,
    "checkpoint.every": 1000,
    "eval.every": "null",
    "engine.hang_limit": 300,
}


def one_stop(run: TinyRun, ranks: int, chance: random.Random) -> dict[str, Any]:
    """Start the run, let it get on, signal it, wait until nothing is left of it; seconds from the signal."""
    before = run.position()
    run.start(ranks)
    if not run.reach(before + 2):
        raise SystemExit(f"the run ended with {run.code()}:\n{run.said.read_text()[-3000:]}")
    update = float(run.records("metrics.jsonl")[-1]["seconds"])
    time.sleep(chance.uniform(0, update))
    pids = [p for rank in run.ranks().values() for p in (rank, *run.workers(rank))]
    completed, struck = run.position(), time.time()
    for number in (signal.SIGCONT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    run.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the end of all processes")
    gone = time.time()
    run.until(lambda: not run.running, "the launcher's end")
    told = {e["event"]: e for e in run.records("events.jsonl") if _seconds(e) >= struck - 1e-3}
    return {
        "update": completed,
        "update_seconds": round(update, 3),
        "agreed": round(_seconds(told["signal"]) - struck, 3),
        "verified": round(_seconds(told["checkpoint"]) - struck, 3),
        "gone": round(gone - struck, 3),
        "saving": told["checkpoint"]["seconds"],
        "processes": len(pids),
        "lost": run.position() - run.newest(),
        "exit": run.code(),
    }


def stop_on_a_controller(chance: random.Random) -> dict[str, Any]:
    """One stop of the same run on a private SLURM; seconds from `scancel --signal=USR2`."""
    with started(2, 1) as (cluster, folder):
        runs = Runs(cluster, folder / "runs", write_data(folder / "data"))
        options = {**OVERRIDES, "precision": "fp32", "monitor.tensorboard": "false"}
        run, job = runs.submit("stopped", *(f"{key}={value}" for key, value in options.items()))
        runs.reach(run, job, 2)
        time.sleep(chance.uniform(0, float(runs.metrics(run)[-1]["seconds"])))
        struck, seen = time.time(), len(runs.events(run))
        cluster.run("scancel", "--signal=USR2", job)
        cluster.until(lambda: not ranks_of_all_starts(run), "the end of all ranks", seconds=120)
        gone = time.time()
        cluster.wait(job, "PENDING")
        told = {e["event"]: e for e in runs.events(run)[seen:]}
        return {
            "update": len(runs.metrics(run)),
            "agreed": round(_seconds(told["signal"]) - struck, 3),
            "verified": round(_seconds(told["checkpoint"]) - struck, 3),
            "requeued": round(_seconds(told["requeue"]) - struck, 3),
            "gone": round(gone - struck, 3),
            "lost": len(runs.metrics(run)) - newest_update(run),
        }


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def measure(folder: Path, ranks: int, stops: int, seed: int) -> tuple[list[dict[str, Any]], int, int]:
    """All stops of one run; parameters, and bytes of its checkpoint."""
    chance = random.Random(seed)
    run = TinyRun(folder / "runs", "stopped", write_data(folder / "data"), {**OVERRIDES, "precision": "fp32"})
    run.runs.mkdir()
    found = []
    try:
        for _ in range(stops):
            found.append(one_stop(run, ranks, chance))
            print(found[-1], flush=True)
    finally:
        run.end()
    resumed = [e["update"] for e in run.records("events.jsonl") if e["event"] == "resume"]
    for stop, update in zip(found, resumed):  # what the next start made of it
        stop["lost"] = max(stop["lost"], stop["update"] - update)
    newest = ck.listed(run.folder / "checkpoints")[0]
    size = sum(f.stat().st_size for f in newest.iterdir())
    return found, sum(t.numel() for t in ck.read(newest).weights.values()), size


def main(arguments: list[str] | None = None) -> int:
    """Measure and save; 1 when an update was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="ten stops")
    parser.add_argument("--stops", type=int, help="how many (default 3, with --full 10)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the run ends with this process
    with tempfile.TemporaryDirectory() as folder:
        stops = given.stops or (10 if given.full else 3)
        found, parameters, size = measure(Path(folder), given.ranks, stops, given.seed)
    print(f"seed {given.seed}")
    update = statistics.median(s["update_seconds"] for s in found)
    what = (
        f"{parameters / 1e6:.1f} M parameters with moments, {size / 1e6:.0f} MB, {given.ranks} ranks, median of {len(found)} "
        f"stops at random moments of updates of {update:.1f} s; the slowest in brackets"
    )
    rows = []
    for key, figure in (
        ("agreed", "from SIGTERM to the stop that all ranks agree on"),
        ("verified", "from SIGTERM to the verified checkpoint"),
        ("gone", "from SIGTERM to the end of the last process"),
    ):
        values = [s[key] for s in found]
        rows.append(
            results.row(figure, ours=statistics.median(values), unit="s", note=f"At most {max(values):.1f} s. {what}")
        )
    queued = None if reason_to_skip() else stop_on_a_controller(random.Random(given.seed))
    if queued:
        print(queued, flush=True)
        rows.append(
            results.row(
                "from SLURM's SIGUSR2 to the end of the last rank, requeued",
                ours=queued["gone"],
                unit="s",
                note=f"Two nodes of a private SLURM; the checkpoint was verified after {queued['verified']:.1f} s.",
            )
        )
    lost = max(s["lost"] for s in [*found, *([queued] if queued else [])])
    rows.append(results.row("completed updates lost by it, at most", ours=lost, unit="updates", target="<= 0 updates"))
    results.save("stop", rows, size="full" if given.full else "small", stops=found, on_a_controller=queued)
    return 1 if lost or any(s["exit"] != 75 for s in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
