"""Comparison of a file's tensors with a model's, as a report; loading that reports every tensor it does not copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multitrain.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

POSITION_TABLES = ("pos_embed_spatial", "pos_embed_temporal")
"""Absolute tables of the published network, whose length depends on the clip size."""

Shape = tuple[int, ...]


def is_position_table(name: str) -> bool:
    """Whether a tensor's length depends on the clip size; only such tensors can be interpolated."""
    return name in (*POSITION_TABLES, "pos_embed") or name.rpartition(".")[2].startswith("rel_pos_")


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a file were loaded into a model, by name in the model's order (then the file's)."""

    matched: tuple[str, ...]
    """Copied: same name and shape (of interpolated position tables: after interpolation)."""
    missing: tuple[str, ...]
    """In the model only; not changed."""
    unexpected: tuple[str, ...]
    """In the file only; not used."""
    reshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    """In both with different shapes, as (name, shape in the file, shape in the model); not copied."""
    notes: tuple[str, ...] = ()
    """Differences that shapes do not show, e.g. another stride of keys and values; interpolated tables."""

    @property
    def fresh(self) -> tuple[str, ...]:
        """The model's tensors that the file did not provide."""
        return self.missing + tuple(name for name, _, _ in self.reshaped)

    def summary(self) -> str:
        """One line, e.g. ``516 tensors copied, 22 left at their initial values (heads, …), 2 of the file not used (…)``."""
        parts = [f"{len(self.matched)} tensors copied"]
        if self.fresh:
            parts.append(f"{len(self.fresh)} left at their initial values ({_groups(self.fresh)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} of the file not used ({_groups(self.unexpected)})")
        return "; ".join([", ".join(parts), *self.notes])

    __str__ = summary

    def lines(self) -> list[str]:
        """One line per tensor that was not copied: ``  fresh: heads.mit.fc1.weight``."""
        return [
            *(f"  fresh: {name}" for name in self.missing),
            *(f"  fresh: {describe_mismatch(*r)}" for r in self.reshaped),
            *(f"  not used: {name}" for name in self.unexpected),
        ]


def compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> LoadReport:
    """The report of loading tensors of shapes `found` into a model of shapes `wanted`; copies nothing."""
    both = [n for n in wanted if n in found]
    return LoadReport(
        matched=tuple(n for n in both if found[n] == wanted[n]),
        missing=tuple(n for n in wanted if n not in found),
        unexpected=tuple(n for n in found if n not in wanted),
        reshaped=tuple((n, found[n], wanted[n]) for n in both if found[n] != wanted[n]),
    )


def require_all(report: LoadReport, where: str, remedy: str) -> None:
    """Raise ConfigError unless every tensor matched; the message counts and names those that did not."""
    problems = []
    if report.missing:
        problems.append(f"{len(report.missing)} tensors missing ({abbreviated(report.missing)})")
    if report.unexpected:
        problems.append(f"{len(report.unexpected)} not known ({abbreviated(report.unexpected)})")
    if report.reshaped:
        problems.append(
            f"{len(report.reshaped)} of another shape ({abbreviated([describe_mismatch(*r) for r in report.reshaped])})"
        )
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}; {remedy}")


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True, where: str = "weights"
) -> LoadReport:
    """Copy `state` into the parameters of `model` by name.

    Args:
        model: its parameters keep their dtype and device.
        state: tensors by the model's names.
        strict: whether file and model must have the same tensors, of the same shapes.
        where: the file, for the error message.

    Raises:
        ConfigError: `strict`, and a tensor is missing, unexpected, or of another shape.
    """
    import torch

    own = model.state_dict(keep_vars=True)
    report = compare(shapes(state), shapes(own))
    if strict:
        require_all(report, where, "these weights belong to another model; see `multitrain convert --help`")
    with torch.no_grad():
        for name in report.matched:
            own[name].copy_(state[name])
    return report


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    """Shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def describe_mismatch(name: str, found: Shape, wanted: Shape) -> str:
    """``name: [1, 8, 96] in the file, [1, 16, 96] in the model``."""
    return f"{name}: {list(found)} in the file, {list(wanted)} in the model"


def abbreviated(names: Sequence[str], most: int = 4) -> str:
    """The first `most` of `names`, and the number of the others."""
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


def _groups(names: Sequence[str]) -> str:
    """The distinct first two parts of tensor names, in order: ``heads.mit, expander.fc1``."""
    folded = dict.fromkeys(".".join(n.split(".")[:2]) if "." in n else n for n in names)
    return abbreviated(list(folded), most=8)


__all__ = [
    "POSITION_TABLES",
    "LoadReport",
    "Shape",
    "abbreviated",
    "compare",
    "describe_mismatch",
    "is_position_table",
    "load_state",
    "require_all",
    "shapes",
]
