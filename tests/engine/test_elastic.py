"""Any checkpoint resumes on another number of ranks, workers and in another precision, with every bit of its state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ROOT, settings, start_ranks, train, wait, write_run

from multitrain.engine import checkpoint as ck

DONE = 10
"""Updates before the world changes. The scale halves at each overflow, and processors that multiply in fp16 overflow at 2¹⁹, others at
2²² at the earliest: from 2²⁴, some of ten updates overflow and some are applied on all of them."""


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp32"), ("fp16", "fp16")])
def test_two_ranks_resume_on_one_with_equal_moments_and_loss_scale(
    tiny_data: Path, tmp_path: Path, before: str, after: str
) -> None:
    """fp16 begins with a scale that overflows, so that what is carried over is not what the run began with."""
    common = {"engine__loss_scale_start": 24, "updates": DONE + 2}
    run, _ = write_run(
        tmp_path,
        settings(tiny_data, gpus=2, micro_batch=8, precision=before, data__workers=1, **common | {"updates": DONE}),
    )
    train(run, 2)
    folder = ck.folder_of(run / "checkpoints", DONE)
    written = ck.read(folder)
    write_run(tmp_path, settings(tiny_data, gpus=1, micro_batch=8, precision=after, data__workers=2, **common))
    codes = wait(start_ranks([str(ROOT / "tests/engine/restored.py"), str(run)], 1, log=run / "ranks.log"))
    assert codes == [0], (run / "ranks.log").read_text()[-4000:]
    held = torch.load(run / "restored.pt", weights_only=False)
    assert held["completed"] == DONE
    for ours, theirs in ((held["weights"], written.weights), (held["moments"], written.moments)):
        assert ours.keys() == theirs.keys()
        assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    assert any(t.abs().sum() > 0 for n, t in held["moments"].items() if n.startswith("exp_avg_sq."))
    applied = written.state["steps_applied"]
    assert (held["applied"], held["steps"]) == (applied, {float(applied)})
    if before == "fp16":
        assert 0 < applied < DONE, "the first scale overflows"
        assert (held["scale"].scale, held["scale"].good_updates) == tuple(written.state["loss_scale"].values())
        assert held["scale"].scale < 2.0**24
