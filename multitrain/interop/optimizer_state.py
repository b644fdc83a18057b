"""AdamW's state in a `.pyth` file: parameters by number, in the order of the published code's parameter groups.

The published code makes two groups under DDP, [decay | no decay], and three in a single process, [decay | no decay |
projections], because it looks for the projections by a name to which DDP adds a prefix (defect 19). A state with one grouping cannot be
loaded with the other, so the user chooses the grouping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from multitrain.config import OptimConfig
from multitrain.interop.state_dict_report import Shape

if TYPE_CHECKING:
    import torch

Grouping = Literal["ddp", "single"]
MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(layout: Mapping[str, Shape], grouping: Grouping) -> list[list[str]]:
    """MultiTrain's parameter names by published group, in the order in which the published code numbers them.

    Args:
        layout: every parameter's shape by MultiTrain's name, in the published order.
        grouping: ``ddp`` for training on several GPUs, ``single`` for one.
    """
    apart = [n for n in layout if grouping == "single" and n.startswith("projections.")]
    rest = {n: s for n, s in layout.items() if n not in set(apart)}
    decayed = [n for n, shape in rest.items() if len(shape) > 1]
    others = [n for n, shape in rest.items() if len(shape) <= 1]
    return [names for names in (decayed, others, apart) if names]


def published_state(
    layout: Mapping[str, Shape],
    grouping: Grouping = "ddp",
    *,
    optim: OptimConfig | None = None,
    moments: Mapping[str, torch.Tensor] | None = None,
    steps: int = 0,
) -> dict[str, Any]:
    """The `state_dict` of AdamW that the published code can load.

    Args:
        layout: see :func:`groups`.
        grouping: see :func:`groups`.
        optim: learning rate, betas, eps and weight decay (default: those of the default configuration).
        moments: fp32 tensors by ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; without them, the state before the first step. A frozen
            tensor has none, and the published code makes them at its next step.
        steps: number of AdamW steps that produced the moments.
    """
    import torch

    optim = optim or OptimConfig()
    state: dict[int, dict[str, Any]] = {}
    param_groups = []
    number = 0
    for names in groups(layout, grouping):
        decays = len(layout[names[0]]) > 1
        group = _group(optim, optim.weight_decay if decays else 0.0)
        group["params"] = list(range(number, number + len(names)))
        param_groups.append(group)
        for name in [n for n in names if f"{MOMENTS[0]}.{n}" in (moments or ())]:
            entry: dict[str, Any] = {"step": torch.tensor(float(steps))}
            state[number + names.index(name)] = entry | {m: moments[f"{m}.{name}"].clone() for m in MOMENTS}  # type: ignore[index]
        number += len(names)
    return {"state": state, "param_groups": param_groups}


def _group(optim: OptimConfig, weight_decay: float) -> dict[str, Any]:
    """The settings of a parameter group, with the keys that the installed torch writes."""
    import torch

    settings = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": weight_decay}
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **settings)  # type: ignore[arg-type]
    return {key: value for key, value in made.state_dict()["param_groups"][0].items() if key != "params"}


__all__ = ["Grouping", "groups", "published_state"]
