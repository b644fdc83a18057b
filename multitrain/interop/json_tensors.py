"""Nested values that contain tensors, as JSON and a flat table of tensors, and back; bits and types are preserved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError

if TYPE_CHECKING:
    import torch


MAX_VALUES = 1_000_000
"""Maximum number of values. A value that occurs several times counts each time: a kilobyte of references can expand to gigabytes."""
MAX_DEPTH = 50
"""Maximum nesting of lists and dictionaries."""


def flatten(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Convert `value`, made of dicts, lists, tuples, plain values and tensors, to (JSON structure, tensors by number).

    Raises:
        ConfigError: it contains another type, is nested deeper than :data:`MAX_DEPTH`, or has more than :data:`MAX_VALUES` values.
    """
    tensors: dict[str, Any] = {}
    return _Flattening(tensors).flatten(value, 0), tensors


def unflatten(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value from which :func:`flatten` made `structure` and `tensors`."""
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

    def flatten(self, value: Any, depth: int) -> Any:
        import torch

        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise ConfigError(f"more than {MAX_DEPTH} levels or {MAX_VALUES:,} values beside the weights")
        if isinstance(value, torch.Tensor):
            self._tensors[str(len(self._tensors))] = value
            return {"tensor": str(len(self._tensors) - 1)}
        if isinstance(value, dict):
            return {"dict": [[self._key(key), self.flatten(inner, depth + 1)] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            return {
                "tuple" if isinstance(value, tuple) else "list": [self.flatten(inner, depth + 1) for inner in value]
            }
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ConfigError(f"a {type(value).__name__} beside the weights cannot be kept")

    def _key(self, key: Any) -> Any:
        if key is None or isinstance(key, (bool, int, float, str)):
            return key
        raise ConfigError(f"a dictionary beside the weights has a {type(key).__name__} as a key, which cannot be kept")


__all__ = ["flatten", "unflatten"]
