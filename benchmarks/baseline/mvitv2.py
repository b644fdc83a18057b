"""A plain transcription of the official MViT and MViTv2: one function over a dictionary of tensors by their official names.

It materialises every matrix, follows the formulas of the papers in their order, and shares no code with multitrain/model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.config import ModelConfig

State = dict[str, Tensor]
Sides = tuple[int, int, int]


class Block(NamedTuple):
    """One block: its name, heads, strides of queries and of keys and values, and whether it pools its queries."""

    name: str
    heads: int
    q_stride: int
    kv_stride: int
    pool_q: bool


def blocks(config: ModelConfig) -> list[Block]:
    """The blocks of the network."""
    found, heads, kv_stride = [], config.heads, config.kv_stride
    for i in range(config.depth):
        change = i in config.stages
        if change:
            heads, kv_stride = 2 * heads, max(1, kv_stride // 2)
        found.append(
            Block(f"blocks.{i}", heads, 2 if change else 1, kv_stride, change or config.pool_q_everywhere)
        )  # fmt: skip
    return found


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of the backbone's parameters."""
    o, width, side = config.mvitv2, config.width, config.crop // 4
    frames = config.frames // 2
    out: dict[str, tuple[int, ...]] = {}
    if o.class_token:
        out["cls_token"] = (1, 1, width)
    if o.absolute == "joint":
        out["pos_embed"] = (1, frames * side * side + o.class_token, width)
    if o.absolute == "separate":
        out |= {"pos_embed_spatial": (1, side * side, width), "pos_embed_temporal": (1, frames, width)}
        if o.class_token:
            out["pos_embed_class"] = (1, 1, width)
    out["patch_embed.proj.weight"], out["patch_embed.proj.bias"] = (width, 3, 3, 7, 7), (width,)

    def affine(name: str, rows: int, *columns: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (rows, *columns)
        if bias:
            out[f"{name}.bias"] = (rows,)

    if o.norm_stem:
        affine("norm_stem", width)
    for i, b in enumerate(blocks(config)):
        if o.widen == "attention":
            wide = attn = width * b.q_stride
        else:
            wide, attn = (2 * width if i + 1 in config.stages else width), width
        head = attn // b.heads
        affine(f"{b.name}.norm1", width)
        if o.relative_space:
            longest = max(side // b.q_stride, side // b.kv_stride)
            out[f"{b.name}.attn.rel_pos_h"] = out[f"{b.name}.attn.rel_pos_w"] = (2 * longest - 1, head)
        if o.relative_time:
            out[f"{b.name}.attn.rel_pos_t"] = (2 * frames - 1, head)
        if o.separate_qkv:
            for one in "qkv":
                affine(f"{b.name}.attn.{one}", attn, width, bias=o.qkv_bias)
        else:
            affine(f"{b.name}.attn.qkv", 3 * attn, width, bias=o.qkv_bias)
        affine(f"{b.name}.attn.proj", attn, attn)
        for one in "qkv" if b.pool_q else "kv":
            out[f"{b.name}.attn.pool_{one}.weight"] = (head, 1, 3, 3, 3)
            affine(f"{b.name}.attn.norm_{one}", head)
        affine(f"{b.name}.norm2", attn)
        hidden = int(attn * config.mlp_ratio)
        affine(f"{b.name}.mlp.fc1", hidden, attn)
        affine(f"{b.name}.mlp.fc2", wide, hidden)
        if wide != width:
            affine(f"{b.name}.proj", wide, width)
        width, side = wide, side // b.q_stride
    affine("norm", width)
    return out


def features(state: State, config: ModelConfig, clips: Tensor) -> Tensor:
    """Clip features [B, C] of clips [B, 3, T, S, S]."""
    o = config.mvitv2
    x = F.conv3d(clips, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], (2, 4, 4), (1, 3, 3))
    sides: Sides = tuple(x.shape[2:])  # type: ignore[assignment]
    x = x.flatten(2).transpose(1, 2)
    if o.class_token:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    if o.absolute == "joint":
        x = x + state["pos_embed"]
    if o.absolute == "separate":
        table = state["pos_embed_spatial"].repeat(1, sides[0], 1)
        table = table + state["pos_embed_temporal"].repeat_interleave(sides[1] * sides[2], 1)
        x = x + (torch.cat([state["pos_embed_class"], table], 1) if o.class_token else table)
    if o.norm_stem:
        x = norm(state, config, "norm_stem", x)
    for block in blocks(config):
        x, sides = run(state, config, block, x, sides)
    if o.mean_pooling:
        return norm(state, config, "norm", x[:, int(o.class_token) :].mean(1))
    x = norm(state, config, "norm", x)
    return x[:, 0] if o.class_token else x.mean(1)


def run(state: State, config: ModelConfig, block: Block, x: Tensor, sides: Sides) -> tuple[Tensor, Sides]:
    """One block: tokens and their grid to tokens and their grid."""
    projects, widens_in_mlp = f"{block.name}.proj.weight" in state, config.mvitv2.widen == "mlp"
    u = norm(state, config, f"{block.name}.norm1", x)
    attended, after = attention(state, config, block, u, sides)
    skip = affine(state, f"{block.name}.proj", u) if projects and not widens_in_mlp else x
    if block.q_stride > 1:
        skip, _ = pooled(skip[:, None], sides, config, lambda c: F.max_pool3d(c, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
        skip = skip[:, 0]
    x = skip + attended
    u = norm(state, config, f"{block.name}.norm2", x)
    hidden = F.gelu(affine(state, f"{block.name}.mlp.fc1", u))
    skip = affine(state, f"{block.name}.proj", u) if projects and widens_in_mlp else x
    return skip + affine(state, f"{block.name}.mlp.fc2", hidden), after


def attention(state: State, config: ModelConfig, block: Block, u: Tensor, sides: Sides) -> tuple[Tensor, Sides]:
    """Multi-head attention over pooled keys and values, with every score in memory."""
    o, at = config.mvitv2, f"{block.name}.attn"
    first = int(o.class_token)
    if o.separate_qkv:
        parts = [affine(state, f"{at}.{one}", u) for one in "qkv"]
    else:
        parts = list(affine(state, f"{at}.qkv", u).chunk(3, -1))
    grids, found = [sides] * 3, []
    for i, one in enumerate("qkv"):
        heads = parts[i].unflatten(-1, (block.heads, -1)).transpose(1, 2)
        weight = state.get(f"{at}.pool_{one}.weight")
        if weight is not None:
            stride = block.q_stride if one == "q" else block.kv_stride
            heads, grids[i] = pooled(
                heads,
                sides,
                config,
                lambda c, w=weight, s=stride: F.conv3d(c, w, None, (1, s, s), 1, groups=len(w)),  # type: ignore[misc]
            )
            heads = norm(state, config, f"{at}.norm_{one}", heads)
        found.append(heads)
    q, k, v = found
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    own = q[:, :, first:].unflatten(2, grids[0])
    bias = torch.zeros(*own.shape[:-1], *grids[1], dtype=q.dtype)
    for axis, letter in enumerate(("t", "h", "w")):
        if (table := state.get(f"{at}.rel_pos_{letter}")) is not None:
            bias = bias + along(own, table, axis, grids[0][axis], grids[1][axis])
    bias = bias.flatten(5).flatten(2, 4)
    scores = scores + F.pad(bias, (first, 0, first, 0))
    out = scores.softmax(-1) @ v
    if config.residual_q:
        out = torch.cat([out[:, :, :first], out[:, :, first:] + q[:, :, first:]], 2)
    return affine(state, f"{at}.proj", out.transpose(1, 2).flatten(2)), grids[0]


def along(q: Tensor, table: Tensor, axis: int, queries: int, keys: int) -> Tensor:
    """Scores of relative positions on one axis: q [B, h, t, y, x, d] -> [B, h, t, y, x, one of (k, 1, 1), (1, k, 1), (1, 1, k)]."""
    length = 2 * max(queries, keys) - 1
    if len(table) != length:
        table = F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
    by_query, by_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    rows = torch.arange(queries)[:, None] * by_query - torch.arange(keys)[None, :] * by_key + (keys - 1) * by_key
    positions = table[rows.long()]
    q = q.movedim(2 + axis, 0)
    scores = torch.stack([one @ positions[i].t() for i, one in enumerate(q)]).movedim(0, 2 + axis)
    shape = [1, 1, 1]
    shape[axis] = keys
    return scores.unflatten(-1, shape)


def pooled(heads: Tensor, sides: Sides, config: ModelConfig, pool: object) -> tuple[Tensor, Sides]:
    """Tokens [B, h, N, d] pooled on their grid; a class token stays as it is."""
    first = int(config.mvitv2.class_token)
    b, h, _, d = heads.shape
    volume = heads[:, :, first:].unflatten(2, sides).flatten(0, 1).movedim(-1, 1)
    volume = pool(volume)  # type: ignore[operator]
    after: Sides = tuple(volume.shape[2:])
    tokens = volume.flatten(2).transpose(1, 2).reshape(b, h, -1, d)
    return torch.cat([heads[:, :, :first], tokens], 2), after


def affine(state: State, name: str, x: Tensor) -> Tensor:
    """A linear layer."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, config: ModelConfig, name: str, x: Tensor) -> Tensor:
    """A layer norm."""
    weight = state[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], config.mvitv2.norm_eps)
