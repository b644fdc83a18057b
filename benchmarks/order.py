"""The order of videos: time to compute the samples of an update of 512 videos out of 1.2 million, at any position of a run.

python -m benchmarks.order [--full]

The baseline is a shuffled sampler: a new permutation of all videos for every epoch and after every restart.
"""

from __future__ import annotations

import argparse
import statistics
import tracemalloc

import numpy as np

from benchmarks.measure import cpu_seconds, take_turns
from benchmarks.results import plot, row, save
from multitrain.order import Plan, Source

SIZES = {"kinetics": 254_343, "mit": 748_135, "ssv2": 220_847}
BATCH = 512


def plan(videos: int | None = None, mixture: str = "interleave") -> Plan:
    """The plan of the published mixture, scaled to `videos` videos."""
    total = sum(SIZES.values())
    sources = [Source(n, s if videos is None else max(1, s * videos // total), digest="") for n, s in SIZES.items()]
    return Plan(sources, seed=0, effective_batch=BATCH, mixture=mixture, group=2 if mixture == "interleave" else 1)  # type: ignore[arg-type]


def batches(order: Plan, first: int, count: int) -> None:
    """Compute the samples of `count` updates from update `first` on."""
    for update in range(first, first + count):
        order.samples(update * BATCH, (update + 1) * BATCH)


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=__doc__)
    parser.add_argument("--full", action="store_true", help="ten times as many updates")
    given = parser.parse_args(arguments)
    count, rounds = (500, 10) if given.full else (100, 5)
    order, union, far = plan(), plan(mixture="concat"), 10**6
    variants = {
        "start": lambda _: batches(order, 1, count),
        "far": lambda _: batches(order, far, count),
        "concat": lambda _: batches(union, far, count),
    }
    each = {n: statistics.median(t) / count * 1e3 for n, t in take_turns(variants, rounds).items()}
    total = sum(SIZES.values())

    def resume() -> None:
        plan().samples(far * BATCH, (far + 1) * BATCH)

    fresh = statistics.median(cpu_seconds(resume) for _ in range(20)) * 1e3
    shuffle = (
        statistics.median(cpu_seconds(lambda: np.random.default_rng(0).permutation(total)) for _ in range(5)) * 1e3
    )
    tracemalloc.start()
    batches(plan(), far, 3)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    growth = []
    for exponent in (4, 5, 6, 7, 8):
        scaled = plan(10**exponent)
        times = [cpu_seconds(lambda p=scaled: batches(p, 1000, count)) / count * 1e3 for _ in range(rounds)]  # type: ignore[misc]
        growth.append((10.0**exponent, statistics.median(times)))
    rows = [
        row("samples of 512 videos, at the start of a run", ours=each["start"], unit="CPU ms", target="<= 1.5 CPU ms"),
        row("samples of 512 videos, after a million updates", ours=each["far"], unit="CPU ms", target="<= 1.5 CPU ms"),
        row("samples of 512 videos, mixture=concat", ours=each["concat"], unit="CPU ms", target="<= 1.5 CPU ms"),
        row(
            "resume after a million updates, to its first 512 samples",
            ours=fresh,
            baseline=shuffle,
            unit="CPU ms",
            target="<= 1.5 CPU ms",
            note="A new plan and its first samples. Baseline: numpy's permutation of all videos, before anything is skipped.",
        ),
        row("memory that samples take at their peak", ours=peak, baseline=total * 8 / 2**20, unit="MiB"),
        row(
            "growth from 10⁴ to 10⁸ videos",
            ours=growth[-1][1] / growth[0][1],
            unit="times",
            target="<= 1.25 times",
            note="CPU time of 512 samples with 10⁸ videos ÷ with 10⁴.",
        ),
    ]
    line = plot("Order: cost of an update's samples", "videos", "CPU ms per 512 samples", {"ours": growth}, log="x")
    save("order", rows, size="full" if given.full else "small", plots=[line])


if __name__ == "__main__":
    main()
