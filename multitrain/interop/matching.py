"""Which tensors of a file go where: the report, and copying with nothing left out silently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from multitrain.config import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

POSITIONS = ("pos_embed_spatial", "pos_embed_temporal")
"""Tables whose length follows the clip's size; the only tensors that can be interpolated."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What happened to every tensor of a file and of a model, by name in the model's order (then the file's)."""

    matched: tuple[str, ...]
    """Copied: same name, same shape (after interpolation, for position tables when asked for)."""
    missing: tuple[str, ...]
    """In the model only; left as they were."""
    unexpected: tuple[str, ...]
    """In the file only; not used."""
    reshaped: tuple[tuple[str, Shape, Shape], ...] = ()
    """In both with other shapes, as (name, shape in the file, shape in the model); not copied."""
    notes: tuple[str, ...] = ()
    """Differences that no shape shows, e.g. other strides of keys and values; interpolated tables."""

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
        """One line a tensor that was not copied, by name: ``  fresh: heads.mit.fc1.weight``."""
        return [
            *(f"  fresh: {name}" for name in self.missing),
            *(f"  fresh: {shown(*r)}" for r in self.reshaped),
            *(f"  not used: {name}" for name in self.unexpected),
        ]


def compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Report:
    """The report of copying tensors of shapes `found` into places of shapes `wanted`; copies nothing."""
    both = [n for n in wanted if n in found]
    return Report(
        matched=tuple(n for n in both if found[n] == wanted[n]),
        missing=tuple(n for n in wanted if n not in found),
        unexpected=tuple(n for n in found if n not in wanted),
        reshaped=tuple((n, found[n], wanted[n]) for n in both if found[n] != wanted[n]),
    )


def require_all(report: Report, where: str, remedy: str) -> None:
    """Raises ConfigError unless every tensor matched; the message counts and names those that did not."""
    problems = []
    if report.missing:
        problems.append(f"{len(report.missing)} tensors missing ({listed(report.missing)})")
    if report.unexpected:
        problems.append(f"{len(report.unexpected)} not known ({listed(report.unexpected)})")
    if report.reshaped:
        problems.append(f"{len(report.reshaped)} of another shape ({listed([shown(*r) for r in report.reshaped])})")
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}; {remedy}")


def load_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True, where: str = "weights"
) -> Report:
    """Copies `state` into the parameters of `model` by name.

    Args:
        model: its parameters keep their dtype and device.
        state: tensors by the model's names.
        strict: every tensor must fit on both sides.
        where: the file, for the message.

    Raises:
        ConfigError: `strict`, and a tensor is missing, not known, or of another shape.
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


def shown(name: str, found: Shape, wanted: Shape) -> str:
    """``name: [1, 8, 96] in the file, [1, 16, 96] in the model``."""
    return f"{name}: {list(found)} in the file, {list(wanted)} in the model"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few of `names`, and how many more."""
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


def _groups(names: Sequence[str]) -> str:
    """Tensor names folded into their first two parts, in order: ``heads.mit, expander.fc1``."""
    folded = dict.fromkeys(".".join(n.split(".")[:2]) if "." in n else n for n in names)
    return listed(list(folded), most=8)


__all__ = ["POSITIONS", "Report", "Shape", "compare", "listed", "load_state", "require_all", "shapes", "shown"]
