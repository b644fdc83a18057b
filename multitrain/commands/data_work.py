"""What the verbs of ``multitrain data`` share: options, and the loop over many files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.commands.common import StopSignals
from multitrain.config.arguments import Parser, whole_number

if TYPE_CHECKING:
    from multitrain.data.tools.parallel_map import Item, Work


def add_run_option(parser: Parser) -> None:
    """Add ``--run``."""
    parser.add_argument(
        "--run", metavar="DIR", help="a run's folder or its config.yaml, instead of the shipped configuration"
    )


def add_index_option(parser: Parser) -> None:
    """Add ``--index``."""
    parser.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="folder for the index (default: data.index, else RUNS/.index, or .index)",
    )


def add_segment_option(parser: Parser) -> None:
    """Add ``--segment-lines``."""
    parser.add_argument(
        "--segment-lines", action="store_true", help="lines may be 'path start end label' (data.datasets.NAME.segments)"
    )


def add_work_options(parser: Parser) -> None:
    """Add the options of commands that process many files."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        type=whole_number,
        default=cores,
        metavar="N",
        help=f"number of processes (default: one per core, here {cores})",
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="process every N-th file only, starting with number I (0 to N-1)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="time limit per file in seconds (default 600)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def interrupted(
    title: str,
    items: Sequence[Item],
    work: Work,
    given: argparse.Namespace,
    done: Callable[[Item, dict[str, Any]], bool],
    *,
    timeout: float,
    stop: StopSignals,
    unit: str = "file",
) -> bool:
    """Process `items` in worker processes with a progress bar; return whether a signal interrupted it, after a message.

    Args:
        work: the function of one item, as for :func:`~multitrain.data.tools.parallel_map.map_resumable`.
        given: with the options of :func:`add_work_options`.
        done: called with each item and the result of `work`; returns whether it succeeded.
        timeout: per item, in seconds.
    """
    from multitrain.data.tools.parallel_map import ProgressBar, map_resumable

    bar = ProgressBar(title, len(items), unit=unit)
    for item, record in map_resumable(items, work, workers=given.workers, timeout=timeout, stop=stop):
        bar.add(bad=not done(item, record))
    bar.close()
    if stop():
        print("interrupted; run the same command again to continue", file=sys.stderr)
    return stop()
