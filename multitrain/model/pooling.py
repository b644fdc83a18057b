"""The two poolings of MViT, with their gradients, on tokens in memory order [B, T, H, W, C] (channels last, no permuted copies).

`head_pool` is the depth-wise 3×3×3 convolution that pools queries, keys and values; heads are merged into the channels,
so that one call serves all heads. `skip_pool` is the 1×3×3 max pool of the shortcut at stage changes.

No function here builds an autograd graph. On the CPU the gradient of the convolution is written by hand, because that of torch 2.13
takes 10 to 350 times as long as the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.constants import cached
from multitrain.model.device import is_cuda
from multitrain.model.low_precision import conv3d, emulated_dtype

Grid = tuple[int, int, int]
"""Token grid (T, H, W)."""

PoolArgmax = tuple[Tensor, ...]
"""Where each maximum was in its pooling window: bool tensors, as `_max_pool` returns them."""

MAX_COVERING_STRIDE = 3
"""The largest stride at which windows of 3 cover every token."""
POSITIONS_PER_SUM = 4096
"""Positions summed at a time in a weight gradient; short sums keep fp32 rounding near that of a pairwise sum."""


def pooled_grid(grid: Grid, stride: int) -> Grid:
    """The grid after a pooling with kernel 3, padding 1 and spatial `stride`: floor((n - 1) / stride) + 1."""
    t, h, w = grid
    return t, (h - 1) // stride + 1, (w - 1) // stride + 1


def head_pool(x: Tensor, weight: Tensor, grid: Grid, stride: int) -> Tensor:
    """Depth-wise convolution over the token grid with kernel 3×3×3 and padding 1.

    Args:
        x: tokens [B, T·H·W, C].
        weight: one filter per channel, [C, 1, 3, 3, 3], of x's dtype.
        grid: (T, H, W).
        stride: spatial stride; the temporal stride is 1.

    Returns:
        tokens [B, T·H'·W', C], contiguous.
    """
    b, _, c = x.shape
    return _convolve(x.view(b, *grid, c), weight, stride).reshape(b, -1, c)


def head_pool_backward(grad: Tensor, x: Tensor, weight: Tensor, grid: Grid, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the filters, given that of `head_pool`'s output."""
    b, _, c = x.shape
    volume, grad = x.view(b, *grid, c), grad.reshape(b, *pooled_grid(grid, stride), c)
    if x.device.type == "cpu" and not is_cuda(x):
        grad_x = _input_gradient(grad, weight, volume.shape, stride)
        return grad_x.view(x.shape), _weight_gradient(volume, grad, stride)
    channels_first = grad.permute(0, 4, 1, 2, 3), volume.permute(0, 4, 1, 2, 3)
    steps, ones = [1, stride, stride], [1, 1, 1]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *channels_first, weight, None, steps, ones, ones, False, [0, 0, 0], c, [True, True, False]
    )
    return grad_x.permute(0, 2, 3, 4, 1).reshape(x.shape), grad_weight


def read_positions(grid: Grid, stride: int, device: torch.device) -> tuple[Tensor, Grid] | None:
    """The tokens of `grid` that a pooling of this stride reads, int64 [N'], and the grid that they form; None if (nearly) all.

    From stride 4 on, the windows leave gaps. Without the gaps, each window has three adjacent positions (in the first window, one is
    padding), so pooling the remaining tokens with stride 3 gives the same result as pooling all tokens with `stride`.
    """
    if stride <= MAX_COVERING_STRIDE:
        return None
    t, h, w = grid
    rows, columns = _read(h, stride), _read(w, stride)

    def make() -> Tensor:
        found = torch.arange(t * h * w, device=device).view(grid)
        for dim, axis in ((1, rows), (2, columns)):
            found = found.index_select(dim, torch.tensor(axis, device=device))
        return found.flatten()

    return cached(("read_positions", grid, stride, device), make), (t, len(rows), len(columns))


def _read(size: int, stride: int) -> list[int]:
    """Positions below `size` that windows of 3 around 0, stride, 2·stride … read."""
    return [i for i in range(size) if (i + 1) % stride <= 2]


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """x [B, T, H, W, C] -> [B, T, H', W', C]."""
    out = conv3d(x.permute(0, 4, 1, 2, 3), weight, stride=(1, stride, stride), padding=1, groups=x.shape[-1])
    return out.permute(0, 2, 3, 4, 1)


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
    """`_input_gradient` for stride ≥ 3, where spatial windows do not overlap, so that no two taps write to the same position."""
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
    """(input positions that filter tap 0, 1 or 2 reads, the windows for which the position is inside the input)."""
    windows = (size - 1) // stride + 1
    first = 1 if tap == 0 else 0
    last = windows if (windows - 1) * stride + tap - 1 < size else windows - 1
    start = first * stride + tap - 1
    return slice(start, start + (last - first) * stride, stride), slice(first, last)


