"""The model written down naively from its equations: one head at a time in memory, the whole attention matrix, torch's own pooling.

An oracle for the real model, and the baseline of its speed; it reads the parameters of a state dict and shares no code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from multitrain.config import ModelConfig

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def pool(state: State, which: str, prefix: str, x: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """x [B, h, N, d] -> [B, h, N', d]: depth-wise convolution of each head's map, then layer norm."""
    b, h, _, d = x.shape
    volume = x.reshape(b * h, *grid, d).permute(0, 4, 1, 2, 3).contiguous()
    volume = F.conv3d(volume, state[f"{prefix}.pool_{which}.weight"], None, (1, stride, stride), 1, 1, d)
    tokens = volume.reshape(b, h, d, -1).transpose(2, 3)
    return norm(state, f"{prefix}.norm_{which}", tokens, 1e-5)


def attention(
    state: State, prefix: str, x: Tensor, grid: tuple[int, ...], heads: int, strides: tuple[int, int], residual: bool
) -> Tensor:
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


def features(state: State, config: ModelConfig, clips: Tensor) -> Tensor:
    """Pooled clip features [B, C] in eval mode."""
    grid = [config.frames // 2, config.crop // 4, config.crop // 4]
    x = F.conv3d(clips, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], (2, 4, 4), (1, 3, 3))
    x = x.flatten(2).transpose(1, 2)
    x = x + state["pos_embed_spatial"].repeat(1, grid[0], 1)
    x = x + state["pos_embed_temporal"].repeat_interleave(grid[1] * grid[2], 1)
    heads, kv_stride = config.heads, config.kv_stride
    for i in range(config.depth):
        name, change = f"blocks.{i}", i in config.stages
        if change:
            heads, kv_stride = heads * 2, max(1, kv_stride // 2)
        strides = (2 if change else 1, kv_stride)
        branch = attention(
            state, f"{name}.attn", norm(state, f"{name}.norm1", x, 1e-6), tuple(grid), heads, strides, config.residual_q
        )
        if change:
            x = linear(state, f"{name}.proj_max_pool", x)
            volume = x.reshape(len(x), *grid, -1).permute(0, 4, 1, 2, 3)
            volume = F.max_pool3d(volume, (1, 3, 3), (1, 2, 2), (0, 1, 1))
            x = volume.flatten(2).transpose(1, 2)
            grid = [grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2]
        x = x + branch
        hidden = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, 1e-6)))
        x = x + linear(state, f"{name}.mlp.fc2", hidden)
    return norm(state, "norm", x, 1e-6).mean(1)


def outputs(state: State, config: ModelConfig, datasets: dict[str, int], clips: Tensor) -> dict[str, Tensor]:
    """Features, logits by dataset, projections by "source>target" and the expander's output, in eval mode."""
    out = {"features": features(state, config, clips)}
    for name in datasets:
        head = f"heads.{name}"
        if config.head == "mlp":
            out[name] = linear(state, f"{head}.fc2", F.gelu(linear(state, f"{head}.fc1", out["features"])))
        else:
            out[name] = linear(state, head, out["features"])
    for a in datasets:
        for b in datasets:
            if config.projections and a != b:
                out[f"{a}>{b}"] = linear(state, f"projections.{a}.{b}", out[a])
    if config.expander:
        out["expanded"] = linear(state, "expander.fc2", F.gelu(linear(state, "expander.fc1", out["features"])))
    return out


def perturbed(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Moves every parameter off its initial value, so that no bias is zero and no norm is trivial."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(scale * noise.to(parameter.dtype))
