"""Matrix products and convolutions, with a way out for CPUs that cannot do them in bf16 or fp16.

A CPU without instructions for bf16 (AMX, AVX512-BF16) leaves torch 2.13 to a plain loop: 1.2 GF/s on one core, where fp32 runs at
70. There the operands are rounded to bf16, multiplied in fp32, and the result is rounded: the arithmetic of hardware that
accumulates in fp32. Everywhere else these are torch's own functions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rounding(x: Tensor) -> torch.dtype | None:
    """The dtype that operations on `x` must be rounded to by hand; None where the device does them well."""
    if x.device.type != "cpu":
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype if dtype in _slow_dtypes() else None


@cache
def _slow_dtypes() -> frozenset[torch.dtype]:
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, is_supported in supported.items() if not is_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    dtype = rounding(x)
    if dtype is None:
        return F.linear(x, weight, bias)
    out: Tensor = _RoundedLinear.apply(x, weight, bias, dtype)
    return out


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b of two matrices, [i, j], [j, k] -> [i, k]; no gradient where it is rounded by hand."""
    dtype = rounding(a)
    if dtype is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    with torch.autocast("cpu", enabled=False):
        result = torch.mm(a.to(dtype).float(), b.to(dtype).float())
    return result.to(dtype) if out is None else out.copy_(result)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`F.conv3d`."""
    dtype = rounding(x)
    if dtype is None:
        return F.conv3d(x, weight, bias, **options)
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    bias = None if bias is None else bias.to(dtype).float()
    with torch.autocast("cpu", enabled=False):
        return F.conv3d(x, weight, bias, **options).to(dtype)


class _RoundedLinear(torch.autograd.Function):
    """`linear` with operands, result and gradients rounded to `dtype`; keeps the operands in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, weight.dtype
        ctx.has_bias = bias is not None
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.to(dtype).float()).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dtype_x, dtype_weight = ctx.dtypes
        grad = grads[0].float()
        rows = grad.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            grad_x = (grad @ weight.float()).to(x.dtype).to(dtype_x) if ctx.needs_input_grad[0] else None
            grad_weight = (rows.T @ x.flatten(0, -2).float()).to(x.dtype).to(dtype_weight)
        return grad_x, grad_weight, rows.sum(0).to(dtype_weight) if ctx.has_bias else None, None
