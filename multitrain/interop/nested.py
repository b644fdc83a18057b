"""Nested values with tensors in them, as JSON and a flat table of tensors, and back: equal in every bit and type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def flatten(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """`value` of dicts, lists, tuples, plain values and tensors as (JSON, tensors by number).

    Raises:
        TypeError: something else in it.
    """
    tensors: dict[str, Any] = {}
    return _flat(value, tensors), tensors


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


def _flat(value: Any, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[key, _flat(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_flat(inner, tensors) for inner in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept beside weights")


__all__ = ["flatten", "unflatten"]
