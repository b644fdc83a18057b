"""Numerical differences between the model, the plain formulation and a reference in fp64: python -m benchmarks.exactness [--full]

Full: 32×3 at 224², batch 1, ten minutes and 10 GB. Small: the same network at 8 frames and 128². Biases, norms and pooling filters
are changed from their initial values, so that none is trivial. The reference of a gradient is our own in fp64, which tests compare
with the plain one (tests/model/test_mvit.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.baseline import model as baseline
from benchmarks.network import DATASETS
from benchmarks.results import row, save
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain, block_activations
from multitrain.model.pooling import Grid, PoolArgmax, skip_pool

NO_GRADIENT = "norm_k.bias"
"""A bias of all keys does not change the softmax: its true gradient is zero, so its relative error is meaningless."""
Values = dict[str, Tensor]
WHO = "ours", "baseline"


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
    model, clips = _network(config, matrices=False)
    with torch.no_grad():
        double = {name: p.double() for name, p in model.named_parameters()}
        theirs = baseline.outputs(double, config, DATASETS, clips.double())
    ours, truth = _gradients(lambda: _outputs(model, clips.double()), model.double())
    worst, top = max(_largest(ours[name] - theirs[name]) for name in theirs), max(map(_largest, theirs.values()))
    rows = [
        row("outputs in fp64, largest difference", ours=worst, target="<= 1e-12", note=f"{note}; of up to {top:.3g}")
    ]

    found = {precision: _errors(model.float(), clips, truth, precision) for precision in ("fp32", "bf16")}
    plain = found["fp32"]["baseline"].features
    worst, top = _largest(found["fp32"]["ours"].features - plain), _largest(plain)
    distance: Any = {who: float((found["bf16"][who].features - plain).abs().mean()) for who in WHO}
    rows += [
        row("features in fp32, largest difference", ours=worst, target="<= 1e-5", note=f"of up to {top:.3g}"),
        _arithmetic("gradients in fp32, largest relative error", model, clips),
        _pair("the same, each side with its own choices", found["fp32"], max),
        row(
            "features in bf16, mean distance from fp32",
            **distance,
            target=">= 0.909×",
            note="at least 1 ÷ 1.1: no farther than the plain formulation",
        ),
        _pair("gradients in bf16, median relative error", found["bf16"], statistics.median),
    ]
    return [
        *rows,
        _arithmetic("gradients in fp32 where all matrices have noise of 0.1", *_network(config, matrices=True)),
    ]


def _arithmetic(figure: str, model: MultiTrain, clips: Tensor) -> dict[str, Any]:
    """The largest error of a gradient in fp32, with the maxima of the max pools in fp64 fixed to those of fp32.

    Of two values that differ by rounding only, either may be the maximum, and the gradient takes another path then.
    """
    choices: list[Any] = []
    with _max_pools(choices, again=False):
        _, gradients = _gradients(lambda: _outputs(model, clips), model.float())
    with _max_pools(choices, again=True):
        _, truth = _gradients(lambda: _outputs(model, clips.double()), model.double())
    errors = {name: _relative(gradients[name], truth[name]) for name in truth}
    worst = max(errors, key=errors.__getitem__)
    note = (
        f"L2, of {len(errors)} parameters, without {NO_GRADIENT}; largest at {worst}; max pools choose the same in fp64"
    )
    return row(figure, ours=errors[worst], target="<= 1e-4", note=note)


@contextmanager
def _max_pools(choices: list[Any], again: bool) -> Iterator[None]:
    """Records the maxima that the max pools choose, or replays them."""
    kept = list(choices)

    def pool(x: Tensor, grid: Grid) -> tuple[Tensor, PoolArgmax]:
        out, chosen = skip_pool(x, grid)
        if again:
            return out, kept.pop(0)
        choices.append(chosen)
        return out, chosen

    with patch.object(block_activations, "skip_pool", pool):
        yield


class Errors(NamedTuple):
    """Clip features, and of each parameter the relative error (L2) of its gradient."""

    features: Tensor
    of_gradients: dict[str, float]


def _network(config: ModelConfig, matrices: bool) -> tuple[MultiTrain, Tensor]:
    """A network without trivial parameters, and a clip."""
    model = MultiTrain(config, DATASETS).eval()
    baseline.perturbed(model, matrices=matrices)
    shape = 1, 3, config.frames, config.crop, config.crop
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _errors(model: MultiTrain, clips: Tensor, truth: Values, precision: str) -> dict[str, Errors]:
    """Of both sides."""
    state: Any = dict(model.named_parameters())
    sides = {
        "ours": lambda: _outputs(model, clips),
        "baseline": lambda: baseline.outputs(state, model.config, DATASETS, clips),
    }
    found = {}
    for who, outputs in sides.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            values, gradients = _gradients(outputs, model)
        of_gradients = {name: _relative(gradients[name], truth[name]) for name in truth}
        found[who] = Errors(values["features"].double(), of_gradients)
    return found


def _pair(figure: str, found: dict[str, Errors], of: Callable[[Any], float]) -> dict[str, Any]:
    values: Any = {who: of(found[who].of_gradients.values()) for who in WHO}
    errors = found["ours"].of_gradients
    return row(figure, **values, note=f"ours is largest at {max(errors, key=errors.__getitem__)}")


def _outputs(model: MultiTrain, clips: Tensor) -> Values:
    out = model.outputs(clips)
    projected = {f"{source}>{target}": value for (source, target), value in out.projected.items()}
    assert out.expanded is not None
    return {"features": out.features, **out.logits, **projected, "expanded": out.expanded}


def _gradients(outputs: Callable[[], Values], model: MultiTrain) -> tuple[Values, Values]:
    """The outputs, and the gradients of the sum of their mean squares."""
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


if __name__ == "__main__":
    sys.exit(main())
