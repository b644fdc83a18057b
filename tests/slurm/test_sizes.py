"""A run changes its size on a real controller: `launch/submit.py NAME nodes=…` goes on where it was, with the same videos."""

from __future__ import annotations

import pytest

from multitrain.engine import checkpoint as ck
from tests.slurm.drill import Runs, frozen, ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

CLOSE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}
"""Largest relative difference of an update's loss from that of the run that keeps its two nodes and fp32."""
SHORT = "updates=12"
"""Rounding in another precision adds up in the weights, and the loss scale grows in a longer run."""
ONE, TWO = ("nodes=1", "gpus=1"), ("nodes=2", "gpus=1")


@pytest.mark.parametrize(
    "starts",
    [
        [
            (*ONE, "precision=fp16"),
            (*TWO, "precision=bf16", "micro_batch=4", "data.workers=2"),
            (*ONE, "precision=fp16"),
        ],
        pytest.param(
            [
                (*TWO, "precision=fp32"),
                (*ONE, "precision=bf16", "micro_batch=8"),
                (*TWO, "precision=fp32", "micro_batch=1"),
                ("nodes=2", "gpus=2", "precision=fp16", "data.workers=2"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["1-2-1", "2-1-2-4"],
)
def test_a_run_goes_on_with_other_nodes_precisions_and_micro_batches(runs: Runs, starts: list[tuple[str, ...]]) -> None:
    reference, job = runs.submit("still", SHORT)
    runs.finish(reference, job)
    ends: list[int] = []
    scales = []
    for number, options in enumerate(starts):
        run, job = runs.submit("moving", SHORT, "checkpoint.every=100", *options)
        refused = runs.ask("moving", *ONE)
        assert refused.returncode == 2, "a second job would write to the run"
        assert f"job {job}" in refused.stderr
        if number == len(starts) - 1:
            runs.finish(run, job)
        else:
            runs.reach(run, job, len(runs.metrics(run)) + 2)
            with frozen(ranks(run).values()):
                runs.cluster.run("scancel", job)
            runs.cluster.wait(job, "CANCELLED")
        state = ck.read(ck.listed(run / "checkpoints")[0]).state
        assert state["update"] == len(runs.metrics(run)), "work was lost"
        ends.append(state["update"])
        scales.append(state["loss_scale"])
    ours, theirs = runs.metrics(run), runs.metrics(reference)
    assert [(m["update"], m["tickets"]) for m in ours] == [(m["update"], m["tickets"]) for m in theirs]
    for a, b in zip(ours, theirs):
        options = starts[next(i for i, end in enumerate(ends) if a["update"] < end)]
        precision = next(o for o in options if o.startswith("precision=")).partition("=")[2]
        assert a["loss"] == pytest.approx(b["loss"], rel=CLOSE[precision]), f"update {a['update']} in {precision}"
    assert len({m["world_size"] for m in ours}) == len({options[:2] for options in starts})
    if starts[0][-1] == "precision=fp16" == starts[2][-1]:
        assert scales[1]["good_updates"] == scales[0]["good_updates"], "bf16 does not keep the loss scale of fp16"
        assert scales[2]["good_updates"] == scales[1]["good_updates"] + ends[2] - ends[1]
