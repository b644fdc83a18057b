"""A branch continues another run from one of its checkpoints, with other options, and changes nothing of it. The user's own commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from multitrain.config import load
from multitrain.engine import checkpoint as ck
from tests.engine.test_resume import metrics

Submit = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def submit(runs: Path, tiny_data: Path, root: Path) -> Submit:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"TINY_DATA": str(tiny_data)}

    def run(*words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", "--config-dir", "tests/configs", *words, f"runs={runs}"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def first(runs: Path, submit: Submit) -> Path:
    submit(
        "experiment=tiny",
        "cluster=local",
        "gpus=1",
        "name=first",
        "updates=4",
        "checkpoint.every=2",
        "checkpoint.keep=3",
    )
    return runs / "first"


def content(run: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted((run / "checkpoints").rglob("*")) if p.is_file()}


def test_a_branch_with_nothing_changed_ends_with_the_other_runs_bits_and_leaves_it_alone(
    first: Path, runs: Path, submit: Submit
) -> None:
    before = content(first)
    submit("branch_from=first@2", "name=same")
    same = runs / "same"
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (ck.folder_of(run / "checkpoints", 4) / name for run in (same, first))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [m["loss"] for m in metrics(same)] == [m["loss"] for m in metrics(first)][2:]
    assert content(first) == before
    assert load(same).updates == 4, "the other run's options are the branch's"


def test_a_branch_goes_on_longer_with_another_schedule_and_is_resumed_as_any_run(
    first: Path, runs: Path, submit: Submit
) -> None:
    submit(f"branch_from={first}@4", "name=longer", "updates=5", "optim.schedule=constant")
    submit("longer", "updates=6")
    assert [(m["update"], m["lr"]) for m in metrics(runs / "longer")] == [(4, 1e-3), (5, 1e-3)]
    submissions = yaml.safe_load((runs / "longer" / "overrides.yaml").read_text())
    assert "experiment=tiny" in submissions[0]["overrides"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["branch_from=first@3"], "has no such checkpoint; it has those after updates: 2, 4"),
        (["branch_from=first@best"], "has no such checkpoint"),
        (["branch_from=nobody@3"], "is no run; write branch_from=RUN@UPDATE"),
        (["branch_from=first@2", "seed=5"], "branch_from: run 'first' has seed=0, and 5 was requested; a branch keeps"),
        (["branch_from=first@2", "init_from=x.pyth"], "branch_from and init_from"),
        (["branch_from=first@2", "updates=2"], "the branch would end at updates=2; set updates=N above 2"),
        (["name=first", "updates=3"], "run 'first' has completed 4; for another end of its past start a branch"),
        (["name=first", "branch_from=first@2"], "branch_from: run 'first' exists, and begins with update 0"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_in_one_line(
    first: Path, submit: Submit, runs: Path, words: list[str], said: str
) -> None:
    there = sorted(runs.iterdir())
    done = submit(*words, *([] if "name=first" in words else ["name=none"]), "dry_run=true", expect=2)
    assert said in done.stderr
    assert sorted(runs.iterdir()) == there


def test_a_damaged_checkpoint_is_no_beginning(first: Path, submit: Submit, runs: Path) -> None:
    submit("branch_from=first@2", "name=victim", "updates=3")
    (runs / "victim" / "checkpoints" / "update-00000002" / "state.json").unlink()
    done = submit("branch_from=victim@2", "name=none", expect=2)
    assert "state.json is missing; choose another checkpoint" in done.stderr


def test_the_tests_that_follow_a_run_take_its_best_checkpoint(runs: Path, submit: Submit) -> None:
    words = ("eval.every=1", "checkpoint.best=val/mean/top1", "checkpoint.every=9", "then=eval")
    submit("experiment=tiny", "cluster=local", "gpus=1", "name=tested", "updates=3", *words)
    best = (runs / "tested" / "checkpoints" / "best").read_text().strip()
    assert [p.name for p in (runs / "tested" / "evaluation").iterdir()] == [best]
    submit("branch_from=tested/latest", "name=longer-tested", "updates=4", "then=null")
    longer = runs / "longer-tested" / "checkpoints"
    assert (longer / (longer / "best").read_text().strip() / "manifest.json").is_file(), (
        "the best one came with the branch"
    )


def test_initial_weights_are_those_of_the_submission_though_the_other_run_goes_on(
    first: Path, runs: Path, submit: Submit
) -> None:
    submit("experiment=tiny", "cluster=local", "gpus=1", f"init_from={first}", "name=started", "updates=1")
    assert load(runs / "started").init_from == str(ck.folder_of(first / "checkpoints", 4))
