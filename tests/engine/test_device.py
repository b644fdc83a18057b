"""Which device a rank takes, and what it says when a GPU would stay unused. There is no GPU here: torch's answers are replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multitrain.config import ConfigError
from multitrain.config import machine as gpus
from multitrain.engine.device import GRANTS, granted, rank_device


@pytest.fixture(autouse=True)
def no_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GRANTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "DEVICE_FILES", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    for name, answer in {
        "is_available": True,
        "device_count": count,
        "get_device_capability": capability,
        "get_device_name": "Tesla V100" if capability < (8, 0) else "NVIDIA H100",
        "set_device": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("environment", "grant"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0"),
        ({"SLURM_JOB_GPUS": "3"}, "SLURM_JOB_GPUS=3"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "3"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({}, None),
    ],
)
def test_what_grants_a_gpu(environment: dict[str, str], grant: str | None) -> None:
    assert granted(environment) == grant


def test_a_driver_on_the_machine_counts_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "DEVICE_FILES", (str(tmp_path),))
    assert granted({}) == str(tmp_path)
    assert granted({"CUDA_VISIBLE_DEVICES": ""}) is None


@pytest.mark.parametrize("rank", [0, 5])
def test_a_gpu_that_torch_cannot_use_is_refused_on_every_rank_in_one_line(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    with pytest.raises(ConfigError) as refused:
        rank_device(rank, 0)
    said = str(refused.value)
    assert said.startswith(
        f"rank {rank} was granted a GPU (CUDA_VISIBLE_DEVICES=0), and torch 2.13.0+cu130, built for CUDA 13.0,"
    )
    assert "driver none" in said
    assert said.endswith("or compute on the CPU with CUDA_VISIBLE_DEVICES=")
    assert "\n" not in said


def test_a_build_without_cuda_on_a_machine_with_a_driver_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpus, "DEVICE_FILES", (str(tmp_path),))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="is built without CUDA; install a build for the node's driver"):
        rank_device(1, 0)


def test_a_build_without_cuda_where_only_the_scheduler_speaks_of_gpus_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [rank_device(rank, rank).type for rank in range(2)] == ["cpu", "cpu"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: rank 0 was granted a GPU (CUDA_VISIBLE_DEVICES=0), and torch")


def test_who_wants_the_cpu_gets_it_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert rank_device(0, 0) == torch.device("cpu")
    assert capsys.readouterr() == ("", "")


def test_fewer_gpus_than_ranks_and_arithmetic_that_a_gpu_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert rank_device(1, 1, "bf16") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="rank 2 is number 2 on its node, which shows 2 GPUs"):
        rank_device(2, 2)
    with_gpus(monkeypatch, 2, (7, 0))
    with pytest.raises(ConfigError, match=r"Tesla V100 does not compute in bf16 .* use precision=fp16"):
        rank_device(0, 0, "bf16")
    assert rank_device(0, 0, "fp16").type == "cuda"


def test_the_bandwidth_of_preflight_names_its_backend_and_the_unused_gpu(root: Path) -> None:
    command = [sys.executable, "-m", "multitrain.engine.bandwidth", "0", "1", "0", "127.0.0.1", "0", "60"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert '"device": "cpu", "backend": "gloo"' in done.stdout, done
