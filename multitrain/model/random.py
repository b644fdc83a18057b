"""Dropout and stochastic depth with counter-based random numbers: masks are a pure function of the clip and the layer.

A mask is a counter-based hash, in wrap-around integer arithmetic, of the clip's 64-bit key (itself a hash of seed, dataset, video,
epoch and copy) and the layer's stream number. It is therefore the same in any micro-batch, on any rank, on
CPU and GPU, after any restart, and when activation checkpointing recomputes a block.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on Weyl-sequence counters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from multitrain.model.constants import cached


def _signed(value: int) -> int:
    """`value` modulo 2**64 as a signed 64-bit integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


class Mask(NamedTuple):
    """A stochastic-depth mask: the clips for which a residual branch is kept."""

    keep: Tensor
    """1 for clips that keep the branch, 0 for the others: [N, 1, 1]."""
    scale: float
    """Factor for the branch where it is kept: 1 / (1 - p)."""
    zero: Tensor
    """A zero of the same dtype, [1]."""


_WEYL = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64, which torch shifts arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit integers; int64 in and out."""
    z = (z ^ _shift(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shift(z, 31)


def stream_of(name: str) -> int:
    """The stream number of the layer called `name`: 64 bits of its BLAKE2b digest, which must never change."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def random_bits(keys: Tensor, stream: int, count: int, start: int = 0) -> Tensor:
    """`count` random 64-bit integers for each key, from counter `start` on: int64 [N] -> int64 [N, count]."""
    state = _mix(_mix(keys) ^ _signed(stream))
    counter = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=keys.device) * _WEYL
    return _mix(state[:, None] + counter)


def uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24: keys int64 [N] -> float32 [N, count]; the same on every device."""
    return _unit(random_bits(keys, stream, count))


def _unit(z: Tensor) -> Tensor:
    """Integers as float32 numbers in [0, 1)."""
    return _shift(z, 40).to(torch.float32) * 2.0**-24


def uniform53(keys: Tensor, stream: int, count: int, start: int = 0) -> Tensor:
    """Uniform numbers strictly inside (0, 1) with 52 random bits: keys int64 [N] -> float64 [N, count], from counter `start` on."""
    return (_shift(random_bits(keys, stream, count, start), 12).to(torch.float64) + 0.5) * 2.0**-52


def draw_keys(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys int64 [count] from torch's default generator of `device`, for training without clip keys."""
    return torch.empty(count, dtype=torch.int64, device=device).random_()


class _Keyed(nn.Module):
    """Base of the two layers: in training, set to zero with probability `p` and divide the rest by 1 - p."""

    def __init__(self, p: float, stream: int) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability of {p} is not in [0, 1)")
        self.p = p
        self.stream = stream

    def _drop(self, x: Tensor, keys: Tensor | None, count: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """x with `count` mask values per clip, viewed as `shape`. Dividing x (not the mask) rounds once: 1/0.9 is 0.2 % off in bf16."""
        if not self.training or self.p == 0:
            return x
        keys = draw_keys(x.shape[0], x.device) if keys is None else keys
        return x.div(1 - self.p) * (uniform(keys, self.stream, count) >= self.p).view(shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class KeyedDropout(_Keyed):
    """Dropout (Srivastava et al., 2014) of single elements; x [N, ...] and keys int64 [N] or None -> like x."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return self._drop(x, keys, x[0].numel(), x.shape)


class KeyedDropPath(_Keyed):
    """Stochastic depth (Huang et al., 2016): drops a clip's whole branch; x [N, ...], keys int64 [N] or None -> like x."""

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        return self._drop(x, keys, 1, (-1, *[1] * (x.dim() - 1)))


def drop_path_masks(layers: Sequence[KeyedDropPath], keys: Tensor, dtype: torch.dtype) -> list[Mask | None]:
    """Stochastic-depth masks of all layers, drawn by one series of operations; None for a layer with p = 0.

    `mask.keep * mask.scale` is what `KeyedDropPath` multiplies by, from the same draws.

    Args:
        keys: the clips' keys, int64 [N].
    """
    active = [layer for layer in layers if layer.p]
    if not active:
        return [None] * len(layers)
    device = keys.device
    streams = _constant(tuple(_signed(layer.stream) for layer in active), torch.int64, device)
    rates = _constant(tuple(layer.p for layer in active), torch.float32, device)
    draws = _unit(_mix(_mix(_mix(keys)[None] ^ streams[:, None]) + _WEYL))
    masks = iter((draws >= rates[:, None]).to(dtype)[..., None, None].unbind())
    zero = torch.zeros(1, dtype=dtype, device=device)
    return [Mask(next(masks), 1 / (1 - layer.p), zero) if layer.p else None for layer in layers]


def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a cached tensor on the device."""
    return cached((values, dtype, device), lambda: torch.tensor(values, dtype=dtype, device=device))
