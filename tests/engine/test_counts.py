"""What an update asks of the network and of the device, counted: a collective or a synchronisation more is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT, settings, start_ranks, wait, write_run


def counts(data: Path, runs: Path, accumulation: int) -> dict[str, int]:
    """Calls in the third update of two real ranks, by operation."""
    mapping = settings(data, name=f"a{accumulation}", gpus=2, effective_batch=8, micro_batch=4 // accumulation)
    run, _ = write_run(runs, mapping)
    log = run / "log.txt"
    codes = wait(start_ranks([str(ROOT / "tests/engine/counted_updates.py"), str(run)], 2, log=log))
    assert codes == [0, 0], log.read_text()[-5000:]
    found: dict[str, int] = json.loads((run / "counts.json").read_text())
    return found


EXPECTED = {
    1: {"c10d::allreduce_": 5, "c10d::allgather_": 1, "c10d::_allgather_base_": 2, "aten::_local_scalar_dense": 19},
    2: {"c10d::allreduce_": 6, "c10d::allgather_": 1, "c10d::_allgather_base_": 2, "aten::_local_scalar_dense": 29},
}
"""By accumulation, with DeepSpeed 0.19.8. All-reduces: one agreement on stopping a micro-batch; the gradient, its norm and its
overflow flag, by ZeRO; the figures for the log. Gathers: the embeddings, and the stepped weights by group. Numbers read: of
tensors on the CPU (agreements, figures), and by ZeRO and for the log after the step; on a GPU nothing waits before it."""


@pytest.mark.parametrize("accumulation", EXPECTED)
def test_an_update_calls_these_collectives_and_reads_these_numbers_and_no_more(
    tiny_data: Path, tmp_path: Path, accumulation: int
) -> None:
    found = counts(tiny_data, tmp_path, accumulation)
    imported = [name for name in ("torch._dynamo", "torch._inductor", "sympy") if found.pop(name)]
    assert imported == [], "ranks import a compiler that nothing here calls: multitrain/engine/without_compiler.py"
    more = {name: count for name, count in found.items() if count > EXPECTED[accumulation].get(name, 0)}
    assert more == {}, f"more than expected: {more}; if that is worth it, write down the new count and why"
