"""A run reads its own folder: what happens to the checkout that it was submitted from changes nothing. On a real controller."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.slurm.drill import Runs, copied_checkout, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

TRAINING = ("launch/submit.py", "multitrain/train.py", "slurm/train.sh")
IMPORTED = ("launch/__init__.py", "multitrain/__init__.py", "multitrain/cluster/slurm.py")
"""Modules of whatever Python a job starts: submitit's, the batch script's, the ranks'."""


def test_a_requeued_job_of_train_sh_goes_on_though_its_checkout_is_edited_half_edited_moved_and_deleted(
    runs: Runs, reference: Path, tmp_path: Path
) -> None:
    checkout = copied_checkout(tmp_path / "checkout")
    run, job = runs.submit_script("edited", checkout=checkout)
    runs.reach(run, job, 3)
    runs.cluster.preempt(job, ranks(run).values())
    model = checkout / "tests" / "configs" / "model" / "tinier.yaml"
    model.write_text(model.read_text().replace("depth: ", "depth: 1"))
    tiny = checkout / "tests" / "configs" / "experiment" / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("lr: 1.0e-3", "lr: 9.0e-3"))
    typed = [*runs.command("edited", "cluster.partition=low", "nodes=2", "gpus=1"), "dry_run=true"]
    said = runs.start(typed, checkout=checkout).communicate()[0]
    assert "optim.lr is now 0.009 and 0.001 in the run" in said, said
    for file in (*TRAINING, *IMPORTED):
        (checkout / file).write_text("<<<<<<< a merge that is not finished\n")
    runs.cluster.start_now(job)
    runs.reach(run, job, len(runs.metrics(run)) + 1)
    runs.cluster.run("scontrol", "requeue", job)
    runs.back_in_queue(run, job, starts=2)
    shutil.rmtree(checkout)
    shutil.rmtree(runs.runs / ".jobs")  # the job's comment says it as well
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)
    lines = (run / "config.yaml").read_text()
    assert "lr: 0.001" in lines


def test_a_requeued_job_of_submit_imports_nothing_from_the_folder_that_it_was_submitted_in(
    runs: Runs, reference: Path, tmp_path: Path
) -> None:
    checkout = copied_checkout(tmp_path / "checkout")
    run, job = runs.submit("imports", checkout=checkout)
    runs.reach(run, job, 2)
    runs.cluster.preempt(job, ranks(run).values())
    for file in IMPORTED:
        (checkout / file).write_text("<<<<<<< a merge that is not finished\n")
    runs.cluster.start_now(job)
    runs.finish(run, job)
    runs.assert_same(run, reference)
