"""The two poolings of MViT on tokens as they lie in memory: [B, T, H, W, C], channels last, no permuted copies.

`head_pool` is the depth-wise 3×3×3 convolution that pools queries, keys and values; heads are merged into the channels,
so that one call serves all heads. `skip_pool` is the 1×3×3 max pool of the shortcut at stage changes.

On the CPU the gradient of the convolution is written by hand: torch 2.13's own takes 10 to 350 times as long as its forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.products import conv3d, rounding

Grid = tuple[int, int, int]
"""Token grid (T, H, W)."""

POSITIONS = 4096
"""Positions summed at a time in a weight gradient; short sums keep fp32 rounding near that of a pairwise sum."""


def pooled(grid: Grid, stride: int) -> Grid:
    """The grid after a pooling with kernel 3, padding 1 and spatial `stride`: floor((n - 1) / stride) + 1."""
    t, h, w = grid
    return t, (h - 1) // stride + 1, (w - 1) // stride + 1


def head_pool(x: Tensor, weight: Tensor, grid: Grid, stride: int) -> Tensor:
    """Depth-wise convolution over the token grid with kernel 3×3×3 and padding 1.

    Args:
        x: tokens [B, T·H·W, C].
        weight: one filter a channel, [C, 1, 3, 3, 3], of x's dtype.
        grid: (T, H, W).
        stride: spatial stride; the temporal one is 1.

    Returns:
        tokens [B, T·H'·W', C], contiguous.
    """
    b, _, c = x.shape
    volume = x.view(b, *grid, c)
    by_hand = x.device.type == "cpu" and torch.is_grad_enabled()
    out = _DepthwiseConv.apply(volume, weight, stride) if by_hand else _convolve(volume, weight, stride)
    return out.reshape(b, -1, c)


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """x [B, T, H, W, C] -> [B, T, H', W', C]."""
    out = conv3d(x.permute(0, 4, 1, 2, 3), weight, stride=(1, stride, stride), padding=1, groups=x.shape[-1])
    return out.permute(0, 2, 3, 4, 1)


class _DepthwiseConv(torch.autograd.Function):
    """`_convolve` with the gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return _convolve(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = _input_gradient(grad, weight, x.shape, ctx.stride) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(x, grad, ctx.stride) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _input_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """The gradient of `_convolve` with respect to x of `shape`: grad [B, T, H', W', C] -> [B, T, H, W, C]."""
    if stride >= 3:
        return _scattered_gradient(grad, weight, shape, stride)
    if stride > 1:
        spread = grad.new_zeros(shape)
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    return _convolve(grad, weight.flip(2, 3, 4), 1).contiguous()


def _scattered_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """The same for stride ≥ 3, where spatial windows do not overlap: every tap writes to positions of its own."""
    out = grad.new_zeros(shape)
    padded = F.pad(grad, (0, 0, 0, 0, 0, 0, 1, 1))
    times = [padded.narrow(1, 2 - dt, shape[1]) for dt in range(3)]
    taps = weight.flatten(0, 1)
    for dy in range(3):
        for dx in range(3):
            (ys, rows), (xs, columns) = _reach(dy, stride, shape[2]), _reach(dx, stride, shape[3])
            out[:, :, ys, xs] = sum(t[:, :, rows, columns] * taps[:, dt, dy, dx] for dt, t in enumerate(times))
    return out


def _reach(tap: int, stride: int, size: int) -> tuple[slice, slice]:
    """(positions that tap 0, 1 or 2 of the windows reads inside the input, the windows that do)."""
    windows = (size - 1) // stride + 1
    first = 1 if tap == 0 else 0
    last = windows if (windows - 1) * stride + tap - 1 < size else windows - 1
    start = first * stride + tap - 1
    return slice(start, start + (last - first) * stride, stride), slice(first, last)


def _weight_gradient(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The gradient with respect to the filters, [C, 1, 3, 3, 3]: for each temporal tap, that of a 2-D convolution of frames."""
    frames, c = x.shape[1], x.shape[-1]
    taps = x.new_zeros(3, c, 1, 3, 3, dtype=torch.promote_types(x.dtype, torch.float32))
    for dt in range(3) if frames > 1 else (1,):
        first, last = max(0, 1 - dt), min(frames, frames + 1 - dt)
        read = x[:, first + dt - 1 : last + dt - 1].flatten(0, 1).permute(0, 3, 1, 2)
        written = grad[:, first:last].flatten(0, 1).permute(0, 3, 1, 2)
        chunk = max(1, POSITIONS // written[0, 0].numel())
        for r, g in zip(read.split(chunk), written.split(chunk)):
            taps[dt] += _frame_gradient(r, g, stride)
    return taps.movedim(0, 2).to(x.dtype)


def _frame_gradient(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The filters' gradient of a depth-wise 3×3 convolution: x [F, C, H, W], grad [F, C, H', W'] -> [C, 1, 3, 3]."""
    c = x.shape[1]
    weight = x.new_empty(c, 1, 3, 3)
    backward = torch.ops.aten.convolution_backward
    mask = [False, True, False]
    if rounding(x) is not None:
        x, grad = x.float(), grad.float()
    gradient: Tensor = backward(
        grad, x, weight.to(x.dtype), None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], c, mask
    )[1]
    return gradient


def skip_pool(x: Tensor, grid: Grid) -> Tensor:
    """Max pool with kernel 1×3×3, stride 1×2×2 and padding 0×1×1: tokens [B, T·H·W, C] -> [B, T·H'·W', C]."""
    b, _, c = x.shape
    volume = x.view(b, *grid, c)
    if x.device.type == "cpu":
        out = F.max_pool3d(volume.permute(0, 4, 1, 2, 3), (1, 3, 3), (1, 2, 2), (0, 1, 1)).permute(0, 2, 3, 4, 1)
    else:
        out = _MaxPool.apply(_MaxPool.apply(volume, 3), 2)
    return out.reshape(b, -1, c)


class _MaxPool(torch.autograd.Function):
    """Max pool with kernel 3, stride 2 and padding 1 along one axis; the first maximum gets the gradient.

    For CUDA, where torch's own 3-D backward pass is not deterministic. It keeps two bytes an output, not eight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        left, centre, right, inner = _windows(x, dim)
        out = (
            centre.contiguous()
            if centre.stride() == x.stride()
            else centre.clone(memory_format=torch.contiguous_format)
        )
        not_first = out.narrow(dim, 1, left.shape[dim])
        left_wins = left >= not_first
        torch.maximum(not_first, left, out=not_first)
        with_right = out.narrow(dim, 0, inner)
        right_wins = right > with_right
        torch.maximum(with_right, right, out=with_right)
        ctx.save_for_backward(left_wins, right_wins)
        ctx.shape, ctx.dim = x.shape, dim
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), dim = grads, ctx.dim
        left_wins, right_wins = ctx.saved_tensors
        out = grad.new_zeros(ctx.shape)
        left, centre, right, inner = _windows(out, dim)
        grad = grad.clone(memory_format=torch.contiguous_format)
        with_right = grad.narrow(dim, 0, inner)
        right.copy_(with_right * right_wins)
        with_right.mul_(~right_wins)
        not_first = grad.narrow(dim, 1, left.shape[dim])
        left.add_(not_first * left_wins)
        not_first.mul_(~left_wins)
        centre.copy_(grad)
        return out, None


def _windows(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Views of x: the left neighbours of windows 1…, the centres of all, the right ones of the first `inner`; and `inner`."""
    size = x.shape[dim]
    centre, odd = (x[(slice(None),) * dim + (slice(start, None, 2),)] for start in (0, 1))
    inner = size // 2
    return odd.narrow(dim, 0, centre.shape[dim] - 1), centre, odd, inner
