"""Find problems in the rows of a preflight: what is wrong, with which node, and what to do about it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.node import ranges

MIN_SHM_GB = 0.125
"""GB free in /dev/shm below which NCCL does not start."""
LOW_SHM_GB = 1.0
"""GB free in /dev/shm below which a warning is printed."""
CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 1.0, 30.0
"""Seconds between two clocks from which on logs are confusing (a warning), and decisions by the clock are wrong (an error)."""
SLOW_FRACTION = 0.25
"""Fraction of the median speed below which a node's disk or link counts as slow."""
GPU_IN_USE_GB = 2.0
"""GB of a GPU's memory in use by other processes from which on a warning is printed."""
SLOW_BELOW_GB_S = 0.1
"""GB/s above which no speed counts as slow, since caches differ."""

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
    ("backend", "backend"),
)
"""Keys of a row and the titles of their columns; a column without any value is left out."""


@dataclass(frozen=True)
class Finding:
    """One problem. `node`: the node to exclude; None where no single node is at fault. `fatal`: a run would not start, or would
    be wrong; otherwise it would only be slower.
    """

    text: str
    node: str | None = None
    fatal: bool = True


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line per rank."""
    columns = [
        (k, head) for k, head in COLUMNS if k in ("rank", "node", "gpu") or any(r.get(k) is not None for r in rows)
    ]
    lines = [[head for _, head in columns]]
    lines += [["–" if row.get(k) is None else str(row[k]) for k, _ in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def find_problems(rows: Sequence[Row], *, gpus: int | None = None, cpus: int | None = None) -> list[Finding]:
    """The problems that the rows show.

    Args:
        gpus: GPUs per node that the run asked SLURM for.
        cpus: cores per rank that the run asks for.
    """
    found = [Finding(text, row["node"]) for row in rows for text in row["problems"]]
    found += _gpus(rows, gpus)
    found += _cpus(rows, cpus)
    for node, free in _by_node(rows, "shm_free_GB", min).items():
        if free < LOW_SHM_GB:
            text = f"/dev/shm of {node} has {free} GB free; NCCL needs {MIN_SHM_GB} GB or more, 1 GB is comfortable"
            found.append(Finding(text, node, fatal=free < MIN_SHM_GB))
    for node, offset in _by_node(rows, "skew_ms", lambda v: max(v, key=abs)).items():
        if abs(offset) > 1e3 * CLOCK_WARNING_SECONDS:
            text = f"the clock of {node} is {offset / 1e3:+.1f} s from the first node's; have it synchronised (chrony, ntp)"
            found.append(Finding(text, node, fatal=abs(offset) > 1e3 * CLOCK_ERROR_SECONDS))
    found += _differing_nodes(rows, lambda r: r["versions"], "has another version of")
    shown = [r for r in rows if r.get("model")]  # a missing GPU is reported above
    found += _differing_nodes(shown, lambda r: {k: r[k] for k in ("model", "driver") if r.get(k)}, "has another GPU")
    for key, what in (
        ("read_MB_s", "reads videos"),
        ("write_MB_s", "writes"),
        ("link_GB_s", "exchanges data with other ranks"),
    ):
        found += _slow(rows, key, what)
    return list(dict.fromkeys(found))


def missing_ranks(world: int, rows: Sequence[Row], nodes: Mapping[int, str], timeout: float) -> list[Finding]:
    """The ranks that did not answer, one finding per node (`nodes`: node of each rank, as far as known)."""
    missing = sorted(set(range(world)) - {row["rank"] for row in rows})
    by_node: dict[str | None, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes.get(rank), []).append(rank)
    return [
        Finding(
            f"rank{'s' if len(r) > 1 else ''} {ranges(r)}{f' on {node}' if node else ''} did not answer within {timeout:g} s; "
            f"look at the log{'s' if len(r) > 1 else ''} of {'these ranks' if len(r) > 1 else 'this rank'}",
            node,
        )
        for node, r in by_node.items()
    ]


def nodes_to_exclude(findings: Sequence[Finding], rows: Sequence[Row]) -> str | None:
    """The nodes to exclude, in SLURM's notation; None when no node is at fault, or all of them are."""
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
            text = f"ranks {first} and {row['rank']} share GPU {device} of {node}; use one task per GPU"
            found.append(Finding(text))
        if (row.get("used_GB") or 0.0) > GPU_IN_USE_GB:
            text = f"other processes use {row['used_GB']} GB of GPU {device} of {node}"
            found.append(Finding(text, node, fatal=False))
    without_gpu = [row for row in rows if row["gpu"] == "none"]
    if without_gpu and len(without_gpu) < len(rows):
        for node in dict.fromkeys(r["node"] for r in without_gpu):
            own = ranges([r["rank"] for r in without_gpu if r["node"] == node])
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


def _differing_nodes(rows: Sequence[Row], values: Callable[[Row], Mapping[str, str]], what: str) -> list[Finding]:
    """Nodes whose values differ from the majority's; with two equal halves, no node is at fault."""
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
    small = SLOW_BELOW_GB_S * (1 if unit == "GB/s" else 1000)
    return [
        Finding(f"{node} {what} at {speed:g} {unit}, others at {usual:g} {unit}", node, fatal=False)
        for node, speed in speeds.items()
        if speed < SLOW_FRACTION * usual and speed < small
    ]


def _by_node(rows: Sequence[Row], key: str, take: Callable[[list[float]], float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            found.setdefault(row["node"], []).append(row[key])
    return {node: take(values) for node, values in found.items()}
