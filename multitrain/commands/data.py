"""``multitrain data VERB``: prepare, inspect and index datasets. Every verb has its own module."""

from __future__ import annotations

import importlib

from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError, nearest
from multitrain.config.arguments import Arguments

VERBS: dict[str, tuple[str, str]] = {
    "import": ("multitrain.commands.data_import", "Official annotation files as `path label` files and class names."),
    "resize": (
        "multitrain.commands.data_resize",
        "Copies with a short side of 320 pixels; resumes after an interruption.",
    ),
    "pack": ("multitrain.commands.data_pack", "Videos as tar shards with one index, for a million of them."),
    "unpack": ("multitrain.commands.data_unpack", "The videos of a pack as files again."),
    "check": (
        "multitrain.commands.data_check",
        "Decode every file; list missing, broken, short, duplicate and mislabelled videos.",
    ),
    "index": ("multitrain.commands.data_index", "Read the annotation files of a run and build their index."),
    "stats": (
        "multitrain.commands.data_stats",
        "Sizes, class balance, durations, frame rates, and the mixture's samples.",
    ),
    "bench": ("multitrain.data.bench", "CPU cost of training clips on this machine, and cores per GPU."),
    "show": ("multitrain.commands.data_show", "A picture of augmented training clips with labels and mixing weights."),
}
"""By verb: the module whose `main(arguments)` is called, and a description."""


def main(arguments: Arguments) -> int:
    """``multitrain data``; returns the exit status. Without a verb, options run ``data index``."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return Exit.FINISHED if arguments else Exit.MISTAKE
    first, rest = arguments[0], list(arguments[1:])
    if first not in VERBS:
        if first.startswith("-") or "=" in first:
            first, rest = "index", list(arguments)
        else:
            raise ConfigError(f"data {first!r}: no such verb; {nearest(first, VERBS)}")
    status: int = importlib.import_module(VERBS[first][0]).main(rest)
    return status


def _overview() -> str:
    verbs = [f"  {name:<8} {what}" for name, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "multitrain data VERB …",
            "",
            *verbs,
            "",
            "details: multitrain data VERB --help; `multitrain data KEY=VALUE …` is data index",
            "example: multitrain data check experiment=ssv2 data.root=/datasets",
        ]
    )
