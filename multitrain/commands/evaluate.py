"""``multitrain evaluate``: the multi-view test, which can be interrupted and resumed like training."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.cluster.exit_status import Exit
from multitrain.commands.common import MODEL, StopSignals, device
from multitrain.config import ClusterConfig, ConfigError, RunConfig
from multitrain.config.arguments import Arguments, Parser
from multitrain.files import refuse_run
from multitrain.text import printable

if TYPE_CHECKING:
    from multitrain.evaluation.evaluator import Evaluation

WAIT_FOR_END = 120.0
"""Seconds that a rank waits for SLURM to end it after its job was requeued."""


def _parser() -> Parser:
    from multitrain.data.corruptions import NAMES, STRENGTHS

    parser = Parser(
        "evaluate",
        "Multi-view test of a model; resumes an interrupted test. Under srun, ranks share the videos.",
        "multitrain evaluate runs/k400_mit_ssv2 --dataset kinetics data.root=/datasets",
        "multitrain evaluate runs/k400_mit_ssv2 --perturb noise blur --strengths 1 3 5",
    )
    parser.add_model(MODEL)
    parser.add_argument(
        "--dataset", nargs="+", action="extend", metavar="NAME", help="datasets to test on (default: all of the model)"
    )
    parser.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="annotation file (default test.csv)"
    )
    parser.add_argument("--head", metavar="NAME", help="score with this dataset's head: scores only, unless --map")
    parser.add_argument(
        "--map",
        metavar="FILE",
        help="csv `class of the head,class of the dataset`: accuracy with --head on the videos of the mapped classes",
    )
    parser.add_argument(
        "--perturb",
        nargs="+",
        action="extend",
        metavar="KIND",
        choices=("all", *NAMES),
        help=f"test again with corrupted videos: all, or {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--strengths",
        nargs="+",
        type=int,
        choices=STRENGTHS,
        default=STRENGTHS,
        metavar="N",
        help="of --perturb (default 1 2 3 4 5)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for scores and metrics.json (default: beside the weights)"
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
    return parser


def main(arguments: Arguments) -> int:
    """``multitrain evaluate``; returns the exit status."""
    parser = _parser()
    given = parser.parse_with_overrides(arguments)
    given.model, given.overrides = parser.model_and_words(given, given.overrides)
    from multitrain.cluster import slurm
    from multitrain.evaluation import evaluator, robustness
    from multitrain.evaluation.predictor import load
    from multitrain.evaluation.settings import with_overrides

    if given.perturb and given.head and not given.map:
        raise ConfigError(
            "--perturb: needs accuracies, which --head does not give; leave one of them out, or add --map FILE"
        )
    if given.map and not given.head:
        raise ConfigError("--map: maps the classes of another dataset's head; name it with --head NAME")
    out = given.out or _default_out(given.model, given.split)
    refuse_run(out, whole=False)
    if given.perturb:
        robustness.check(out, robustness.corruptions(given.perturb, given.strengths))
    stop = StopSignals()
    place = slurm.rank_environment()
    rank, world_size = int(place["RANK"]), int(place["WORLD_SIZE"])
    model = load(given.model)
    config = with_overrides(model.run, given.overrides, config_dirs=given.config_dir)
    _require_same_network(model.run, config)
    model.to(device(given.device, int(place["LOCAL_RANK"])))
    evaluate = partial(
        evaluator.evaluate,
        model,
        config,
        given.dataset or list(model.datasets),
        given.split,
        rank=rank,
        world_size=world_size,
        head=given.head,
        class_map=given.map,
        head_names=model.class_names.get(given.head),
        precision=given.precision,
        stop=stop,
        progress=_progress if rank == 0 else None,
    )
    done = evaluate(out_dir=out)
    if done.finished and rank == 0:
        _print_evaluation(done)
        _name_average(given.model)
    if done.finished and given.perturb:
        done = _perturbed(given, evaluate, out, done, rank)
    if not done.finished:
        print(f"interrupted; run the same command again to continue from what is in {out}", file=sys.stderr, flush=True)
        return _leave(rank, stop)
    return Exit.FINISHED


def _perturbed(
    given: argparse.Namespace, evaluate: Callable[..., Evaluation], out: Path, clean: Evaluation, rank: int
) -> Evaluation:
    """Test under every corruption that was asked for; the last evaluation, not finished if it was interrupted."""
    from multitrain.evaluation import robustness

    found = {}
    done = clean
    for corruption in robustness.corruptions(given.perturb, given.strengths):
        done = evaluate(out_dir=robustness.folder_of(out, corruption), corruption=corruption)
        if not done.finished:
            return done
        found[corruption] = done.results
    if rank == 0:
        print(robustness.write(out, clean.results, found))
        print(f"table and plot: {out / robustness.FOLDER}", file=sys.stderr)
    return done


def _leave(rank: int, stop: StopSignals) -> int:
    """After an interruption: requeue the job if SLURM took its nodes away, and wait for SLURM to end the step."""
    from multitrain.cluster import requeue, slurm
    from multitrain.cluster.requeue import Action, Ended

    job = slurm.job_id() if slurm.in_step() else None
    if job is None or set(stop.received) == {signal.SIGINT}:
        return Exit.INTERRUPTED
    if rank == 0:
        try:
            ended = Ended(slurm.show_job(job), stop.received, Exit.INTERRUPTED)
            decision = requeue.decide_evaluation(ended, ClusterConfig())
            if decision.action != Action.REQUEUE:
                return Exit.INTERRUPTED
            print(f"{decision.status}: back into the queue", flush=True)
            slurm.requeue(job)
        except slurm.SlurmError as error:
            print(f"multitrain: {error}; submit the same command again", file=sys.stderr, flush=True)
            return Exit.INTERRUPTED
    time.sleep(WAIT_FOR_END)
    return Exit.INTERRUPTED


def _require_same_network(stored: RunConfig, config: RunConfig) -> None:
    if config.model != stored.model:
        changed = [n for n in type(stored.model).model_fields if getattr(stored.model, n) != getattr(config.model, n)]
        raise ConfigError(
            f"model.{changed[0]}: the network is that of the weights and cannot be changed; `multitrain convert` can resize positions"
        )


def _default_out(model: str, split: str) -> Path:
    """``RUN/evaluation/CHECKPOINT/SPLIT`` for weights of the user's own run, else a folder below ``./evaluation``."""
    path = Path(model)
    if path.suffix in (".pyth", ".safetensors") and path.parent.name[:7] != "update-":
        return Path("evaluation") / path.stem / split
    from multitrain.evaluation.output_folders import result_folder
    from multitrain.interop.model_path import resolve_model_file

    checkpoint = resolve_model_file(path).parent
    return result_folder(checkpoint.parent.parent, "evaluation", checkpoint.name, split)


def _name_average(model: str) -> None:
    """Say that the run has averaged weights, which its validations scored and this test did not."""
    from multitrain.interop.model_path import unused_average

    if average := unused_average(model):
        print(
            printable(
                f"note: these are the weights of the last update; the run's validations scored the averaged ones: {average}"
            ),
            file=sys.stderr,
        )


_last_line = 0.0


def _progress(dataset: str, done: int, of: int) -> None:
    """Print rank 0's progress every ten seconds, and at the end."""
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
                printable(
                    f"{name}: {len(lost)} of {result['videos']} videos could not be read "
                    f"(first: {lost[0]['path']}: {lost[0]['reason']}); "
                    f"to try them again, delete {done.folder}/{name}/shards/*.unreadable.jsonl and run the same command"
                ),
                file=sys.stderr,
            )
    print(printable(done.table))
    if done.intervals:
        print("\n".join(printable(line) for line in done.intervals.splitlines()), file=sys.stderr)
    print(f"scores and figures: {done.folder}", file=sys.stderr)
