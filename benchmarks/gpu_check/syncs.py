"""How often the host waits for the device in an update."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.counting import as_on_cuda
from benchmarks.gpu_check.network import CASES
from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.gpu_check.updates import updates
from multitrain.config import LossConfig
from multitrain.loss import MultiDatasetLoss, embedding_gradient
from multitrain.model import MultiTrain


def run(setting: Setting, report: Report) -> None:
    """On a GPU, torch's own warnings, counted and named by line; everywhere, the network and the loss on tensors without data."""
    _without_data(report)
    if not setting.cuda:
        report.row(
            "synchronisations of an update", "needs a GPU", note="copies and DeepSpeed's reads are seen there only"
        )
        return
    videos = 2 if setting.tiny else 4
    first = updates(setting, videos, videos, "bf16")
    for accumulation in (1, 2):
        made = first.resized(videos * accumulation, videos)
        made.update()
        gradient, step = _counted(setting, made.accumulate), _counted(setting, lambda: first.engine.update(1e-4))
        total = f"{accumulation} micro-batch{'es' * (accumulation > 1)}"
        report.row(
            f"gradient, {total}", sum(gradient.values()), "waits", not gradient, _lines(gradient) or "none is the aim"
        )
        report.row(f"DeepSpeed's step, {total}", sum(step.values()), "waits", note=_lines(step))


def _counted(setting: Setting, action: Any) -> Counter[str]:
    """Waits of the host during `action`, by file and line."""
    setting.synchronise()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "called a synchronizing CUDA operation" in str(w.message)]
    return Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in waits)


def _lines(found: Counter[str]) -> str:
    return ", ".join(f"{place} ×{count}" for place, count in found.most_common(10))


def _without_data(report: Report) -> None:
    """The network, the loss and both backward passes on fake tensors: whatever asks for a number on the host raises."""
    case = CASES["tiny"]
    try:
        with FakeTensorMode(), as_on_cuda():
            model = MultiTrain(case.config, case.datasets).train()
            _step(model, case.clips, case.config.frames, case.config.crop)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        report.row("network and loss read no number from the device", f"reads one: {error}", ok=False)
        return
    report.row("network and loss read no number from the device", ok=True, note="run on tensors that have no data")


def _step(model: MultiTrain, clips: int, frames: int, crop: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.outputs(torch.empty(clips, 3, frames, crop, crop), torch.empty(clips, dtype=torch.int64))
    targets = {d: torch.empty(clips, k) for d, k in model.datasets.items()}
    assert isinstance(out.expanded, Tensor)
    surrogate = embedding_gradient(out.expanded)
    ids = torch.empty(clips, dtype=torch.int64)
    for given in (None, surrogate):
        MultiDatasetLoss(model.datasets, LossConfig())(out, targets, ids, given).total.backward(retain_graph=True)
