"""Differentiable all-gather over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad.narrow(0, dist.get_rank(ctx.group) * ctx.rows, ctx.rows), None


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The x [n, ...] of all W ranks, concatenated in rank order: [W·n, ...]. Without a group, x itself.

    The backward pass sums the gradients of all ranks' losses. When every rank computes the same loss from the gathered tensor, the mean
    over ranks of the parameters' gradients is that loss's true gradient. Shapes must be equal on all ranks, and every rank must take part
    in the forward and the backward pass.
    """
    if group is None:
        return x
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered
