"""How the optimizer treats each tensor of a network: trained or frozen, with which learning rate and which weight decay.

A tensor that is registered before the first layer (patch embedding, position tables, class token) counts as layer 0, the tensors of
layer i as layer i + 1, and those after the last layer (the last norm, heads, projections, expander) as layer L = number of layers + 1. The
learning rate of a tensor is that of the schedule × `optim.layer_decay` to the power L - layer, as in BEiT and MAE.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from multitrain.config import ConfigError, LossConfig, OptimConfig, nearest
from multitrain.interop.state_dict_report import abbreviated
from multitrain.text import table

LR_FACTOR = "lr_factor"
"""Key of a parameter group: its learning rate ÷ that of the schedule."""


@dataclass(frozen=True)
class Treatment:
    """How the optimizer treats one parameter."""

    name: str
    parameter: nn.Parameter
    layer: int | None
    """0 to L; None where the layers of the network are not known."""
    lr_factor: float
    weight_decay: float

    @property
    def trained(self) -> bool:
        """Whether it is trained, not frozen."""
        return self.parameter.requires_grad

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to tensors of two and more dimensions, not to biases and norms (PySlowFast's rule)."""
        return self.parameter.ndim >= 2


def treatments(model: nn.Module, optim: OptimConfig) -> list[Treatment]:
    """The treatment of every parameter of `model`, in its order.

    Raises:
        ConfigError: `optim.layer_decay` is below 1, and the layers of the network are not known.
    """
    layers: Sequence[nn.Module] | None = getattr(model, "layers", None)
    if layers is None and optim.layer_decay != 1:
        raise ConfigError(
            f"optim.layer_decay={optim.layer_decay:g}: the backbone does not say what its layers are; let its function return the "
            "module and the list of its layers (docs/backbones.md), or leave optim.layer_decay out"
        )
    numbers = {} if layers is None else layer_numbers(model, layers)
    last = len(layers or ()) + 1
    return [
        Treatment(
            name,
            parameter,
            numbers.get(name),
            optim.layer_decay ** (last - numbers[name]) if optim.layer_decay != 1 else 1.0,
            optim.weight_decay if parameter.ndim >= 2 else 0.0,
        )
        for name, parameter in model.named_parameters()
    ]


def layer_numbers(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, int]:
    """The layer of every parameter of `model` by name. A parameter between two layers counts as part of the earlier one."""
    inside = {id(p): i + 1 for i, layer in reversed(list(enumerate(layers))) for p in layer.parameters()}
    left, latest, found = set(inside), 0, {}
    for name, parameter in model.named_parameters():
        latest = inside.get(id(parameter), latest)
        found[name] = latest if left or id(parameter) in inside else len(layers) + 1
        left.discard(id(parameter))
    return found


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the trained parameters: one for each learning rate and weight decay. Errors: see :func:`treatments`."""
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for t in treatments(model, optim):
        if t.trained:
            settings = {"params": [], "weight_decay": t.weight_decay, LR_FACTOR: t.lr_factor}
            groups.setdefault((t.lr_factor, not t.decays), settings)["params"].append(t.parameter)
    return [groups[key] for key in sorted(groups)]


def freeze(model: nn.Module, patterns: Sequence[str], loss: LossConfig | None = None) -> None:
    """Exclude the parameters whose names match one of `patterns` (shell-style, ``*`` matches dots, too) from training.

    Args:
        loss: its weights, which say what has an influence on the loss.

    Raises:
        ConfigError: a pattern matches nothing, or nothing that has an influence on the loss remains.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [name for name in named if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(f"optim.freeze: {pattern!r} matches no tensor of this network; {_hint(pattern, named)}")
        for name in matched:
            named[name].requires_grad_(False)
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    unused = () if loss is None else _without_influence(loss)
    if patterns and all(name.startswith(unused) for name in trained):
        others = f" but {abbreviated(trained)}, which the loss does not use" if trained else ""
        raise ConfigError(f"optim.freeze=[{','.join(patterns)}] freezes all tensors{others}; leave some to be trained")


def _without_influence(loss: LossConfig) -> tuple[str, ...]:
    """The beginnings of the names of tensors that have no influence on the loss."""
    weights = {"projections.": loss.projection_weight, "expander.": loss.informative_weight}
    return tuple(prefix for prefix, weight in weights.items() if not weight)


def _hint(pattern: str, names: Collection[str]) -> str:
    """The names or patterns that were probably meant."""
    stem = pattern.rstrip("*").rstrip(".")
    inside = [prefix for prefix in _prefixes(names) if prefix == stem or prefix.endswith(f".{stem}")]
    if stem and inside:
        return f"did you mean {f'{inside[0]}.*'!r}?"
    close = nearest(pattern, [*names, *(f"{prefix}.*" for prefix in _prefixes(names))])
    return close if close.startswith("did you mean") else nearest(pattern, {f"{_beginning(name)}*" for name in names})


def _prefixes(names: Collection[str]) -> list[str]:
    """``blocks``, ``blocks.0``, ``blocks.0.attn`` … of names of tensors."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts)))
    return list(found)


HEADER = ("tensors", "layer", "number", "parameters", "learning rate", "weight decay")


def summary_table(found: Sequence[Treatment]) -> list[str]:
    """The treatments as a table with a line for each layer, and one for neighbouring blocks that are treated alike."""
    parts: dict[tuple[int, float], list[Treatment]] = {}
    for t in found:
        parts.setdefault((t.layer or 0, t.lr_factor if t.trained else 0.0), []).append(t)
    ends = (0, max(layer for layer, _ in parts))
    runs: dict[tuple[int, float], list[list[Treatment]]] = {}
    for layer, factor in sorted(parts, key=lambda key: key[0]):
        run = runs.pop((layer - 1, factor), []) if layer not in ends and layer - 1 not in ends else []
        runs[layer, factor] = [*run, parts[layer, factor]]
    rows = sorted(runs.values(), key=lambda run: run[0][0].layer or 0)
    return table(HEADER, [_row(run) for run in rows], left=1).splitlines()


def _row(parts: Sequence[Sequence[Treatment]]) -> list[str]:
    """The line of layers that are treated alike."""
    every = [t for part in parts for t in part]
    labels = [_label([t.name for t in part]) for part in parts]
    name = labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"
    numbers = [t.layer for t in every]
    layer = (
        "" if numbers[0] is None else str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"
    )
    return [name, layer, str(len(every)), f"{sum(t.parameter.numel() for t in every):,}", *_rates(every)]


def _rates(alike: Sequence[Treatment]) -> tuple[str, str]:
    """Learning rate and weight decay of tensors with the same learning rate, as text."""
    if not alike[0].trained:
        return "frozen", "–"
    decayed = [t for t in alike if t.weight_decay]
    several = f" on {len(decayed)}" if len(decayed) < len(alike) else ""
    return f"× {alike[0].lr_factor:.4g}", f"{decayed[0].weight_decay:g}{several}" if decayed else "0"


def _label(names: Sequence[str]) -> str:
    """What names have in common: ``blocks.3``, or their distinct beginnings: ``norm, heads, expander``."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    if shared >= _beginning(names[0]).count(".") + 1:
        return ".".join(split[0][:shared])
    firsts = list(dict.fromkeys(map(_beginning, names)))
    return abbreviated(firsts)


def full_table(found: Sequence[Treatment]) -> list[str]:
    """The treatments as a table with one line for each tensor."""
    rows = []
    for t in found:
        layer = "" if t.layer is None else str(t.layer)
        rows.append([t.name, layer, "×".join(map(str, t.parameter.shape)), f"{t.parameter.numel():,}", *_rates([t])])
    return table(("tensor", "layer", "shape", "parameters", *HEADER[4:]), rows, left=1).splitlines()


def _beginning(name: str) -> str:
    """The part of the network that a tensor belongs to: ``patch_embed``, ``blocks``, ``heads``, ``backbone.layers``."""
    depth = 2 if name.startswith("backbone.") else 1
    return ".".join(name.split(".")[:depth])
