"""The pooling convolutions at the shapes of the network: each route's time, and its distance from fp64 on the CPU."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.counting import as_on_cuda
from benchmarks.gpu_check.network import uniform
from benchmarks.gpu_check.setting import Report, Setting, arithmetic
from multitrain.config import ModelConfig
from multitrain.model import MultiTrain, block_activations, pooling
from multitrain.model.pooling import Grid

LIMIT = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Relative L2 distance. A sum of 27 products, and for the filters' gradient of thousands of positions, whose results round to 53 bits
(sums in fp32 on the CPU, hence 1e-6), 24 and 8."""
CHANNELS = 4
"""Channels whose results are compared; a depth-wise convolution treats each alone."""
Results = tuple[Tensor, Tensor, Tensor]
"""Output [B, N', C], gradient of the tokens [B, N, C] and of the filters [C, 1, 3, 3, 3]."""


class Shape(NamedTuple):
    """One call of `head_pool` for one clip."""

    grid: Grid
    channels: int
    stride: int


Route = Callable[[Tensor, Tensor, Tensor, Shape], Results]


def shapes(config: ModelConfig) -> Counter[Shape]:
    """The calls of a forward pass, with their number, as the block makes them (its compacted keys and values included)."""
    found: Counter[Shape] = Counter()
    real = block_activations.head_pool

    def noted(x: Tensor, weight: Tensor, grid: Grid, stride: int) -> Tensor:
        found[Shape(grid, x.shape[-1], stride)] += 1
        return real(x, weight, grid, stride)

    with FakeTensorMode(), as_on_cuda(), mock.patch.object(MultiTrain, "initialise"), torch.no_grad():
        model = MultiTrain(config, {"kinetics": 400}).eval()
        with mock.patch.object(block_activations, "head_pool", noted):
            model.outputs(torch.empty(1, 3, config.frames, config.crop, config.crop))
    return found


def product(x: Tensor, weight: Tensor, grad: Tensor, s: Shape) -> Results:
    """What the network calls."""
    return pooling.head_pool(x, weight, s.grid, s.stride), *pooling.head_pool_backward(
        grad, x, weight, s.grid, s.stride
    )


def torch_route(contiguous: bool, cudnn: bool) -> Route:
    """Torch's convolution, by cuDNN or torch's own kernel, on a contiguous copy [B, C, T, H, W] or on the channels-last tokens."""

    def route(x: Tensor, weight: Tensor, grad: Tensor, s: Shape) -> Results:
        b, _, c = x.shape
        volume = x.view(b, *s.grid, c).permute(0, 4, 1, 2, 3)
        out_grid = pooling.pooled_grid(s.grid, s.stride)
        above = grad.view(b, *out_grid, c).permute(0, 4, 1, 2, 3)
        if contiguous:
            volume, above = volume.contiguous(), above.contiguous()
        steps, ones = [1, s.stride, s.stride], [1, 1, 1]
        with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
            out = F.conv3d(volume, weight, stride=tuple(steps), padding=1, groups=c)
            gx, gw, _ = torch.ops.aten.convolution_backward(
                above, volume, weight, None, steps, ones, ones, False, [0, 0, 0], c, [True, True, False]
            )
        rows = [t.permute(0, 2, 3, 4, 1).reshape(b, -1, c) for t in (out, gx)]
        return rows[0], rows[1], gw

    return route


def routes(setting: Setting) -> dict[str, Route]:
    """By name; on the CPU the product's alone is timed against torch's."""
    if not setting.cuda:
        return {"product": product, "torch contiguous": torch_route(True, False)}
    return {
        "product": product,
        "cuDNN channels last": torch_route(False, True),
        "cuDNN contiguous": torch_route(True, True),
        "native channels last": torch_route(False, False),
        "native contiguous": torch_route(True, False),
    }


def run(setting: Setting, report: Report) -> None:
    """Every shape in bf16 and fp32, and on the CPU in fp64."""
    with arithmetic("fp32", setting.device):  # without TF32
        _run(setting, report)


