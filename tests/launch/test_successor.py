"""Runs with `cluster.requeue=resubmit`: one successor a job, and an end to those that never begin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launch import requeue as batch
from multitrain.cluster import requeue, restarts
from multitrain.cluster.requeue import Action, Ended
from multitrain.cluster.restarts import Start
from multitrain.cluster.slurm import show_job
from multitrain.config import ClusterConfig
from multitrain.lease import acquire
from multitrain.records.events import Events

CLUSTER = ClusterConfig(requeue="resubmit")


def _event(name: str, job: int, **facts: Any) -> dict[str, Any]:
    return {"event": name, "job": str(job), "restart": 0, "host": "n", "pid": job, **facts}


def test_successors_that_die_before_they_begin_are_counted() -> None:
    told = [_event("submit", 1), _event("begin", 1), _event("checkpoint", 1, update=10)]
    told.append(_event("requeue", 1, status="time limit", by="successor job 2"))
    for job in range(2, 20):
        history = restarts.starts(told)
        if not history[-1].is_of(str(job), 0):
            history.append(Start(job=str(job)))
        decision = requeue.decide(Ended({"JobState": "RUNNING"}, (), 1, 0), history, CLUSTER, went_well=True)
        if decision.action != Action.REQUEUE:
            break
        told += [_event("ended", job, status=decision.status), _event("requeue", job, status=decision.status)]
    assert (decision.status, job) == (requeue.GAVE_UP, 5)


def test_the_batch_script_submits_no_second_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(batch, "load", lambda run: type("Saved", (), {"cluster": CLUSTER}))
    submitted: list[str] = []
    monkeypatch.setattr(requeue, "requeue_job", lambda *a, **k: submitted.append("one") or "successor job 3")
    monkeypatch.setattr(batch.shutil, "which", lambda name: sys.executable)
    with acquire(tmp_path, job="1"):
        events = Events(tmp_path / "events.jsonl")
        events.write("begin", in_place=0)
        ended = Ended({"JobState": "RUNNING"}, (), 75, 0)
        events.write("requeue", status="time limit", by="successor job 2")
        batch._training(tmp_path, "1", ended, early=False)
        assert submitted == []
        events.write("begin", in_place=1)
        events.write("requeue_failed", status="time limit")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    batch._training(tmp_path, "2", Ended({"JobState": "RUNNING"}, (), 137, 0), early=False)
    assert submitted == ["one"], "another job still does"


def test_the_time_of_scontrol_can_be_read_whatever_the_site_prefers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "JobId=1 EndTime=${SLURM_TIME_FORMAT:-unset}"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert show_job("1")["EndTime"] == "standard"
