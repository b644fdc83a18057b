"""An interruption leaves no trace: real processes, real signals, weights compared bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings, start_ranks, train, wait, write_run

from multitrain.config import load
from multitrain.engine import checkpoint as ck

UPDATES = 6


def final(run: Path) -> ck.Checkpoint:
    """The checkpoint after the last update."""
    return ck.read(ck.folder_of(run / "checkpoints", load(run).updates or 0))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == name]


def assert_same_bits(run: Path, reference: Path) -> None:
    ours, theirs = final(run), final(reference)
    for name, tensor in {**theirs.weights, **theirs.moments}.items():
        assert torch.equal({**ours.weights, **ours.moments}[name], tensor), f"{name} differs"
    a, b = metrics(run), metrics(reference)
    assert [r["update"] for r in a] == list(range(len(b)))
    for key in ("loss", "grad_norm", "tickets", "lr", "loss_informative"):
        assert [r[key] for r in a] == [r[key] for r in b], key


def interrupt(
    run: Path, ranks: int, number: int, after: int, *, only: int | None = None, checkpoint: bool = False
) -> list[int]:
    """Start `ranks` processes, send signal `number` to them (or to rank `only`) once update `after` is recorded.

    With `checkpoint`, not before there is one: it is written beside the training, and may come a few updates later.
    """
    processes = start_ranks(["-m", "multitrain.train", str(run)], ranks, log=run / "ranks.log")
    deadline = time.monotonic() + 600
    while (
        not (run / "metrics.jsonl").exists()
        or len(metrics(run)) < after
        or (checkpoint and not ck.listed(run / "checkpoints"))
    ):
        assert time.monotonic() < deadline, (run / "ranks.log").read_text()[-4000:]
        assert all(p.poll() is None for p in processes), (run / "ranks.log").read_text()[-4000:]
        time.sleep(0.005)
    for rank, process in enumerate(processes):
        if only is None or rank == only:
            os.kill(process.pid, number)
    return wait(processes)


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def reference(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of two ranks."""
    if request.param == "fp32":
        found: Path = request.getfixturevalue("fp32_reference")
        return found
    return _uninterrupted(tiny_data, tmp_path_factory.mktemp(f"reference-{request.param}"), request.param)


@pytest.fixture(scope="module")
def fp32_reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _uninterrupted(tiny_data, tmp_path_factory.mktemp("reference"), "fp32")


def _uninterrupted(data: Path, runs: Path, precision: str) -> Path:
    run, _ = write_run(
        runs, settings(data, gpus=2, updates=UPDATES, precision=precision, data__workers=1, engine__loss_scale_start=12)
    )
    train(run, 2)
    return run


def again(reference: Path, runs: Path, **changes: Any) -> Path:
    """A run of the same configuration, with `changes` to what may change, in a folder of its own."""
    mapping = load(reference).model_dump(mode="json")
    mapping |= changes
    run, _ = write_run(runs, mapping)
    return run


def assert_a_signal_changes_nothing(reference: Path, runs: Path, number: int) -> None:
    run = again(reference, runs)
    assert interrupt(run, 2, number, after=2) == [75, 75]
    stopped = ck.newest_verified(run / "checkpoints")[0]
    assert stopped is not None
    assert ck.read(stopped).update >= 2
    assert events(run, "signal")
    train(run, 2)
    assert_same_bits(run, reference)


def test_a_signalled_run_ends_with_the_uninterrupted_runs_bits(reference: Path, tmp_path: Path) -> None:
    assert_a_signal_changes_nothing(reference, tmp_path, signal.SIGTERM)


def test_a_run_warned_of_its_time_limit_ends_with_the_uninterrupted_runs_bits(
    fp32_reference: Path, tmp_path: Path
) -> None:
    assert_a_signal_changes_nothing(fp32_reference, tmp_path, signal.SIGUSR2)


def test_a_signal_to_one_rank_stops_all_at_the_same_update(fp32_reference: Path, tmp_path: Path) -> None:
    run = again(fp32_reference, tmp_path)
    assert interrupt(run, 2, signal.SIGUSR1, after=1, only=1) == [75, 75]
    train(run, 2)
    assert_same_bits(run, fp32_reference)


def test_a_killed_run_ends_with_the_uninterrupted_runs_bits(reference: Path, tmp_path: Path) -> None:
    """SIGKILL loses the updates since the last periodic checkpoint, and they are done again exactly."""
    mapping = load(reference).model_dump(mode="json")
    run = again(reference, tmp_path, checkpoint=mapping["checkpoint"] | {"every": 2})
    assert interrupt(run, 2, signal.SIGKILL, after=3, checkpoint=True) == [-9, -9]
    assert ck.read(ck.newest_verified(run / "checkpoints")[0] or run).update in (2, 4)
    train(run, 2)
    assert_same_bits(run, reference)


def test_the_death_of_one_rank_ends_the_others(fp32_reference: Path, tmp_path: Path) -> None:
    run = again(fp32_reference, tmp_path)
    codes = interrupt(run, 2, signal.SIGKILL, after=1, only=1)
    assert codes[1] == -9
    assert codes[0] == 1


