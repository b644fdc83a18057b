"""The model written down plainly from its equations: the whole attention matrix, torch's own pooling on permuted copies.

It does what the published code does, with torch's own functions and autograd: the softmax matrix of every head is in memory, queries, keys
and values are permuted and copied to be pooled, and the shortcut of every block goes through a max pool, of kernel 1 where nothing changes.
It reads the parameters of a state dict and shares no code with the package, so it is both the oracle of the tests and the
baseline of the benchmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.config import ModelConfig

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """lin(x) with the parameters called `name`."""
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    """Layer norm with the parameters called `name`."""
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def drop(x: Tensor, p: float, elements: bool = False) -> Tensor:
    """Zero with probability p, single elements or whole clips; what is kept is divided by 1 - p."""
    if p == 0:
        return x
    shape = x.shape if elements else (len(x), *[1] * (x.dim() - 1))
    return x / (1 - p) * torch.floor(1 - p + torch.rand(shape, dtype=x.dtype, device=x.device))


def pool(state: State, which: str, prefix: str, x: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """x [B, h, N, d] -> [B, h, N', d]: depth-wise convolution of each head's map, then layer norm."""
    b, h, _, d = x.shape
    volume = x.reshape(b * h, *grid, d).permute(0, 4, 1, 2, 3).contiguous()
    volume = F.conv3d(volume, state[f"{prefix}.pool_{which}.weight"], None, (1, stride, stride), 1, 1, d)
    tokens = volume.reshape(b, h, d, -1).transpose(2, 3)
    return norm(state, f"{prefix}.norm_{which}", tokens, 1e-5)


def skip_pool(x: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """x [B, N, C] -> [B, N', C]: a max pool of kernel stride + 1, or of kernel 1 where the stride is 1."""
    kernel = stride + 1 if stride > 1 else 1
    volume = x.reshape(len(x), *grid, -1).permute(0, 4, 1, 2, 3).contiguous()
    pad = kernel // 2
    volume = F.max_pool3d(volume, (1, kernel, kernel), (1, stride, stride), (0, pad, pad))
    return volume.flatten(2).transpose(1, 2).contiguous()


def attention(
    state: State, prefix: str, x: Tensor, grid: tuple[int, ...], heads: int, strides: tuple[int, int], residual: bool
) -> Tensor:
    """Pooled attention, x [B, N, C] -> [B, N', C']."""
    qkv = linear(state, f"{prefix}.qkv", x)
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if f"{prefix}.pool_q.weight" in state:
        q = pool(state, "q", prefix, q, grid, strides[0])
    k, v = (pool(state, which, prefix, y, grid, strides[1]) for which, y in (("k", k), ("v", v)))
    a = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    out = a @ v
    if residual:
        out = out + q
    return linear(state, f"{prefix}.proj", out.transpose(1, 2).reshape(b, out.shape[2], -1))


def features(state: State, config: ModelConfig, clips: Tensor, training: bool = False) -> Tensor:
    """Pooled clip features [B, C] of clips [B, 3, T, S, S]; stochastic depth when `training`."""
    grid = [config.frames // 2, config.crop // 4, config.crop // 4]
    x = F.conv3d(clips, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], (2, 4, 4), (1, 3, 3))
    x = x.flatten(2).transpose(1, 2)
    positions = state["pos_embed_spatial"].repeat(1, grid[0], 1)
    x = x + (positions + state["pos_embed_temporal"].repeat_interleave(grid[1] * grid[2], 1))
    heads, kv_stride = config.heads, config.kv_stride
    for i in range(config.depth):
        name, change = f"blocks.{i}", i in config.stages
        rate = config.drop_path * i / max(config.depth - 1, 1) if training else 0.0
        if change:
            heads, kv_stride = heads * 2, max(1, kv_stride // 2)
        stride = 2 if change else 1
        normed = norm(state, f"{name}.norm1", x, 1e-6)
        branch = attention(
            state, f"{name}.attn", normed, tuple(grid), heads, (stride, kv_stride), config.residual_q
        )  # fmt: skip
        if change:
            x = linear(state, f"{name}.proj_max_pool", x)
        if f"{name}.attn.pool_q.weight" in state:
            x = skip_pool(x, tuple(grid), stride)
        if change:
            grid = [grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2]
        x = x + drop(branch, rate)
        hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, 1e-6)))
        x = x + drop(linear(state, f"{name}.mlp.fc2", hidden), rate)
    return norm(state, "norm", x, 1e-6).mean(1)


def outputs(
    state: State, config: ModelConfig, datasets: dict[str, int], clips: Tensor, training: bool = False
) -> dict[str, Tensor]:
    """Features, logits by dataset, projections by "source>target" and the expander's output."""
    out = {"features": features(state, config, clips, training)}
    rate = config.head_dropout if training else 0.0
    for name in datasets:
        head = f"heads.{name}"
        if config.head == "mlp":
            hidden = drop(F.gelu(linear(state, f"{head}.fc1", out["features"])), rate, elements=True)
            out[name] = linear(state, f"{head}.fc2", hidden)
        else:
            out[name] = linear(state, head, drop(out["features"], rate, elements=True))
    for a in datasets:
        for b in datasets:
            if config.projections and a != b:
                out[f"{a}>{b}"] = linear(state, f"projections.{a}.{b}", out[a])
    if config.expander:
        out["expanded"] = linear(state, "expander.fc2", F.gelu(linear(state, "expander.fc1", out["features"])))
    return out


def perturbed(model: torch.nn.Module, scale: float = 0.1, matrices: bool = True) -> None:
    """Moves parameters off their initial values, so that no bias is zero and no norm is trivial; matrices only if told to."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if matrices or parameter.dim() != 2:
            parameter.data.add_(scale * noise.to(parameter.dtype))
