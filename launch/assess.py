"""From the rows of a preflight to what is wrong, with which node, and what to do about it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.node import ranges

LEAST_SHM = 0.125
"""GB free in /dev/shm below which NCCL does not start."""
LITTLE_SHM = 1.0
"""GB free in /dev/shm below which it becomes tight."""
SKEWED, WRONG = 1.0, 30.0
"""Seconds between clocks that confuse logs, and that confuse what is decided by them."""
SLOW = 0.25
"""Share of the median speed below which a node's disk, or link, counts as slow."""
CROWDED = 2.0
"""GB of a GPU's memory in use by other processes."""
SMALL = 0.1
"""GB/s below which a speed must be as well to be called slow: caches differ."""

Row = Mapping[str, Any]
COLUMNS = (
    ("rank", "rank"),
    ("node", "node"),
    ("gpu", "gpu"),
    ("cpus", "cpus"),
    ("affinity", "affinity"),
    ("shm_free_GB", "shm_GB"),
    ("read_MB_s", "read_MB/s"),
    ("write_MB_s", "write_MB/s"),
    ("rename_ms", "rename_ms"),
    ("skew_ms", "clock_ms"),
    ("link_GB_s", "link_GB/s"),
    ("allreduce_GB_s", "allreduce_GB/s"),
)
"""Keys of a row and the heads of their columns; one without any value is left out."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `node`: the one to leave out, None where no single one is to blame. `fatal`: a run would
    not start, or would not be right; else it is only slower.
    """

    text: str
    node: str | None = None
    fatal: bool = True


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one a rank."""
    columns = [
        (k, head) for k, head in COLUMNS if k in ("rank", "node", "gpu") or any(r.get(k) is not None for r in rows)
    ]
    lines = [[head for _, head in columns]]
    lines += [["–" if row.get(k) is None else str(row[k]) for k, _ in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def judge(rows: Sequence[Row], *, gpus: int | None = None, cpus: int | None = None) -> list[Finding]:
    """What is wrong with the nodes of these rows.

    Args:
        gpus: GPUs a node, where the run was given them.
        cpus: cores a rank that the run asks for.
    """
    found = [Finding(text, row["node"]) for row in rows for text in row["problems"]]
    found += _gpus(rows, gpus)
    found += _cpus(rows, cpus)
    for node, free in _by_node(rows, "shm_free_GB", min).items():
        if free < LITTLE_SHM:
            text = f"/dev/shm of {node} has {free} GB free; NCCL needs {LEAST_SHM} GB or more, 1 GB is comfortable"
            found.append(Finding(text, node, fatal=free < LEAST_SHM))
    for node, skew in _by_node(rows, "skew_ms", lambda v: max(v, key=abs)).items():
        if abs(skew) > 1e3 * SKEWED:
            text = (
                f"the clock of {node} is {skew / 1e3:+.1f} s from the first node's; have it synchronised (chrony, ntp)"
            )
            found.append(Finding(text, node, fatal=abs(skew) > 1e3 * WRONG))
    found += _odd(rows, lambda r: r["versions"], "has another version of")
    shown = [r for r in rows if r.get("model")]  # where none is shown, that is said above
    found += _odd(shown, lambda r: {k: r[k] for k in ("model", "driver") if r.get(k)}, "has another GPU")
    for key, what in (("read_MB_s", "reads videos"), ("write_MB_s", "writes"), ("link_GB_s", "talks to other ranks")):
        found += _slow(rows, key, what)
    return list(dict.fromkeys(found))


def absent(world: int, rows: Sequence[Row], nodes: Mapping[int, str], patience: float) -> list[Finding]:
    """The ranks that gave no answer, by node (`nodes`: of a rank, where it is known)."""
    missing = sorted(set(range(world)) - {row["rank"] for row in rows})
    by_node: dict[str | None, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes.get(rank), []).append(rank)
    return [
        Finding(
            f"no word within {patience:g} s from rank{'s' if len(r) > 1 else ''} {ranges(r)}"
            f"{f' on {node}' if node else ''}; look at the logs of these ranks",
            node,
        )
        for node, r in by_node.items()
    ]


def advice(findings: Sequence[Finding], rows: Sequence[Row]) -> str | None:
    """The nodes to leave out, in SLURM's notation; None when none is to blame, or when it would be all."""
    bad = sorted({f.node for f in findings if f.fatal and f.node})
    return ",".join(bad) if bad and {r["node"] for r in rows} - set(bad) else None


