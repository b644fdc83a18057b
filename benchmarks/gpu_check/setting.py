"""What a section gets: the device, the sizes, a folder; and what it fills: rows of figures and checks."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from multitrain.config import ModelConfig
from multitrain.model.device import autocast


@dataclass(frozen=True)
class Setting:
    """Where and at which sizes a section runs."""

    device: torch.device
    tiny: bool
    """Sizes of a test instead of the published network."""
    folder: Path
    """An empty folder for the section's files."""

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def model(self) -> ModelConfig:
        """The network: the published one, or a tiny one of the same structure."""
        return TINY if self.tiny else ModelConfig()

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, action: Callable[[], Any], times: int = 5, warm_up: int = 2) -> float:
        """Median wall time of one call of `action`, in seconds; the device is waited for before and after each."""
        found = []
        for number in range(-warm_up, times):
            self.synchronise()
            began = time.perf_counter()
            action()
            self.synchronise()
            if number >= 0:
                found.append(time.perf_counter() - began)
        return sorted(found)[len(found) // 2]


TINY = ModelConfig(
    frames=4,
    crop=64,
    depth=4,
    width=32,
    stages=(1, 3),
    kv_stride=8,
    drop_path=0.2,
    head_hidden=24,
    expander_hidden=32,
)
"""Four blocks with every kind of pooling of the published network: strides 8, 4 and 2 of keys and values, 1 and 2 of queries."""


@dataclass
class Report:
    """The rows of one section, written to `file` as they come, so that an interrupted section leaves what it found."""

    file: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(
        self,
        name: str,
        value: float | int | str | None = None,
        unit: str = "",
        ok: bool | None = None,
        note: str = "",
    ) -> None:
        """A figure, or a check (`ok` is whether it held); `note` says against what, or what it means."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has no such numbers
        found = {"name": name, "value": value, "unit": unit, "ok": ok, "note": note}
        self.rows.append(found)
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as out:
                out.write(json.dumps(found, ensure_ascii=False) + "\n")

    def below(self, name: str, value: float, limit: float, unit: str = "", note: str = "") -> None:
        """A check that `value` is at most `limit`; a value that is not a number fails."""
        self.row(name, value, unit, bool(value <= limit), "; ".join(filter(None, [f"at most {limit:g}", note])))

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not hold."""
        return [r["name"] for r in self.rows if r["ok"] is False]


PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "fp16")
"""Arithmetic of the forward and backward pass. tf32 is fp32 with TF32 in matrix products and convolutions, on GPUs only."""


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in `precision`; fp64 needs weights and clips in fp64."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    low = precision if precision in ("bf16", "fp16") else "fp32"
    try:
        with autocast(low, device):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
