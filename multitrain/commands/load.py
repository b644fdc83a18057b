"""``multitrain load --check FILE``: what a file of weights is, and what a run would load of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from multitrain.commands.common import configured
from multitrain.config import ConfigError, RunConfig
from multitrain.config.arguments import Arguments, Parser
from multitrain.text import printable


def _parser() -> Parser:
    parser = Parser(
        "load",
        "Say what a file or folder of weights is: format, network, heads, which set of weights. With options of a run, also which tensors "
        "the run would load with init_from. Writes nothing, and runs no code in the file. Exit status: 0 it loads, 1 it does not, "
        "2 there is no such file or option.",
        "multitrain load --check MViTv2_B_32x3_k400.pyth",
        "multitrain load --check MViTv2_B_32x3_k400.pyth experiment=k400 model=mvitv2_b",
    )
    parser.add_argument("file", metavar="FILE", help="any file or folder of weights, or the name of a run")
    parser.add_overrides("experiment=k400 model=mvitv2_b")
    parser.add_argument("--check", action="store_true", help="only look, which is all that this verb does")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain load``; returns the exit status."""
    given = _parser().parse_with_overrides(list(arguments))
    config = configured(None, given.overrides, given.config_dir) if given.overrides else None
    from multitrain.interop.inspection import inspect

    found = inspect(given.file)
    run = None if config is None else _of_run(config, given.file)
    if given.json:
        print(json.dumps({**asdict(found), "path": str(found.path), "run": run}, ensure_ascii=False))
    else:
        lines = found.lines() if run is None else found.lines()[:-1]
        print(*(printable(line) for line in [*lines, *(run or {}).get("lines", ())]), sep="\n")
    refused = found.problem if run is None else run["problem"]
    return 0 if refused is None else 1


def _of_run(config: RunConfig, file: str) -> dict[str, Any]:
    """What a run of this configuration would load of the file, by tensor, and as text."""
    from multitrain.commands.fits import report

    try:
        loaded = report(config.model_copy(update={"init_from": file}))
    except ConfigError as error:
        details = [str(line) for line in getattr(error, "details", ())]
        return {"problem": str(error), "lines": [f"problem  a run would refuse it: {error}", *details]}
    return {
        "problem": None,
        "matched": loaded.matched,
        "missing": loaded.missing,
        "unexpected": loaded.unexpected,
        "reshaped": loaded.reshaped,
        "notes": loaded.notes,
        "lines": [f"run      init_from: {loaded}", *loaded.lines()],
    }
