"""``multitrain VERB``: thin. Every verb is a function elsewhere; mistakes are one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from multitrain.config import ConfigError, RunConfig, nearest

if TYPE_CHECKING:
    from multitrain.evaluation.evaluator import Evaluation

FINISHED, MISTAKE, INTERRUPTED = 0, 2, 75
WAIT_FOR_END = 120.0
"""Seconds that a rank waits for SLURM to end it after its job was put back into the queue."""

Arguments = Sequence[str]


def main(arguments: Arguments | None = None) -> int:
    """Runs one verb; returns the exit status: 0, 2 for a mistake, 75 for an evaluation that was interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return FINISHED if arguments else MISTAKE
    if arguments[0] in ("-V", "--version", "version"):
        from multitrain import __version__

        print(__version__)
        return FINISHED
    try:
        verb = VERBS.get(arguments[0])
        if verb is None:
            raise ConfigError(f"{arguments[0]!r} is no verb; {_hint(arguments[0])}")
        return verb(arguments[1:])
    except ConfigError as error:
        return _mistake(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINISHED


# -- verbs -----------------------------------------------------------------------------------------------------------


def predict(arguments: Arguments) -> int:
    """Which action is in a video file?"""
    parser = _parser("predict", predict, "multitrain predict clip.mp4 --checkpoint multitrain_release.v1.pyth")
    parser.add_argument("--checkpoint", required=True, metavar="MODEL", help=_MODEL)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument("--top", type=_count, default=5, metavar="N", help="classes for each dataset (default 5)")
    parser.add_argument(
        "--views", default="centre", choices=("centre", "test"), help="one clip, or all of the multi-view test"
    )
    parser.add_argument(
        "--classes", action="append", default=[], metavar="DATASET=FILE", help="class names, one a line"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object a video")
    given = parser.parse_args(arguments)
    from multitrain.data.decode import VideoError
    from multitrain.evaluation.predictor import load

    names = dict(_pair(text, "--classes") for text in given.classes)
    model = load(given.checkpoint, class_names=names).to(_device(given.device))
    status = FINISHED
    for video in given.videos:
        try:
            found = model.predict(video, given.top, views=given.views)
        except VideoError as error:
            status = _mistake(error)
            continue
        if given.json:
            print(json.dumps({"video": video, "predictions": found}, ensure_ascii=False), flush=True)
        else:
            print(_predictions(video, found), flush=True)
    return status


def evaluate(arguments: Arguments) -> int:
    """Multi-view test of a model; goes on where an interrupted one was. Under srun, ranks share the videos."""
    parser = _parser(
        "evaluate", evaluate, "multitrain evaluate runs/k400_mit_ssv2 --dataset kinetics data.root=/datasets"
    )
    parser.add_argument("model", help=_MODEL)
    parser.add_argument(
        "--dataset", nargs="+", action="extend", metavar="NAME", help="datasets to test on (default: all of the model)"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="annotation file (default test.csv)"
    )
    parser.add_argument("--head", metavar="NAME", help="score with this dataset's head: scores only, no accuracy")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where scores and metrics.json go (default: beside the weights)"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="arithmetic (default: eval.precision, else fp32)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: this rank's GPU, else the CPU)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="changes to the stored configuration, e.g. data.root=/datasets",
    )
    given = _split_overrides(parser, arguments)
    from multitrain.evaluation import evaluator
    from multitrain.evaluation.predictor import load
    from multitrain.evaluation.settings import with_overrides
    from multitrain.monitor import slurm

    stop = _StopSignals()
    place = slurm.rank_environment()
    rank, world_size = int(place["RANK"]), int(place["WORLD_SIZE"])
    model = load(given.model)
    config = with_overrides(model.run, given.overrides)
    _require_same_network(model.run, config)
    out = given.out or _default_out(given.model, given.split)
    model.to(_device(given.device, int(place["LOCAL_RANK"])))
    done = evaluator.evaluate(
        model,
        config,
        given.dataset or list(model.datasets),
        given.split,
        out_dir=out,
        rank=rank,
        world_size=world_size,
        head=given.head,
        precision=given.precision,
        stop=stop,
        progress=_progress if rank == 0 else None,
    )
    if not done.finished:
        print(f"interrupted; the same command goes on from what is in {out}", file=sys.stderr, flush=True)
        return _leave(rank, stop)
    if rank == 0:
        _print_evaluation(done)
    return FINISHED


def convert(arguments: Arguments) -> int:
    """One kind of weights file into another: .pyth and .safetensors."""
    parser = _parser("convert", convert, "multitrain convert runs/k400_mit_ssv2 model.pyth")
    parser.add_argument("source", help=_MODEL)
    parser.add_argument("target", help="file to write; its ending says how: .pyth or .safetensors")
    parser.add_argument(
        "--frames", type=_count, help="frames of a clip, when another number: position tables are interpolated"
    )
    parser.add_argument(
        "--crop", type=_count, help="side of a clip in pixels, when another: position tables are interpolated"
    )
    parser.add_argument("--force", action="store_true", help="replace the target when it exists")
    given = parser.parse_args(arguments)
    from multitrain.interop.convert import convert as write

    done = write(given.source, given.target, frames=given.frames, crop=given.crop, force=given.force)
    heads = ", ".join(f"{name} ({classes})" for name, classes in done.datasets.items())
    print(f"{done.target}: {done.tensors} tensors, {done.parameters:,} parameters; heads: {heads}")
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return FINISHED


def status(arguments: Arguments) -> int:
    """How runs are doing."""
    from multitrain.monitor.status import main as show

    return show(list(arguments))


def report(arguments: Arguments) -> int:
    """Curves, figures and example clips of a run as one page."""
    from multitrain.evaluation.report import main as write

    return write(list(arguments))


def data(arguments: Arguments) -> int:
    """Check and index the annotation files of a run."""
    parser = _parser("data", data, "multitrain data experiment=k400_mit_ssv2 data.root=/datasets")
    parser.add_argument(
        "--run", metavar="DIR", help="a run's folder or its config.yaml, instead of the shipped configuration"
    )
    parser.add_argument(
        "--index", type=Path, metavar="DIR", help="folder for the index (default: data.index, else RUNS/.index)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options, e.g. data=ssv2 data.root=/datasets")
    given = _split_overrides(parser, arguments)
    import tempfile

    from multitrain.config import dump
    from multitrain.data.catalog import main as check

    config = _configured(given.run, given.overrides)
    index = given.index or config.data.index or Path(config.runs) / ".index"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(config))
        return check([str(file), "--index", str(index), *(["--json"] if given.json else [])])


