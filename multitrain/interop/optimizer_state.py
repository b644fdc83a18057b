"""AdamW's state as a `.pyth` file holds it: by number, in the order of the published code's parameter groups.

The published code makes two groups under DDP, [decay | no decay], and three in a single process, [decay | no decay |
projections]: its group of projections looks for a name that DDP prefixes (defect 19). A state of one kind cannot be loaded
by the other, so the kind has to be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from multitrain.config import OptimConfig
from multitrain.interop.matching import Shape

if TYPE_CHECKING:
    import torch

Grouping = Literal["ddp", "single"]
MOMENTS = ("exp_avg", "exp_avg_sq")


def groups(layout: Mapping[str, Shape], grouping: Grouping) -> list[list[str]]:
    """Our parameter names by published group, in the order in which the published code numbers them.

    Args:
        layout: every parameter's shape by our name, in the published order.
        grouping: ``ddp``: as trained on several GPUs; ``single``: on one.
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
    """The `state_dict` of the published code's AdamW, which it can load.

    Args:
        layout: see :func:`groups`.
        grouping: see :func:`groups`.
        optim: its settings.
        moments: fp32 by ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; without them the state is that before the first step.
        steps: updates that the moments have seen.
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
        for name in names if moments else ():
            entry: dict[str, Any] = {"step": torch.tensor(float(steps))}
            state[number + names.index(name)] = entry | {m: moments[f"{m}.{name}"].clone() for m in MOMENTS}  # type: ignore[index]
        number += len(names)
    return {"state": state, "param_groups": param_groups}


def _group(optim: OptimConfig, weight_decay: float) -> dict[str, Any]:
    """The settings of a group, as this version of torch writes them."""
    import torch

    settings = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps, "weight_decay": weight_decay}
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **settings)  # type: ignore[arg-type]
    return {key: value for key, value in made.state_dict()["param_groups"][0].items() if key != "params"}


__all__ = ["Grouping", "groups", "published_state"]
