"""The same bits twice, and in all modes of activation checkpointing; every operation with deterministic=true, and its price."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.network import step
from benchmarks.gpu_check.setting import Report, Setting
from benchmarks.gpu_check.updates import case_of, network, updates

MODES = ("none", "mlp", "selective", "full")


def run(setting: Setting, report: Report) -> None:
    """A whole update with deterministic kernels and its price, modes and repetition with them, repetition without."""
    _price(setting, report)
    for precision in ("bf16", "fp32") if setting.cuda else ("fp32", "bf16"):
        with deterministic(True, warn_only=True):  # the row above says which operation has no such kernel
            _modes(setting, report, precision)
    if setting.cuda:
        with deterministic(False):
            a, b = (_gradient(setting, "none", "bf16") for _ in range(2))
        note = "a figure, not a check: only deterministic=true promises it"
        report.row("bf16 same bits twice, default kernels", "no" if _different(a, b) else "yes", note=note)


class deterministic:
    """Use deterministic kernels meanwhile, or the default ones, as the run's option does."""

    def __init__(self, on: bool, warn_only: bool = False) -> None:
        self._on, self._warn_only = on, warn_only

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        torch.use_deterministic_algorithms(self._on, warn_only=self._warn_only)
        torch.backends.cudnn.benchmark = False

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._before[0])
        torch.backends.cudnn.benchmark = self._before[1]


def _gradient(setting: Setting, mode: str, precision: str) -> dict[str, Tensor]:
    """Outputs and gradients of one step."""
    case = case_of(setting)
    return step(network(case, mode).to(setting.device), case, precision, setting.device).values  # type: ignore[arg-type]


def _different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]


def _modes(setting: Setting, report: Report, precision: str) -> None:
    first = _gradient(setting, "none", precision)
    for mode in MODES:
        apart = _different(first, _gradient(setting, mode, precision))
        name = "same bits twice" if mode == "none" else f"checkpointing {mode}, same bits as none"
        note = f"differ: {', '.join(sorted(apart)[:5])} and {max(0, len(apart) - 5)} more" if apart else ""
        report.row(f"{precision} {name}", len(apart), "tensors differ", not apart, note)


def _price(setting: Setting, report: Report) -> None:
    """A whole update with deterministic kernels only: torch raises where an operation has none."""
    videos = 2 if setting.tiny else 4
    found = {}
    made = updates(setting, videos, videos, "bf16", deepspeed=not setting.tiny)
    for on in (True, False):
        with deterministic(on):
            try:
                found[on] = setting.seconds(made.update, *((1, 0) if setting.tiny else (5, 2)))
            except RuntimeError as error:
                if "determinis" not in str(error):
                    raise
                report.row("every operation has a deterministic kernel", str(error)[:300], ok=False)
                return
    report.row(
        "every operation has a deterministic kernel",
        ok=True,
        note="of a whole update, the step of the weights included",
    )
    note = f"bf16, {2 * videos} clips: {found[True] * 1e3:.1f} against {found[False] * 1e3:.1f} ms an update"
    report.row("price of deterministic=true", found[True] / found[False], "times", note=note)
