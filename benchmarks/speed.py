"""Inference and training step of the model against the plain formulation: python -m benchmarks.speed [--full]

CPU seconds of one thread; all sides take turns, each in a process of its own, for what one frees another would find warm, or
not. The best of the rounds counts. Full: 32×3 at 224², batch 1. Small: the same network at 8 frames and 128².
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.baseline import model as baseline
from benchmarks.measure import take_turns_apart
from benchmarks.network import DATASETS, loss_of, trained_outputs
from benchmarks.results import row, save
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain

TRAINED = {"none": (">= 1.5×", "1.7×"), "mlp": ("", ""), "selective": (">= 1×", "")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="32 frames of 224²")
    full = parser.parse_args(arguments).full
    torch.set_num_threads(1)
    config = ModelConfig() if full else ModelConfig(frames=8, crop=128)
    rounds = 2 if full else 3
    clips = torch.randn(1, 3, config.frames, config.crop, config.crop, generator=torch.Generator().manual_seed(0))
    rows = []
    for precision, target, aim in (("fp32", ">= 1.4×", "1.6×"), ("bf16", ">= 1.5×", "1.8×")):
        took = _took(_inference(config, clips, precision), rounds)
        rows.append(_row(f"inference, {precision}", took, "ours", target if full else "", aim if full else "", config))
    took = _took(_training(config, clips), rounds)
    for mode, (target, aim) in TRAINED.items():
        figure = f"training step, bf16, activation_checkpointing={mode}"
        rows.append(_row(figure, took, mode, target if full else "", aim if full else "", config))
    save("speed", rows, size="full" if full else "small")
    return 0


def _took(variants: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    return take_turns_apart({name: (variant, None) for name, variant in variants.items()}, rounds)


def _row(figure: str, took: dict[str, list[float]], name: str, target: str, aim: str, config: ModelConfig) -> Any:
    note = f"{config.frames} frames of {config.crop}², batch 1; best of {len(took[name])} rounds"
    ours, theirs = min(took[name]), min(took["baseline"])
    rounds = (" ".join(f"{seconds:.2f}" for seconds in side) for side in (took[name], took["baseline"]))
    print(f"{figure}, its rounds: {' against '.join(rounds)} CPU s", flush=True)
    return row(figure, ours=ours, baseline=theirs, unit="CPU s", target=target, aim=aim, note=note)


def _autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _inference(config: ModelConfig, clips: torch.Tensor, precision: str) -> dict[str, Callable[[int], Any]]:
    model = MultiTrain(config, DATASETS).eval()
    state = dict(model.named_parameters())

    def ours(_: int) -> None:
        with torch.no_grad(), _autocast(precision):
            model.outputs(clips)

    def theirs(_: int) -> None:
        with torch.no_grad(), _autocast(precision):
            baseline.outputs(state, config, DATASETS, clips)

    return {"ours": ours, "baseline": theirs}


def _training(config: ModelConfig, clips: torch.Tensor) -> dict[str, Callable[[int], Any]]:
    model = MultiTrain(config, DATASETS).train()
    state = dict(model.named_parameters())

    def ours(number: int, mode: Any) -> None:
        for block in model.each_block():
            block.recompute = mode
        with _autocast("bf16"):
            values = trained_outputs(model, clips, torch.tensor([number]))
        loss_of(values).backward()
        model.zero_grad()

    def theirs(_: int) -> None:
        with _autocast("bf16"):
            out = baseline.outputs(state, config, DATASETS, clips, training=True)
        loss_of(value for name, value in out.items() if name != "features").backward()
        model.zero_grad()

    modes: dict[str, Callable[[int], Any]] = {m: lambda number, m=m: ours(number, m) for m in TRAINED}  # type: ignore[misc]
    return {**modes, "baseline": theirs}


if __name__ == "__main__":
    sys.exit(main())
