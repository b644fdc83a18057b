"""``multitrain VERB``: calls the module of the verb; a mistake of the user is one line and exit status 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from multitrain.cluster.exit_status import Exit
from multitrain.config import ConfigError, nearest
from multitrain.config.arguments import answered, piped

VERBS: dict[str, tuple[str, str]] = {
    "submit": ("launch.submit", "Submit a training run to SLURM, or run it here with cluster=local."),
    "sweep": ("launch.sweep", "Several runs that differ in some options, as one array of jobs."),
    "predict": ("multitrain.commands.predict", "Classify the action in video files."),
    "evaluate": ("multitrain.commands.evaluate", "Multi-view test of a model; resumes after an interruption."),
    "load": (
        "multitrain.commands.load",
        "What a file of weights is, and what a run would load of it: load --check FILE.",
    ),
    "convert": ("multitrain.commands.convert", "Convert weights to .pyth, .safetensors + config.json, or a folder."),
    "export": ("multitrain.interop.export", "A folder to publish: weights, class names, model card with results."),
    "completion": ("multitrain.commands.completion", "Completion of commands and options for bash, zsh or fish."),
    "status": ("multitrain.report.status", "Status of runs."),
    "report": ("multitrain.report.run_report", "Curves, metrics and example clips of a run as one HTML page."),
    "compare": ("multitrain.report.compare", "Runs side by side: the options in which they differ, and their results."),
    "embed": ("multitrain.commands.embed", "Features of videos, and a map of them by dataset and class."),
    "nearest": ("multitrain.commands.nearest", "Related classes of different datasets, by the learned projections."),
    "data": ("multitrain.commands.data", "Prepare datasets: import, resize, pack, check, index, stats, show."),
    "preflight": ("multitrain.commands.preflight", "Check nodes and GPUs before a long run."),
    "flops": ("multitrain.commands.flops", "Parameters and multiply-accumulates of a clip."),
}
"""By verb: the module whose `main(arguments)` is called, imported when needed; and a description."""

ELSEWHERE = {
    "train": "to train: multitrain submit nodes=2 gpus=8 (the same: python launch/submit.py)",
    "test": "to test a model: multitrain evaluate MODEL",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return its exit status: 0, 2 for a mistake, 75 if it was interrupted and can be resumed."""
    return piped(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return Exit.FINISHED if arguments else Exit.MISTAKE
    if arguments[0] in ("-V", "--version", "version"):
        from multitrain import __version__

        print(__version__)
        return Exit.FINISHED
    return answered(lambda: _verb(arguments[0], arguments[1:]), "multitrain")


def _verb(name: str, arguments: Sequence[str]) -> int:
    if name not in VERBS:
        raise ConfigError(f"{name!r} is no verb; {ELSEWHERE.get(name) or nearest(name, VERBS)}")
    status: int = importlib.import_module(VERBS[name][0]).main(list(arguments))
    return status


def _overview() -> str:
    lines = ["multitrain VERB …", ""]
    lines += [f"  {name:<10} {what}" for name, (_, what) in VERBS.items()]
    return "\n".join(
        [
            *lines,
            "",
            "multitrain VERB --help says more. To train: multitrain submit, the same as python launch/submit.py",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