def test_interrupted_before_the_first_update(fp32_reference: Path, tmp_path: Path) -> None:
    run = again(fp32_reference, tmp_path)
    processes = start_ranks(["-m", "multitrain.train", str(run)], 2, log=run / "ranks.log", anew=True)
    time.sleep(1.0)
    for p in processes:
        os.kill(p.pid, signal.SIGTERM)
    assert wait(processes) == [75, 75], (run / "ranks.log").read_text()
    train(run, 2)
    assert_same_bits(run, fp32_reference)


def test_another_world_size_continues_with_the_same_videos(fp32_reference: Path, tmp_path: Path) -> None:
    """2 ranks → 4 → 1: the same tickets in every update, the same losses up to summation order."""
    run = again(fp32_reference, tmp_path)
    assert interrupt(run, 2, signal.SIGTERM, after=1) == [75, 75]
    again(fp32_reference, tmp_path, gpus=4)
    assert interrupt(run, 4, signal.SIGTERM, after=len(metrics(run)) + 1) == [75] * 4
    again(fp32_reference, tmp_path, gpus=1, micro_batch=4)
    train(run, 1)
    ours, theirs = metrics(run), metrics(fp32_reference)
    assert [r["tickets"] for r in ours] == [r["tickets"] for r in theirs]
    assert {r["world_size"] for r in ours} == {1, 2, 4}
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    for name, tensor in final(fp32_reference).weights.items():
        if not name.endswith("norm_k.bias"):
            assert torch.allclose(final(run).weights[name], tensor, atol=2e-3), name


def test_a_truncated_checkpoint_is_passed_over_and_said_so(fp32_reference: Path, tmp_path: Path) -> None:
    mapping = load(fp32_reference).model_dump(mode="json")
    run = again(fp32_reference, tmp_path, checkpoint=mapping["checkpoint"] | {"every": 2})
    assert interrupt(run, 2, signal.SIGTERM, after=3) == [75, 75]
    newest = ck.listed(run / "checkpoints")[0]
    os.truncate(newest / "model.safetensors", 1000)
    program = str(Path(__file__).with_name("phases.py"))  # rank 1 sees no checkpoint at all, as a client of NFS may
    codes = wait(start_ranks([program, str(run), "stale"], 2, log=run / "ranks.log"))
    assert codes == [0, 0], (run / "ranks.log").read_text()[-4000:]
    assert_same_bits(run, fp32_reference)
    assert events(run, "checkpoint_refused")[0]["checkpoint"] == newest.name
    assert "falling back" in (run / "ranks.log").read_text()


def test_another_plan_is_refused_in_one_line(fp32_reference: Path, tmp_path: Path) -> None:
    run = again(fp32_reference, tmp_path)
    assert interrupt(run, 2, signal.SIGTERM, after=1) == [75, 75]
    again(fp32_reference, tmp_path, seed=7)
    train(run, 2, expect=3)
    assert "belongs to another plan" in (run / "ranks.log").read_text()


def test_files_stop_and_save_do_what_they_say(fp32_reference: Path, tmp_path: Path) -> None:
    run = again(fp32_reference, tmp_path, updates=400)
    processes = start_ranks(["-m", "multitrain.train", str(run)], 2, log=run / "ranks.log")
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        assert all(p.poll() is None for p in processes), (run / "ranks.log").read_text()
        time.sleep(0.02)
    (run / "SAVE").touch()
    deadline = time.monotonic() + 600
    while not (run / "checkpoints" / "latest").exists() or (run / "SAVE").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(p.poll() is None for p in processes)
    (run / "STOP").touch()
    assert wait(processes) == [75, 75]
    assert not (run / "STOP").exists()
    assert events(run, "end")[-1]["status"] == "stopped on request"


def test_a_trace_on_request_names_the_phases_of_three_updates_and_changes_no_bit(
    fp32_reference: Path, tmp_path: Path
) -> None:
    run = again(fp32_reference, tmp_path)
    (run / "PROFILE").touch()
    train(run, 2)
    assert_same_bits(run, fp32_reference)
    assert not (run / "PROFILE").exists()
    (trace,) = (run / "profile").glob("update-*.json.gz")
    spans = [
        e for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if e.get("cat") == "user_annotation"
    ]
    phases = {"data", "forward", "loss", "backward", "optimizer", "metrics"}
    updates = [e for e in spans if str(e["name"]).startswith("update ")]
    assert len(updates) == 3
    for update in updates:
        begin, end = update["ts"], update["ts"] + update["dur"]
        inside = [e for e in spans if e["name"] in phases and begin <= e["ts"] <= end]
        assert {e["name"] for e in inside} == phases
        assert sum(e["dur"] for e in inside) >= 0.9 * update["dur"], (
            "tiny updates: the rest is what lies between phases"
        )
    assert "trace of updates" in (run / "ranks.log").read_text()
    assert "aten::" in trace.with_name(trace.name.replace(".json.gz", ".txt")).read_text()
