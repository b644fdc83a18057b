"""Nested values with tensors in them, as JSON and a flat table of tensors, and back: equal in every bit and type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError

if TYPE_CHECKING:
    import torch


MOST = 1_000_000
"""Values at most, those that are referred to again counted again: a kilobyte of references can stand for gigabytes."""
DEEPEST = 50
"""Levels of lists and dictionaries inside each other."""


def flatten(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """`value` of dicts, lists, tuples, plain values and tensors as (JSON, tensors by number).

    Raises:
        ConfigError: something else in it, deeper than :data:`DEEPEST`, or more than :data:`MOST` values.
    """
    tensors: dict[str, Any] = {}
    return _Flattening(tensors).flat(value, 0), tensors


def unflatten(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What :func:`flatten` was given."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {key: unflatten(inner, tensors) for key, inner in content}
    if kind == "tensor":
        return tensors[content]
    items = [unflatten(inner, tensors) for inner in content]
    return tuple(items) if kind == "tuple" else items


class _Flattening:
    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors
        self._values = 0

    def flat(self, value: Any, depth: int) -> Any:
        import torch

        self._values += 1
        if depth > DEEPEST or self._values > MOST:
            raise ConfigError(f"more than {DEEPEST} levels or {MOST:,} values beside the weights")
        if isinstance(value, torch.Tensor):
            self._tensors[str(len(self._tensors))] = value
            return {"tensor": str(len(self._tensors) - 1)}
        if isinstance(value, dict):
            return {"dict": [[self._key(key), self.flat(inner, depth + 1)] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"tuple" if isinstance(value, tuple) else "list": [self.flat(inner, depth + 1) for inner in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ConfigError(f"a {type(value).__name__} beside the weights cannot be kept")

    def _key(self, key: Any) -> Any:
        if key is None or isinstance(key, (bool, int, float, str)):
            return key
        raise ConfigError(f"a dictionary beside the weights has a {type(key).__name__} as a key, which cannot be kept")


__all__ = ["flatten", "unflatten"]
