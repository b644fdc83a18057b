"""How far the model is from the plain formulation, and both from the truth: python -m benchmarks.exactness [--full]

Full: 32×3 at 224², batch 1, ten minutes and 10 GB. Small: the same network at 8 frames and 128². Norms and pooling filters are
perturbed, so that none is an identity. The truth of a gradient is our own in fp64, which tests hold to the plain one's
(tests/model/test_mvit.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import model as baseline
from benchmarks.results import row, save
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain

DATASETS = {"kinetics": 400, "mit": 305, "ssv2": 174}
NO_GRADIENT = "norm_k.bias"
"""A bias of all keys changes no softmax: its true gradient is zero, and a relative error of it means nothing."""
Values = dict[str, Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="32 frames of 224²")
    full = parser.parse_args(arguments).full
    config = ModelConfig() if full else ModelConfig(frames=8, crop=128)
    rows = measured(config)
    save("exactness", rows, size="full" if full else "small")
    return 0


def measured(config: ModelConfig) -> list[dict[str, Any]]:
    """The table's rows."""
    note = f"{config.frames} frames of {config.crop}², batch 1"
    model = MultiTrain(config, DATASETS).eval()
    baseline.perturbed(model)
    shape = 1, 3, config.frames, config.crop, config.crop
    clips = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    double = {name: p.detach().double() for name, p in model.named_parameters()}
    with torch.no_grad():
        theirs = baseline.outputs(double, config, DATASETS, clips.double())
    model.double()
    ours, truth = _gradients(model, lambda: _outputs(model, clips.double()))
    worst = max(_largest(ours[name] - theirs[name]) for name in theirs)
    largest = max(_largest(value) for value in theirs.values())
    rows = [
        row(
            "outputs in fp64, largest difference", ours=worst, target="<= 1e-12", note=f"{note}; of up to {largest:.3g}"
        )
    ]
    model.float()
    state = dict(model.named_parameters())
    found = {}
    for precision in ("fp32", "bf16"):
        for who, outputs in {
            "ours": lambda: _outputs(model, clips),
            "baseline": lambda: baseline.outputs(state, config, DATASETS, clips),
        }.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                values, gradients = _gradients(model, outputs)
            features = values["features"].double()
            errors = {name: _relative(gradients[name], truth[name]) for name in truth}
            found[precision, who] = features, errors
    plain = found["fp32", "baseline"][0]
    difference = _largest(found["fp32", "ours"][0] - plain)
    top = _largest(plain)
    rows += [
        row("features in fp32, largest difference", ours=difference, target="<= 1e-5", note=f"of up to {top:.3g}"),
        _pair(found, "fp32", "gradients in fp32, largest relative error", max, "<= 1e-4"),
        _pair(found, "bf16", "gradients in bf16, median relative error", _median),
    ]
    distance = {who: float((found["bf16", who][0] - plain).abs().mean()) for who in ("ours", "baseline")}
    figures = {"ours": distance["ours"], "baseline": distance["baseline"]}
    note = "at least 1 ÷ 1.1: no farther than the plain formulation"
    return [*rows, row("features in bf16, mean distance from fp32", **figures, target=">= 0.909×", note=note)]


def _pair(
    found: Mapping[Any, Any], precision: str, figure: str, of: Callable[[list[float]], float], target: str = ""
) -> dict[str, Any]:
    errors = {who: found[precision, who][1] for who in ("ours", "baseline")}
    worst = max(errors["ours"], key=errors["ours"].__getitem__)
    values = {who: of(list(e.values())) for who, e in errors.items()}
    note = f"L2, of {len(errors['ours'])} parameters, without {NO_GRADIENT}; ours is largest at {worst}"
    return row(figure, **values, target=target, note=note)  # type: ignore[arg-type]


def _outputs(model: MultiTrain, clips: Tensor) -> Values:
    out = model.outputs(clips)
    projected = {f"{source}>{target}": value for (source, target), value in out.projected.items()}
    assert out.expanded is not None
    return {"features": out.features, **out.logits, **projected, "expanded": out.expanded}


def _gradients(model: MultiTrain, outputs: Callable[[], Values]) -> tuple[Values, Values]:
    """What `outputs` gives, and the gradients of the sum of its mean squares."""
    model.zero_grad()
    values = outputs()
    torch.stack([v.double().square().mean() for v in values.values()]).sum().backward()
    named = [(name, p.grad) for name, p in model.named_parameters() if not name.endswith(NO_GRADIENT)]
    gradients = {name: grad.double() for name, grad in named if grad is not None}
    return {name: value.detach() for name, value in values.items()}, gradients


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _relative(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    sys.exit(main())
