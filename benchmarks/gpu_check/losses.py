"""Losses, outputs and gradients of the whole model against the stored values, in every precision."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.gpu_check import stored
from benchmarks.gpu_check.network import CASES, Case, network, step
from benchmarks.gpu_check.setting import PRECISIONS, Report, Setting


class Tolerance(NamedTuple):
    """Largest relative errors."""

    term: float
    output: float
    gradient: float
    whole: float
    """Of the whole gradient, in L2."""


TOLERANCES = {
    "fp64": Tolerance(1e-6, 1e-6, 2e-6, 1e-6),
    "fp32": Tolerance(2e-5, 5e-5, 5e-4, 1e-4),
    "tf32": Tolerance(2e-3, 2e-2, 0.4, 0.2),
    "bf16": Tolerance(1e-2, 8e-2, 0.5, 0.2),
    "fp16": Tolerance(2e-3, 2e-2, 0.4, 0.2),
}
"""Why these: fp64, sums in fp32 inside the hand-written backward pass and 9 stored digits; fp32, 2⁻²⁴ a rounding times some hundred
roundings on the way, with another order of sums on every processor (measured on a CPU: 1e-7, 1e-6, 3e-6, 1e-6); TF32 and fp16 round to 11
bits, bf16 to 8, and the informative loss of a few clips amplifies that (measured on a CPU, tiny, bf16: 9e-4, 1.1e-2, 0.12, 0.06; fp16:
7e-5, 1.1e-3, 0.05, 0.03; published network, bf16: 2e-4, 8e-3, 0.12, 0.02). A wrong term or a gradient that is missing differs by its whole
size; small faults are what fp64 and fp32 notice."""
PUBLISHED = {**TOLERANCES, "fp32": Tolerance(2e-5, 5e-5, 1e-2, 1e-3)}
"""For the published network: of millions of nearly equal values, its max pools choose others in fp32 than in fp64, which sends gradients
to other tokens (measured on a CPU: 2e-7, 4e-7, 1.4e-3, 7e-5; with the same choices 6e-6, `python -m benchmarks.exactness --full`)."""


def run(setting: Setting, report: Report) -> None:
    """Compare the tiny network, and on a GPU the published one with three clips."""
    precisions = [p for p in PRECISIONS if p != "tf32" or setting.cuda]
    compare(setting, report, CASES["tiny"], precisions)
    if not setting.tiny:
        compare(setting, report, CASES["mvit_b"], precisions if setting.cuda else ["fp32"])


def compare(setting: Setting, report: Report, case: Case, precisions: list[str]) -> None:
    """Four checks a precision."""
    expected = stored.load(case.name)
    for precision in sorted(precisions, key=["fp32", "bf16", "tf32", "fp16", "fp64"].index):
        model = network(case).to(setting.device)
        if precision == "fp64":
            model = model.double()
        try:
            found = step(model, case, precision, setting.device)
        except torch.cuda.OutOfMemoryError as error:
            report.row(f"{case.name} {precision}", "out of memory", note=str(error).split("\n")[0][:200])
            continue
        terms, values = stored.errors(found, expected)
        limit, title = (TOLERANCES if case.name == "tiny" else PUBLISHED)[precision], f"{case.name} {precision}"
        for kind, errors, most in (
            ("loss terms", terms, limit.term),
            ("outputs", {n: e for n, e in values.items() if n.startswith("out.")}, limit.output),
            ("gradients", {n: e for n, e in values.items() if not n.startswith("out.")}, limit.gradient),
        ):
            worst = max(errors, key=lambda n: float("inf") if math.isnan(errors[n]) else errors[n])
            report.below(f"{title} {kind}", errors[worst], most, note=f"worst of {len(errors)}: {worst}")
        report.below(f"{title} whole gradient", stored.total(values, expected), limit.whole)