def _gpus(rows: Sequence[Row], gpus: int | None) -> list[Finding]:
    found = []
    expected = gpus if gpus is not None and any(r["gpu"] != "none" for r in rows) else None
    owners: dict[tuple[str, str], int] = {}
    for row in rows:
        node, device = row["node"], row["gpu"]
        if row["missing"]:
            missing = " and ".join(row["missing"])
            text = f"{node} does not show GPU {missing} that SLURM granted; it shows {row['gpus']}"
            found.append(Finding(text, node))
        elif expected is not None and device != "none" and 1 < row["gpus"] < expected:
            found.append(Finding(f"{node} shows {row['gpus']} GPUs instead of {expected}", node))
        if device == "none" or row["missing"]:
            continue
        first = owners.setdefault((node, device), row["rank"])
        if first != row["rank"]:
            text = f"ranks {first} and {row['rank']} share GPU {device} of {node}; use one task a GPU"
            found.append(Finding(text))
        if (row.get("used_GB") or 0.0) > CROWDED:
            text = f"GPU {device} of {node} has {row['used_GB']} GB in use by somebody else"
            found.append(Finding(text, node, fatal=False))
    blind = [row for row in rows if row["gpu"] == "none"]
    if blind and len(blind) < len(rows):
        for node in dict.fromkeys(r["node"] for r in blind):
            own = ranges([r["rank"] for r in blind if r["node"] == node])
            found.append(Finding(f"ranks {own} on {node} see no GPU while others do", node))
    return found


def _cpus(rows: Sequence[Row], cpus: int | None) -> list[Finding]:
    found = []
    for node in dict.fromkeys(r["node"] for r in rows):
        own = [r for r in rows if r["node"] == node]
        tight = [r for r in own if cpus and r["cpus"] < cpus]
        if tight:
            text = f"ranks {ranges([r['rank'] for r in tight])} on {node} may use {tight[0]['cpus']} of {cpus} cores"
            found.append(Finding(f"{text}; look at SLURM_CPU_BIND and cluster.cpus_per_gpu", node, fatal=False))
        elif (
            len(own) > 1 and len({r["affinity"] for r in own}) == 1 and own[0]["cpus"] < min(len(own), own[0]["cores"])
        ):
            text = f"all {len(own)} ranks on {node} are bound to the same cores {own[0]['affinity']}"
            found.append(Finding(f"{text}; look at SLURM_CPU_BIND", node, fatal=False))
    return found


def _odd(rows: Sequence[Row], values: Callable[[Row], Mapping[str, str]], what: str) -> list[Finding]:
    """Nodes that differ from most; of two halves that differ, neither is to blame."""
    found = []
    for key in dict.fromkeys(k for row in rows for k in values(row)):
        by_node = {row["node"]: values(row).get(key, "none") for row in rows}
        (usual, most), *others = Counter(by_node.values()).most_common(2)
        halves = bool(others) and others[0][1] == most
        for node, value in by_node.items():
            if value != usual:
                text = f"{node} {what} {key}: {value} instead of {usual}"
                found.append(Finding(text, None if halves else node))
    return found


def _slow(rows: Sequence[Row], key: str, what: str) -> list[Finding]:
    speeds = _by_node(rows, key, statistics.median)
    if len(speeds) < 3:
        return []
    usual = statistics.median(speeds.values())
    unit = "GB/s" if "GB" in key else "MB/s"
    small = SMALL * (1 if unit == "GB/s" else 1000)
    return [
        Finding(f"{node} {what} at {speed:g} {unit}, others at {usual:g} {unit}", node, fatal=False)
        for node, speed in speeds.items()
        if speed < SLOW * usual and speed < small
    ]


def _by_node(rows: Sequence[Row], key: str, take: Callable[[list[float]], float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            found.setdefault(row["node"], []).append(row[key])
    return {node: take(values) for node, values in found.items()}