def _weight_gradient(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The filters' gradient, [C, 1, 3, 3, 3]: for each temporal tap, that of a 2-D convolution of frames."""
    frames, c = x.shape[1], x.shape[-1]
    taps = x.new_zeros(3, c, 1, 3, 3, dtype=torch.promote_types(x.dtype, torch.float32))
    for dt in range(3) if frames > 1 else (1,):
        first, last = max(0, 1 - dt), min(frames, frames + 1 - dt)
        read = x[:, first + dt - 1 : last + dt - 1].flatten(0, 1).permute(0, 3, 1, 2)
        written = grad[:, first:last].flatten(0, 1).permute(0, 3, 1, 2)
        chunk = max(1, POSITIONS_PER_SUM // written[0, 0].numel())
        for r, g in zip(read.split(chunk), written.split(chunk)):
            taps[dt] += _frame_gradient(r, g, stride)
    return taps.movedim(0, 2).to(x.dtype)


def _frame_gradient(x: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The filters' gradient of a depth-wise 3×3 convolution: x [F, C, H, W], grad [F, C, H', W'] -> [C, 1, 3, 3]."""
    c = x.shape[1]
    weight = x.new_empty(c, 1, 3, 3)
    backward = torch.ops.aten.convolution_backward
    mask = [False, True, False]
    if emulated_dtype(x) is not None:
        x, grad = x.float(), grad.float()
    gradient: Tensor = backward(
        grad, x, weight.to(x.dtype), None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], c, mask
    )[1]
    return gradient


def skip_pool(x: Tensor, grid: Grid) -> tuple[Tensor, PoolArgmax]:
    """Max pool with kernel 1×3×3, stride 1×2×2 and padding 0×1×1: tokens [B, T·H·W, C] -> [B, T·H'·W', C], and the argmax.

    One pass of kernel 3 along each axis. Unlike torch's, its backward pass is deterministic on CUDA. It saves two bytes per output and axis
    (two bools); torch saves eight.
    """
    out, columns = _max_pool(x.view(len(x), *grid, -1), 3)
    out, rows = _max_pool(out, 2)
    return out.flatten(1, 3), (*rows, *columns)


def skip_pool_backward(grad: Tensor, pool_argmax: PoolArgmax, grid: Grid) -> Tensor:
    """The gradient of x, [B, T·H·W, C], given that of the output; of equal maxima, the first receives it."""
    _, h, w = pooled_grid(grid, 2)
    volume = grad.reshape(len(grad), grid[0], h, w, -1)
    volume = _max_pool_backward(volume, pool_argmax[:2], 2, grid[1])
    return _max_pool_backward(volume, pool_argmax[2:], 3, grid[2]).flatten(1, 3)


def _max_pool(x: Tensor, dim: int) -> tuple[Tensor, PoolArgmax]:
    """Max pool with kernel 3, stride 2 and padding 1 along `dim`; and where the left and the right neighbour was the maximum."""
    left, centre, right, inner = _windows(x, dim)
    out = centre.clone(memory_format=torch.contiguous_format)
    not_first = out.narrow(dim, 1, left.shape[dim])
    left_wins = left >= not_first
    torch.maximum(not_first, left, out=not_first)
    with_right = out.narrow(dim, 0, inner)
    right_wins = right > with_right
    torch.maximum(with_right, right, out=with_right)
    return out, (left_wins, right_wins)


def _max_pool_backward(grad: Tensor, pool_argmax: PoolArgmax, dim: int, size: int) -> Tensor:
    """The gradient of `_max_pool`'s input, whose axis `dim` has `size` positions, given that of its output."""
    left_wins, right_wins = pool_argmax
    shape = list(grad.shape)
    shape[dim] = size
    out = grad.new_zeros(shape)
    left, centre, right, inner = _windows(out, dim)
    grad = grad.clone(memory_format=torch.contiguous_format)
    with_right = grad.narrow(dim, 0, inner)
    torch.mul(with_right, right_wins, out=right)
    with_right.mul_(~right_wins)
    not_first = grad.narrow(dim, 1, left.shape[dim])
    left.addcmul_(not_first, left_wins.to(grad.dtype))
    not_first.mul_(~left_wins)
    centre.copy_(grad)
    return out


def _windows(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Views of x for windows of 3 with stride 2: (left neighbours of all but the first window, centres of all windows, right neighbours
    of the first `inner` windows, `inner`)."""
    size = x.shape[dim]
    centre, odd = (x[(slice(None),) * dim + (slice(start, None, 2),)] for start in (0, 1))
    inner = size // 2
    return odd.narrow(dim, 0, centre.shape[dim] - 1), centre, odd, inner