def preflight(arguments: Arguments) -> int:
    """Check nodes and GPUs before a long run."""
    return subprocess.run([sys.executable, "-m", "launch.preflight", *arguments], check=False).returncode


def flops(arguments: Arguments) -> int:
    """Parameters and multiply-accumulates of a clip."""
    parser = _parser("flops", flops, "multitrain flops model=mvit_b16_16x4")
    parser.add_argument("--run", metavar="MODEL", help=f"{_MODEL}, instead of the shipped configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="options, e.g. experiment=k400 model.frames=16"
    )
    given = _split_overrides(parser, arguments)
    from multitrain.data.catalog import resolve_classes
    from multitrain.model.cost import flops as count

    config = _stored(given.run, given.overrides) if given.run else _configured(None, given.overrides)
    datasets = {name: resolve_classes(d) for name, d in config.data.datasets.items()}
    parameters, operations = count(config.model, datasets)
    m = config.model
    print(
        f"{parameters:,} parameters, {operations / 1e9:.2f} G multiply-accumulates for a clip of {m.frames} × {m.crop}²"
    )
    return FINISHED


VERBS: dict[str, Callable[[Arguments], int]] = {
    "predict": predict,
    "evaluate": evaluate,
    "convert": convert,
    "status": status,
    "report": report,
    "data": data,
    "preflight": preflight,
    "flops": flops,
}

_MODEL = "a .pyth or .safetensors file, a run's folder, or a checkpoint's folder"
_ELSEWHERE = {
    "train": "to train: python launch/submit.py nodes=2 gpus=8",
    "submit": "to submit a run: python launch/submit.py nodes=2 gpus=8",
    "test": "to test a model: multitrain evaluate MODEL",
}


# -- the command line ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        flat = " ".join(message.split())
        self.exit(MISTAKE, f"{self.prog}: {flat}; see {self.prog} --help\n")


def _parser(verb: str, function: Callable[..., int], example: str) -> _Parser:
    text = (function.__doc__ or "").strip()
    return _Parser(prog=f"multitrain {verb}", description=text, epilog=f"example: {example}", allow_abbrev=False)


def _split_overrides(parser: _Parser, arguments: Arguments) -> argparse.Namespace:
    """Like `parse_args`; ``key=value`` may stand anywhere, even after ``--dataset a b``."""
    overrides: list[str] = []
    rest: list[str] = []
    takes_value = False
    for text in arguments:
        is_override = not takes_value and not text.startswith("-") and "=" in text and not Path(text).exists()
        (overrides if is_override else rest).append(text)
        takes_value = text in ("--out", "--index", "--run")
    given = parser.parse_args(rest)
    given.overrides = [*given.overrides, *overrides]
    return given


def _overview() -> str:
    lines = ["multitrain VERB …", ""]
    lines += [f"  {name:<10} {(function.__doc__ or '').strip()}" for name, function in VERBS.items()]
    return "\n".join([*lines, "", "multitrain VERB --help says more. To train: python launch/submit.py"])


