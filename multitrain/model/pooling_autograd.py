"""The poolings of model/pooling.py as differentiable functions, for networks whose backward pass autograd makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multitrain.model.pooling import Grid, head_pool, head_pool_backward, skip_pool, skip_pool_backward


def pool_heads(x: Tensor, weight: Tensor, grid: Grid, stride: int) -> Tensor:
    """`head_pool`, differentiable: tokens [B, T·H·W, C], one filter per channel [C, 1, 3, 3, 3] -> tokens [B, T·H'·W', C]."""
    if not torch.is_grad_enabled():
        return head_pool(x, weight, grid, stride)
    out: Tensor = _PoolHeads.apply(x, weight, grid, stride)
    return out


def pool_shortcut(x: Tensor, grid: Grid) -> Tensor:
    """`skip_pool`, differentiable: tokens [B, T·H·W, C] -> tokens [B, T·H'·W', C]."""
    if not torch.is_grad_enabled():
        return skip_pool(x, grid)[0]
    out: Tensor = _PoolShortcut.apply(x, grid)
    return out


class _PoolHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, grid: Grid, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = grid, stride
        return head_pool(x, weight, grid, stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_x, taps = head_pool_backward(grads[0].to(x.dtype), x, weight, *ctx.geometry)
        return grad_x, taps, None, None


class _PoolShortcut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        out, argmax = skip_pool(x, grid)
        ctx.save_for_backward(*argmax)
        ctx.grid = grid
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return skip_pool_backward(grads[0], ctx.saved_tensors, ctx.grid), None
