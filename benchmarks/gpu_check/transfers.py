"""From the loader to the device: what arrives, in which order, and how fast."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.resume import CLIPS
from benchmarks.gpu_check.setting import TINY, Report, Setting
from benchmarks.gpu_check.updates import config_of, made_batch
from multitrain.config import RunConfig, validate
from multitrain.data.catalog import open_catalogs, plan_of
from multitrain.data.demo import CLASSES, generate
from multitrain.data.loader import Batch, TrainLoader
from multitrain.data.mix import finalize_batch
from multitrain.order import solve

VIDEOS = 8
"""Videos of the update that the loader loads."""


def run(setting: Setting, report: Report) -> None:
    """Order and content of the loader's batches, content after transfers from reused memory, and speeds."""
    _loader(setting, report)
    _reused(setting, report)
    _speeds(setting, report)


def _loader(setting: Setting, report: Report) -> None:
    """The same update in one micro-batch by worker processes and in micro-batches of one by none: the same clips, in the plan's order."""
    generate(setting.folder / "data", clips=CLIPS, processes=1)
    whole, order = _loaded(setting, _config(setting, VIDEOS, workers=2))
    single, _ = _loaded(setting, _config(setting, 1, workers=0))
    samples = [sample for batch in whole for sample in batch.tickets.tolist()]
    report.row("videos in the plan's order", len(samples), "videos", samples == order.tolist())
    arrived = whole[0].clips.to(setting.device, non_blocking=True)
    same = torch.equal(arrived.cpu(), torch.cat([b.clips for b in single])) and torch.equal(
        whole[0].keys, torch.cat([b.keys for b in single])
    )
    note = "one micro-batch by two workers against micro-batches of one by none"
    report.row("clips and keys on the device are those of the samples", len(arrived), "clips", same, note)


def _config(setting: Setting, micro_batch: int, workers: int) -> RunConfig:
    data = setting.folder / "data"
    datasets = {
        name: {
            "classes": len(labels),
            "annotations": str(data / name / "annotations"),
            "videos": str(data / name / "videos"),
        }
        for name, labels in CLASSES.items()
    }
    given: dict[str, Any] = {
        "gpus": 1,
        "updates": 1,
        "effective_batch": VIDEOS,
        "micro_batch": micro_batch,
        "cluster": {"kind": "local"},
    }
    given |= {"data": {"datasets": datasets, "workers": workers, "sampling_rate": 1}, "model": TINY.model_dump()}
    given |= {name: {} for name in ("loss", "optim", "engine", "eval")}
    return validate({**given, "augment": {"mix_group": 1, "mix_probability": 0.0}})


def _loaded(setting: Setting, config: RunConfig) -> tuple[list[Batch], np.ndarray]:
    """The micro-batches of the first update, and the plan's samples of it."""
    catalogs = open_catalogs(config.data, "train", setting.folder / "index")
    plan = plan_of(config, catalogs)
    shape = solve(VIDEOS, nodes=1, gpus=1, micro_batch=config.micro_batch, group=config.group)
    with TrainLoader(catalogs, plan, shape, 0, config, 0, 1) as loader:
        return list(loader), plan.samples(0, VIDEOS)


def _reused(setting: Setting, report: Report) -> None:
    """Copies from pinned memory that is given back at once and used again, behind a busy device: each arrives as it was."""
    rounds, size = (6, 1 << 16) if setting.tiny else (24, 32 << 20)
    busy = torch.ones(64 if setting.tiny else 8192, 64 if setting.tiny else 8192, device=setting.device)
    arrived: list[Tensor] = []
    for number in range(rounds):
        source = torch.empty(size, dtype=torch.uint8, pin_memory=setting.cuda).fill_(number)
        busy = (busy @ busy).clamp_(max=1.0)
        arrived.append(source.to(setting.device, non_blocking=True).float())
        del source
    wrong = [n for n, x in enumerate(arrived) if not bool((x == n).all())]
    report.row(
        "transfers from reused memory",
        rounds,
        "transfers",
        not wrong,
        f"wrong: {wrong}" if wrong else "each arrived as it was",
    )


def _speeds(setting: Setting, report: Report) -> None:
    videos, rounds = (2, (1, 0)) if setting.tiny else (8, (7, 2))
    config = config_of(setting, videos, videos, "bf16")
    batch = made_batch(config, 0, setting)
    datasets = {n: d.classes or 1 for n, d in config.data.datasets.items()}
    pageable = batch.clips.clone()
    size, clips, device = batch.clips.numel() / 1e9, len(batch.clips), setting.device
    for name, source in (("pinned", batch.clips), ("pageable", pageable)):
        spent = setting.seconds(partial(source.to, device, non_blocking=True, copy=True), *rounds)
        report.row(f"transfer of {name} clips", clips / spent, "clips/s", note=f"{size / spent:.1f} GB/s, uint8")

    def prepare() -> Any:
        return finalize_batch(batch, config.data, datasets, config.augment, device, config.seed, model=config.model)

    spent = setting.seconds(prepare, *rounds)
    report.row(
        "transfer, normalising, erasing and mixing",
        clips / spent,
        "clips/s",
        note=f"{spent * 1e3 / clips:.2f} ms a clip",
    )
    report.row(
        "cores for the loader",
        len(os.sched_getaffinity(0)),
        note="13.8 clips/s a core were measured on a CPU (docs/performance.md)",
    )
