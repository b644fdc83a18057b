"""Attention with decomposed relative positions (Li et al., CVPR 2022), without a bias of the size of the scores.

The score of query i and key j is q_i·k_j/√d + q_i·Rh[i, j] + q_i·Rw[i, j] + q_i·Rt[i, j], where Rh depends on the rows of i and j, Rw on
their columns and Rt on their frames. A query's products with all rows, columns and frames are few (36 for keys of 8 × 14 × 14), so they
become further channels of the query, and the key gets a one for its row, its column and its frame: the fused attention kernels then
compute the sum, and nothing of size [N_q, N_k] exists in either pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.model.constants import cached
from multitrain.model.low_precision import emulated_dtype
from multitrain.model.pooling import Grid

ALIGNMENT = 8
"""The fused kernels of CUDA take heads whose size is a multiple of this."""


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """The row of a table of 2·max(queries, keys) - 1 relative positions for each query and key on one axis: int64 [queries, keys].

    Computed in float32 and truncated, as in the official releases, so that ratios that are no integers give the same rows.
    """

    def make() -> Tensor:
        q_ratio, k_ratio = max(keys / queries, 1.0), max(queries / keys, 1.0)
        q = torch.arange(queries, dtype=torch.float32)[:, None] * q_ratio
        k = torch.arange(keys, dtype=torch.float32)[None, :] * k_ratio
        return ((q - k) + (keys - 1) * k_ratio).long().to(device)

    return cached(("distances", queries, keys, device), make)


def relative_positions(table: Tensor, queries: int, keys: int) -> Tensor:
    """Embeddings [queries, keys, d] from a table [L, d]; a table of another length than 2·max(queries, keys) - 1 is interpolated."""
    length = 2 * max(queries, keys) - 1
    if len(table) != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    return table[distances(queries, keys, table.device)]


def position_scores(
    q: Tensor, q_grid: Grid, kv_grid: Grid, tables: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> Tensor | None:
    """Products of queries with all relative positions of frames, rows and columns: q [B, N, h, d] without class token -> [B, N, h, K].

    Args:
        tables: of frames, rows and columns, [L, d]; None for an axis without relative positions.
    """
    b, _, heads, size = q.shape
    placed = q.view(b, *q_grid, heads, size)
    found = []
    for axis, (name, table) in enumerate(zip("tyx", tables)):
        if table is not None:
            positions = relative_positions(table, q_grid[axis], kv_grid[axis]).to(q.dtype)
            found.append(torch.einsum(f"btyxhd,{name}kd->btyxhk", placed, positions))
    return torch.cat(found, -1).flatten(1, 3) if found else None


def places(kv_grid: Grid, axes: tuple[bool, ...], device: torch.device) -> Tensor:
    """The frame, row and column of every key, one-hot, for the axes that are true: float32 [M, K]."""

    def make() -> Tensor:
        index = torch.meshgrid(*(torch.arange(n) for n in kv_grid), indexing="ij")
        hot = [F.one_hot(i.flatten(), n) for i, n, wanted in zip(index, kv_grid, axes) if wanted]
        return torch.cat(hot, -1).float().to(device)

    return cached(("places", kv_grid, axes, device), make)


def further_channels(size: int, positions: int) -> int:
    """Channels that queries and keys of `size` get for so many rows, columns and frames: aligned; none for none."""
    return positions + -(size + positions) % ALIGNMENT if positions else 0


def attend_with_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_grid: Grid,
    kv_grid: Grid,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """softmax(q kᵀ/√d + positions) v: q [B, N, h, d], k and v [B, M, h, d] -> [B, N, h, d].

    Tokens before those of the grid (a class token) have no relative position, as queries and as keys.
    """
    dtype = q.dtype
    if emulated_dtype(q) is not None:  # this CPU multiplies bf16 and fp16 slowly
        with torch.autocast(q.device.type, enabled=False):
            return attend_with_positions(q.float(), k.float(), v.float(), q_grid, kv_grid, tables).to(dtype)
    size = q.shape[-1]
    first = q.shape[1] - q_grid[0] * q_grid[1] * q_grid[2]
    scores = position_scores(q[:, first:], q_grid, kv_grid, tables)
    q = q * size**-0.5
    if scores is not None:
        unused = further_channels(size, scores.shape[-1]) - scores.shape[-1]
        scores = F.pad(scores.to(q.dtype), (0, unused, 0, 0, first, 0))
        hot = places(kv_grid, tuple(table is not None for table in tables), q.device).to(k.dtype)
        hot = F.pad(hot, (0, scores.shape[-1] - hot.shape[-1], first, 0))[None, :, None]
        q = torch.cat([q, scores], -1)
        k = torch.cat([k, hot.expand(*k.shape[:3], -1)], -1)
        v = F.pad(v, (0, scores.shape[-1]))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=1.0)
    return out.transpose(1, 2)[..., :size]
