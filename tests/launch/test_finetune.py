"""``experiment=finetune`` at submission: what was chosen is said and frozen, and what this machine lacks is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_folder, submit
from launch.run_folder import Run, compose_run
from multitrain.config import load, machine
from tests.config.test_automatic import datasets, on


def composed(folder: Path, *words: str) -> Run:
    words = (*words, "experiment=finetune", "data=mine", "name=a", f"runs={folder}/runs")
    return compose_run(list(words), config_dirs=[str(folder)])


def test_a_run_keeps_what_was_chosen_and_a_typed_option_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, cores=2, gpus=0, slurm=False)
    run = composed(datasets(tmp_path, mine=48))
    run_folder.write(run)
    assert "auto" not in (run.path / "config.yaml").read_text()
    written = load(run.path)
    on(monkeypatch, cores=64, gpus=8, slurm=True)
    datasets(tmp_path, mine=30_000)
    again = composed(tmp_path)
    assert again.config == written
    assert again.chosen == [], "nothing was chosen anew"
    longer = composed(tmp_path, "epochs=300")
    assert longer.config == written.model_copy(update={"epochs": 300.0})
    (tmp_path / "mine/train.csv").unlink()
    assert composed(tmp_path, "epochs=300").config == longer.config, "resuming reads no videos"


@pytest.mark.parametrize("way", ["dry run", "submission"])
def test_what_was_chosen_and_what_is_missing_here_is_said(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, cores=2, gpus=0, slurm=False)
    monkeypatch.setattr(submit.checks, "refuse_unstartable", lambda *_, **__: None)
    monkeypatch.setattr("launch.local.run", lambda *_: 0)
    folder = datasets(tmp_path, mine=48)
    words = [
        "experiment=finetune",
        "data=mine",
        "name=a",
        f"runs={tmp_path}/runs",
        "gpus=2",
        "data.workers=8",
        "then=null",
    ]
    words += ["dry_run=true"] if way == "dry run" else []
    assert submit.main(["--config-dir", str(folder), *words]) == 0
    said = [" ".join(line.removeprefix("# ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "auto precision=fp32: no GPU, and bf16 is slow on most CPUs" in said
    assert "note: no GPU on this machine: 2 ranks train on its 2 cores" in said
    assert any(
        s.startswith("warning: 2 ranks × data.workers=8 = 16 loader processes on 2 cores; use data.workers=1")
        for s in said
    )
    if way == "submission":
        assert said[-1].endswith(f" report {tmp_path}/runs/a")


def test_a_cpu_is_not_counted_as_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.memory_estimate import CUDA_CONTEXT_BYTES, forecast

    on(monkeypatch, cores=2, gpus=0, slurm=False)
    run = composed(datasets(tmp_path, mine=48))
    assert forecast(run.config, run.shape).fixed_bytes < CUDA_CONTEXT_BYTES
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    assert forecast(run.config, run.shape).fixed_bytes > CUDA_CONTEXT_BYTES
