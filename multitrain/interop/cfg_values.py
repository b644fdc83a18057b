"""Values of PySlowFast's configuration text, and the geometry that several of its options describe together."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError
from multitrain.interop.state_dict_report import abbreviated


def get(cfg: Mapping[str, Any], dotted: str, default: object = None) -> Any:
    """The value of an option by its dotted name, or `default`."""
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def need(cfg: Mapping[str, Any], dotted: str, path: Path) -> Any:
    """The value of an option; ConfigError if it is not set."""
    value = get(cfg, dotted)
    if value is None:
        raise ConfigError(
            f"{path}: its cfg does not set {dotted}, so its network is not known; use the cfg that the training code wrote"
        )
    return value


def require_scope(cfg: Mapping[str, Any], path: Path, only: Mapping[str, object]) -> None:
    """Raise ConfigError, which names the options that have another value than the supported one; a missing option is accepted."""
    absent = object()
    wrong = []
    for option, supported in only.items():
        value = get(cfg, option, absent)
        if isinstance(value, str) and isinstance(supported, list):
            value = list(_tuple(value))
        if value is not absent and value is not None and value != supported:
            wrong.append(f"{option}={value!r} (only {supported!r})")
    if wrong:
        raise ConfigError(f"{path}: this network is not supported: {abbreviated(wrong, most=6)}; it cannot be loaded")


def _tuple(text: str) -> tuple[Any, ...]:
    """A tuple as the official YAML files write it, ``(3, 7, 7)``; empty for other text."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    return found if isinstance(found, tuple) else ()


def stages(cfg: Mapping[str, Any], path: Path) -> tuple[tuple[int, ...], bool]:
    """(blocks at which a stage begins, from three options that must agree; whether every block pools its queries)."""
    depth = need(cfg, "MVIT.DEPTH", path)
    strides = {int(e[0]): tuple(e[1:]) for e in get(cfg, "MVIT.POOL_Q_STRIDE") or []}
    pooled = tuple(sorted(b for b, s in strides.items() if s == (1, 2, 2)))
    odd = {b: s for b, s in strides.items() if s not in ((1, 2, 2), (1, 1, 1))}
    if odd:
        block, stride = next(iter(odd.items()))
        raise ConfigError(f"{path}: MVIT.POOL_Q_STRIDE {list(stride)} at block {block}; only [1, 2, 2] is supported")
    for option in ("DIM_MUL", "HEAD_MUL"):
        factors = {int(b): float(f) for b, f in get(cfg, f"MVIT.{option}") or [] if float(f) != 1.0}
        if any(f != 2.0 for f in factors.values()):
            raise ConfigError(f"{path}: MVIT.{option} {factors}; only a factor of 2.0 is supported")
        if tuple(sorted(factors)) != pooled:
            raise ConfigError(
                f"{path}: MVIT.{option} at blocks {sorted(factors)}, MVIT.POOL_Q_STRIDE at {list(pooled)}; "
                "only networks that halve the grid and double channels and heads at the same blocks are supported"
            )
    ones = {b for b, s in strides.items() if s == (1, 1, 1)}
    if ones and (depth > len(strides) or ones != set(range(depth)) - set(pooled)):
        raise ConfigError(
            f"{path}: MVIT.POOL_Q_STRIDE pools queries in some blocks only ({sorted(ones)[:4]} …); all or none is supported"
        )
    everywhere = bool(get(cfg, "MVIT.Q_POOL_ALL", False)) or bool(ones)
    return pooled, everywhere


def kv_stride(cfg: Mapping[str, Any], path: Path) -> int:
    """Stride of keys and values in the first stage, from the adaptive option or from the per-block list derived from it."""
    adaptive = get(cfg, "MVIT.POOL_KV_STRIDE_ADAPTIVE")
    if adaptive:
        if len(adaptive) != 3 or adaptive[0] != 1 or adaptive[1] != adaptive[2]:
            raise ConfigError(f"{path}: MVIT.POOL_KV_STRIDE_ADAPTIVE {adaptive}; only [1, s, s] is supported")
        return int(adaptive[1])
    entries = {int(e[0]): tuple(int(v) for v in e[1:]) for e in get(cfg, "MVIT.POOL_KV_STRIDE") or []}
    changes, _ = stages(cfg, path)
    first = entries.get(0, (1, 1, 1))[1]
    stride = first
    for block in range(int(need(cfg, "MVIT.DEPTH", path))):
        stride = max(stride // 2, 1) if block in changes else stride
        if entries.get(block, (1, 1, 1)) != (1, stride, stride):
            raise ConfigError(
                f"{path}: MVIT.POOL_KV_STRIDE {list(entries.get(block, ()))} at block {block} where [1, {stride}, {stride}] "
                "follows from block 0; only strides that halve at every stage change are supported"
            )
    return first


__all__ = ["get", "kv_stride", "need", "require_scope", "stages"]
