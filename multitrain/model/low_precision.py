"""Matrix products and convolutions that stay fast on CPUs without bf16 or fp16 instructions.

On a CPU without instructions for bf16 (AMX, AVX512-BF16), torch 2.13 runs a plain loop: 1.2 GFLOP/s on one core, against 70 in fp32.
On such a CPU, these functions round the operands to bf16, multiply in fp32 and round the result, which is the arithmetic of hardware
that accumulates in fp32. Everywhere else they call torch's own functions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def emulated_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to emulate by rounding around fp32 operations on `x`; None where the device supports the dtype of `x`."""
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
    dtype = emulated_dtype(x)
    if dtype is None:
        return F.linear(x, weight, bias)
    out: Tensor = _RoundedLinear.apply(x, weight, bias, dtype)
    return out


class Linear(nn.Linear):
    """`nn.Linear` that calls `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix product a b: [i, j], [j, k] -> [i, k]. Not differentiable where it is emulated."""
    dtype = emulated_dtype(a)
    if dtype is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    with torch.autocast("cpu", enabled=False):
        result = torch.mm(a.to(dtype).float(), b.to(dtype).float())
    return result.to(dtype) if out is None else out.copy_(result)


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`F.conv3d`, emulated where needed: x [N, C_in, T, H, W], weight [C_out, C_in/groups, kT, kH, kW] -> [N, C_out, T', H', W']."""
    dtype = emulated_dtype(x)
    if dtype is None:
        return F.conv3d(x, weight, bias, **options)
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    bias = None if bias is None else bias.to(dtype).float()
    with torch.autocast("cpu", enabled=False):
        return F.conv3d(x, weight, bias, **options).to(dtype)


class _RoundedLinear(torch.autograd.Function):
    """`linear` with operands, result and gradients rounded to `dtype`; saves the operands in `dtype`."""

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