def _run(setting: Setting, report: Report) -> None:
    clips = 2 if setting.tiny else 8
    sums: defaultdict[tuple[str, torch.dtype], float] = defaultdict(float)
    for shape, calls in sorted(shapes(setting.model).items(), reverse=True):
        for dtype in (torch.bfloat16, torch.float32) if setting.cuda else (torch.float64, torch.float32):
            given = _given(shape, clips, setting.device, dtype)
            truth = _truth(given[0][:1], given[1], given[2][:1], shape)
            for name, route in routes(setting).items():
                title = f"{_text(shape)} ×{calls} {str(dtype)[6:]} {name}"
                spent = _measure(setting, report, title, partial(_on, route, shape), given, truth)
                sums[name, dtype] += calls * spent
    for (name, dtype), spent in sums.items():
        report.row(f"all poolings of the network, {str(dtype)[6:]} {name}", spent / clips, "ms a clip")


def _on(route: Route, s: Shape, x: Tensor, weight: Tensor, grad: Tensor) -> Results:
    return route(x, weight, grad, s)


def _given(s: Shape, clips: int, device: torch.device, dtype: torch.dtype) -> Results:
    """Tokens, filters and the gradient of the output."""
    tokens, after = (math.prod(grid) for grid in (s.grid, pooling.pooled_grid(s.grid, s.stride)))
    x, g = (uniform(f"{name} {s}", clips, n, s.channels) for name, n in (("x", tokens), ("g", after)))
    w = uniform(f"w {s}", s.channels, 1, 3, 3, 3)
    return x.to(device, dtype), w.to(device, dtype), g.to(device, dtype)


def _measure(
    setting: Setting, report: Report, title: str, route: Callable[..., Results], given: Results, truth: Results
) -> float:
    """Check the route on the first clip and time it on all; milliseconds, NaN where torch has no such kernel."""
    x, w, g = given
    try:
        found = route(x[:1], w, g[:1])
        spent = setting.seconds(partial(route, x, w, g), *((1, 0) if setting.tiny else (5, 2))) * 1e3
    except RuntimeError as failure:
        if title.endswith("product"):
            raise
        report.row(title, "not possible", note=str(failure).split("\n")[0][:200])
        return math.nan
    error, limit = max(_distance(a, b) for a, b in zip(_slice(found), truth)), LIMIT[x.dtype]
    held = bool(error <= limit)
    note = f"error {error:.1e}, at most {limit:g}" + ("" if held else ": wrong, not to be used")
    ok = held if title.endswith("product") else None  # the network does not depend on the others
    report.row(title, spent, f"ms, {len(x)} clips, forward and backward", ok, note)
    return spent


def _text(s: Shape) -> str:
    return f"{'×'.join(map(str, s.grid))} C={s.channels} stride {s.stride}"


def _slice(found: Results) -> Results:
    return found[0][..., :CHANNELS], found[1][..., :CHANNELS], found[2][:CHANNELS]


def _truth(x: Tensor, weight: Tensor, grad: Tensor, s: Shape) -> Results:
    """The first channels by torch's autograd on the CPU, in fp64, from the rounded inputs."""
    b, c = x.shape[0], min(CHANNELS, s.channels)
    volume = x[..., :c].cpu().double().view(b, *s.grid, c).permute(0, 4, 1, 2, 3).requires_grad_()
    filters = weight[:c].cpu().double().requires_grad_()
    out = F.conv3d(volume, filters, stride=(1, s.stride, s.stride), padding=1, groups=c)
    above = grad[..., :c].cpu().double().view(b, *pooling.pooled_grid(s.grid, s.stride), c).permute(0, 4, 1, 2, 3)
    gx, gw = torch.autograd.grad(out, (volume, filters), above)
    rows = [t.permute(0, 2, 3, 4, 1).reshape(b, -1, c) for t in (out.detach(), gx)]
    return rows[0], rows[1], gw


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())