def _hint(verb: str) -> str:
    return _ELSEWHERE.get(verb) or nearest(verb, VERBS)


def _mistake(error: object) -> int:
    print(f"multitrain: {error}", file=sys.stderr, flush=True)
    return MISTAKE


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"{option} {text!r}: write DATASET=FILE")
    return name, value


def _device(name: str | None, local_rank: int = 0) -> str:
    import torch

    if name is None:
        return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r}: no such device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: {torch.cuda.device_count()} GPUs are visible here; use another number, or cpu"
        )
    return str(device)


def _configured(run: str | None, overrides: Sequence[str]) -> RunConfig:
    """The shipped configuration, or that of a run, with overrides."""
    from multitrain.config import compose, load

    if run is None:
        return compose(overrides)
    from multitrain.evaluation.settings import with_overrides

    return with_overrides(load(run), overrides)


def _stored(model: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration stored with weights, with overrides."""
    from multitrain.evaluation.settings import with_overrides
    from multitrain.interop.weights import run_config

    return with_overrides(run_config(model), overrides)


# -- evaluate --------------------------------------------------------------------------------------------------------


class _StopSignals:
    """Whether somebody asked this process to stop; notes SLURM's signals and Ctrl-C from now on."""

    def __init__(self) -> None:
        from multitrain.monitor import slurm

        self.received: list[int] = []
        pid = os.getpid()

        def note(number: int, _frame: FrameType | None) -> None:
            if os.getpid() == pid:
                if number == signal.SIGINT and number in self.received:
                    raise KeyboardInterrupt
                self.received.append(number)

        for number in (*slurm.STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, note)
        slurm.unblock_stop_signals()

    def __call__(self) -> bool:
        return bool(self.received)


def _leave(rank: int, stop: _StopSignals) -> int:
    """After an interruption: back into the queue when SLURM took the nodes away; then wait for SLURM to end the step."""
    from multitrain.monitor import slurm

    job = slurm.job_id() if slurm.in_step() else None
    if job is None or set(stop.received) == {signal.SIGINT}:
        return INTERRUPTED
    if rank == 0:
        try:
            reason = slurm.taken_away(job, stop.received)
            if reason is None:
                return INTERRUPTED
            print(f"{reason}: back into the queue", flush=True)
            slurm.requeue(job)
        except slurm.SlurmError as error:
            print(f"multitrain: {error}; submit the same command again", file=sys.stderr, flush=True)
            return INTERRUPTED
    time.sleep(WAIT_FOR_END)
    return INTERRUPTED


def _require_same_network(stored: RunConfig, config: RunConfig) -> None:
    if config.model != stored.model:
        changed = [n for n in type(stored.model).model_fields if getattr(stored.model, n) != getattr(config.model, n)]
        raise ConfigError(
            f"model.{changed[0]}: the network is that of the weights and cannot be changed; `multitrain convert` can resize positions"
        )


def _default_out(model: str, split: str) -> Path:
    """``RUN/evaluation/CHECKPOINT/SPLIT`` for weights of a run, else ``evaluation/FILE/SPLIT`` in the working folder."""
    path = Path(model)
    if path.suffix in (".pyth", ".safetensors") and path.parent.name[:7] != "update-":
        return Path("evaluation") / path.stem / split
    from multitrain.interop.weights import locate

    checkpoint = locate(path).parent
    return checkpoint.parent.parent / "evaluation" / checkpoint.name / split


_last_line = 0.0


def _progress(dataset: str, done: int, of: int) -> None:
    """A line of rank 0's share every ten seconds, and at the end."""
    global _last_line
    now = time.monotonic()
    if now - _last_line >= 10 or done == of:
        _last_line = now
        print(f"{dataset}: {done} of {of} videos of this rank", file=sys.stderr, flush=True)


def _print_evaluation(done: Evaluation) -> None:
    for name, result in done.results.items():
        lost = result["unreadable"]
        if lost:
            print(
                f"{name}: {len(lost)} of {result['videos']} videos could not be read (first: {lost[0]['path']}: {lost[0]['reason']}); "
                f"to try them again, delete {done.folder}/{name}/shards/*.unreadable.jsonl and run the same command",
                file=sys.stderr,
            )
    print(done.table)
    print(f"scores and figures: {done.folder}", file=sys.stderr)


def _predictions(video: str, found: dict[str, list[tuple[str, float]]]) -> str:
    width = max(len(name) for name in found)
    rows = [
        f"  {name:<{width}}  " + ", ".join(f"{label} {100 * p:.1f}%" for label, p in best)
        for name, best in found.items()
    ]
    return "\n".join([video, *rows])


if __name__ == "__main__":
    raise SystemExit(main())

__all__: list[Any] = ["main"]
