"""2 + 2 updates = 4, by real runs: submitted as a user does, with DeepSpeed, in each precision; the second half in new processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu_check.setting import Report, Setting
from multitrain.data.demo import generate
from multitrain.engine import checkpoint

ROOT = Path(__file__).resolve().parents[2]
UPDATES, HALF = 4, 2
CLIPS = {d: {"train": 12, "val": 2, "test": 2} for d in ("shapes", "motions", "scenes")}
OPTIONS = (
    f"cluster=local experiment=demo gpus=1 micro_batch=8 updates={UPDATES} checkpoint.every={HALF} checkpoint.keep=3 eval.every=null "
    "monitor.tensorboard=false deterministic=true loss.informative_weight=0.1 model.drop_path=0.2 model.head_dropout=0.5 "
    "engine.loss_scale_start=8"
)
"""The demo's network with all terms of the loss and all masks, two micro-batches an update; a loss scale that does not overflow."""
TEXT = ("update", "loss", "loss_informative", "grad_norm", "lr", "tickets")
"""What two lines of metrics.jsonl for the same update must agree in."""


def run(setting: Setting, report: Report) -> None:
    """A run of four updates a precision; its second half is made once more from the checkpoint of the first."""
    data = setting.folder / "data"
    generate(data, clips=CLIPS, processes=1)
    precisions = ["fp32"] if setting.tiny else ["bf16", "fp32", "fp16"]
    with ThreadPoolExecutor(len(precisions)) as pool:  # each waits for the ranks that it started
        for found in pool.map(lambda p: _run(setting, data, p), precisions):
            for row in found.rows:
                report.row(**row)


def _run(setting: Setting, data: Path, precision: str) -> Report:
    """The rows of one precision."""
    report, runs = Report(), setting.folder / "runs"
    folder = runs / precision
    words = [*OPTIONS.split(), f"data.workers={2 if setting.cuda else 0}", f"precision={precision}"]
    if not _submitted(
        report, f"{precision} four updates", [*words, f"name={precision}", f"runs={runs}", f"data.root={data}"]
    ):
        return report
    used = {str(line["device"]) for line in _metrics(folder)}
    report.row(
        f"{precision} device",
        ", ".join(sorted(used)),
        ok=("cpu" not in used) == setting.cuda,
        note="as metrics.jsonl names it",
    )
    whole = setting.folder / f"{precision} whole"
    _take_away(folder, whole)
    if not _submitted(report, f"{precision} two updates once more, from the checkpoint", [str(folder)]):
        return report
    _compare(report, precision, whole, folder)
    return report


def _submitted(report: Report, name: str, words: list[str]) -> bool:
    """Whether ``launch/submit.py WORDS`` trained to the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    script = "from benchmarks.gpu_check.resume import submit; submit()"
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if ended.returncode:
        said = " / ".join((ended.stdout + ended.stderr).strip().splitlines()[-4:])
        report.row(name, f"exit status {ended.returncode}", ok=False, note=said[-500:])
    return not ended.returncode


def submit() -> None:
    """Submit with the words of the command line."""
    from launch.submit import main

    sys.exit(main(sys.argv[1:]))


def _take_away(run: Path, to: Path) -> None:
    """Move the last checkpoint and the lines of the second half to `to`, as if the run had been killed after its first half."""
    to.mkdir()
    last = checkpoint.folder_of(run / "checkpoints", UPDATES)
    shutil.move(last, to / last.name)
    shutil.copy(run / "metrics.jsonl", to / "metrics.jsonl")
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["update"] < HALF]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def _metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _compare(report: Report, precision: str, whole: Path, run: Path) -> None:
    name = checkpoint.folder_of(run / "checkpoints", UPDATES).name
    first, second = (checkpoint.read(folder / name) for folder in (whole, run / "checkpoints"))
    begun = checkpoint.read(checkpoint.folder_of(run / "checkpoints", HALF))
    for kind, ours, theirs in (("weights", second.weights, first.weights), ("moments", second.moments, first.moments)):
        apart = [n for n in theirs if n not in ours or not torch.equal(ours[n], theirs[n])]
        report.row(
            f"{precision} 2 + 2 = 4, {kind}",
            len(apart),
            "tensors differ",
            not apart,
            f"of {len(theirs)}; {', '.join(apart[:3])}",
        )
    moved = sum(not torch.equal(begun.weights[n], t) for n, t in second.weights.items())
    report.row(f"{precision} weights that the second half changed", moved, ok=moved > len(second.weights) // 2)
    lines = [[tuple(m[k] for k in TEXT) for m in _metrics(f)] for f in (whole, run)]
    report.row(f"{precision} losses, norms and videos of each update", len(lines[1]), "updates", lines[0] == lines[1])
