"""All-gather of a tensor over the ranks of a process group, with the gradient of the mathematical operation."""

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
    """x [n, ...] of every rank, stacked in rank order: [W·n, ...]. Without a group, x itself.

    The gradient is the sum over the ranks of their losses' gradients. When every rank computes the same loss from the
    gathered tensor, the mean over ranks of the parameters' gradients is then that loss's true gradient. Shapes must be
    equal on all ranks, and every rank must take part, forward and backward.
    """
    if group is None:
        return x
    gathered: Tensor = _AllGather.apply(x, group)
    return gathered
