"""The informative loss over an update of several micro-batches: its gradient is that of plain autograd, and what the first pass costs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.network import NO_GRADIENT
from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.gpu_check.updates import updates

LIMIT = {"fp32": 1e-3, "bf16": 0.1}
"""Relative L2 distance of the whole gradient. fp32: sums in another order (1e-6), after which max pools of nearly equal values choose
others (1e-4, as against the stored values). bf16: roundings of 8 bits in other products."""


def run(setting: Setting, report: Report) -> None:
    """Exactness in fp32 and bf16, then the time of an update with one and with two micro-batches."""
    videos = 4
    for precision in ("fp32", "bf16"):
        for passes, name in ((1, "one pass"), (2, "two passes")):
            made = updates(setting, videos, videos // passes, precision, deepspeed=False)
            losses = made.accumulate()
            ours = made.take_gradients()
            total, theirs = float(made.direct()), made.take_gradients()
            weights = torch.tensor([1.0, 1.0, made.config.loss.informative_weight], device=setting.device)
            limit, error = LIMIT[precision], abs(float((losses.terms * weights).sum()) / passes / total - 1)
            report.below(f"{precision} loss of {name}", error, limit, note="against plain autograd over all clips")
            report.below(f"{precision} gradient of {name}", _distance(ours, theirs), limit, note="likewise")
    _times(setting, report)


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """‖ours − theirs‖ ÷ ‖theirs‖ over all gradients that are not truly zero."""
    names = [n for n in theirs if not n.endswith(NO_GRADIENT)]
    if ours.keys() != theirs.keys():
        return float("inf")
    square = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in names)
    return float((square / sum(float(theirs[n].double().square().sum()) for n in names)) ** 0.5)


def _times(setting: Setting, report: Report) -> None:
    videos, rounds = (4, (1, 0)) if setting.tiny else (16, (5, 2))
    found = {}
    for passes in (1, 2):
        made = updates(setting, videos, videos // passes, "bf16", deepspeed=False)
        found[passes] = setting.seconds(made.accumulate, *rounds)
    note = f"bf16, {2 * videos} clips: {found[2] * 1e3:.1f} against {found[1] * 1e3:.1f} ms for the gradient; predicted 1.25 to 1.28"
    report.row("two passes ÷ one pass", found[2] / found[1], "times", note=note)
