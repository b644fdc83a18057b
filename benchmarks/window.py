"""What a windowed order costs in randomness: how often two videos that met in an update meet again in the next pass.

    python -m benchmarks.window --videos 254343 --windows 8 16 64 256

Of a dataset of some videos, 1,000 a shard, pairs of one update of the first pass are looked for in the second pass: are both in one
update again? Under a permutation of all videos that happens by chance, 511 times in so many videos. Then, for a csv sorted by class, how
unevenly an update of the order draws the classes: the mean over updates of chi-squared by its degrees of freedom, 1 for fair draws.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from multitrain.order import Plan, Source


def meetings(plan: Plan, size: int, batch: int, *, together: int = 1) -> float:
    """Share of the pairs of an update of pass 1 that are at most `together` - 1 updates apart in pass 2."""
    first, second = (plan.samples(n * size, (n + 1) * size)["index"] for n in (1, 2))
    when = np.empty(size, np.int64)
    when[second] = np.arange(size) // batch
    whole = size // batch * batch
    rows = when[first[:whole]].reshape(-1, batch)
    apart = np.abs(rows[:, :-1] - rows[:, 1:])  # neighbours; all pairs of an update are alike
    return float((apart < together).mean())


def evenness(plan: Plan, size: int, batch: int, classes: int, over: int) -> float:
    """Chi-squared by its degrees of freedom of the classes in `over` updates in a row, of a csv sorted by class."""
    samples = plan.samples(size, 2 * size)["index"]
    span = batch * over
    whole = size // span * span
    label = (samples[:whole] * classes // size).reshape(-1, span)
    expected = span / classes
    found = [((np.bincount(row, minlength=classes) - expected) ** 2 / expected).sum() / (classes - 1) for row in label]
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--videos", type=int, default=254_343)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--classes", type=int, default=400)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 64, 256])
    given = parser.parse_args()
    for window in (None, *given.windows):
        plan = Plan([Source("a", given.videos)], seed=0, effective_batch=given.batch, shuffle_window=window)
        row = {
            "shuffle_window": window,
            "met again in an update, of a million pairs": 1e6 * meetings(plan, given.videos, given.batch),
            "met again within 60 updates, of a million pairs": 1e6
            * meetings(plan, given.videos, given.batch, together=60),
            "classes of an update, chi² / dof": evenness(plan, given.videos, given.batch, given.classes, 1),
            "classes of 100 updates, chi² / dof": evenness(plan, given.videos, given.batch, given.classes, 100),
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
