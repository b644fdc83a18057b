"""``multitrain data VERB``: a dataset made ready, looked at, and indexed. Every verb has a file of its own."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from multitrain.config import ConfigError, nearest
from multitrain.config.arguments import MISTAKE, Arguments
from multitrain.text import printable

VERBS: dict[str, tuple[str, str]] = {
    "import": ("multitrain.commands.data_import", "Official annotation files as `path label` files and class names."),
    "resize": (
        "multitrain.commands.data_resize",
        "Copies with a short side of 320 pixels; goes on where it was interrupted.",
    ),
    "pack": ("multitrain.commands.data_pack", "Videos as tar shards with one index, for a million of them."),
    "unpack": ("multitrain.commands.data_unpack", "The videos of a pack as files again."),
    "check": (
        "multitrain.commands.data_check",
        "Decode every file: what is missing, broken, short, there twice, mislabelled.",
    ),
    "index": ("multitrain.commands.data_index", "Read the annotation files of a run and build their index."),
    "stats": ("multitrain.commands.data_stats", "Sizes, class balance, durations, rates, and what the mixture draws."),
    "bench": ("multitrain.data.bench", "What training clips cost on this machine, and how many cores a GPU needs."),
    "show": ("multitrain.commands.data_show", "A picture of augmented training clips with labels and mixing weights."),
}
"""Verb: the module whose `main(arguments)` is called, and what it does."""


def main(arguments: Arguments) -> int:
    """``multitrain data``; returns the exit status. Without a verb it is ``data index``, as it always was."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if not arguments:
        print(_overview())
        return MISTAKE
    first, rest = arguments[0], list(arguments[1:])
    if first not in VERBS:
        if first.startswith("-") or "=" in first:
            first, rest = "index", list(arguments)
        else:
            raise ConfigError(f"data {first!r}: no such verb; {nearest(first, VERBS)}")
    try:
        status: int = importlib.import_module(VERBS[first][0]).main(rest)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = printable(os.fsdecode(error.filename)) + ": " if isinstance(error.filename, (str, bytes)) else ""
        raise ConfigError(f"{where}{error.strerror or error}; data {first} needs to read or write it") from None
    return status


def default_journal(out: Path | None, name: str) -> Path:
    """Default place of a verb's journal."""
    return out or Path("prepared") / name


def _overview() -> str:
    verbs = [f"  {name:<8} {what}" for name, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "multitrain data VERB …",
            "",
            *verbs,
            "",
            "multitrain data VERB --help says more; `multitrain data KEY=VALUE …` is data index",
            "example: multitrain data check experiment=ssv2 data.root=/datasets",
        ]
    )
