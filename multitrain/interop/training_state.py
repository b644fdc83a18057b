"""What a weights file holds beside the model: epoch, configuration text, and AdamW's state, in the published code's terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from multitrain.config import ConfigError, RunConfig
from multitrain.config.boundary import understood
from multitrain.config.reading import read_json
from multitrain.interop import pyslowfast
from multitrain.interop.layout import layout
from multitrain.interop.model_path import locate
from multitrain.interop.nested import flatten, unflatten
from multitrain.interop.optimizer_state import Grouping, published_state
from multitrain.interop.weights import Weights, description

if TYPE_CHECKING:
    import torch

KEY = "training"
"""Where it lies in a description."""


class TrainingState(NamedTuple):
    """What the published code restores beside the weights."""

    epoch: int = 0
    """0-based number of the last finished epoch."""
    cfg: str | None = None
    """YAML text of the file that the weights came from."""
    optimizer_state: Any = None
    extras: Mapping[str, Any] = MappingProxyType({})
    """What else a `.pyth` file held."""


def read_training_state(path: Path, weights: Weights, run: RunConfig, grouping: Grouping) -> TrainingState:
    """What lies beside the weights at `path`.

    Args:
        path: see :func:`multitrain.interop.weights.read_weights`.
        weights, run: read from there.
        grouping: of the state that is made of a checkpoint's moments.
    """
    if path.suffix == ".pyth" and path.is_file():
        file = pyslowfast.read_published(path)
        return TrainingState(file.epoch, file.cfg, file.optimizer_state, file.extras)
    place = locate(path)
    kept = description(place).get(KEY)
    with understood(
        f"{place}: the optimizer's state beside it is damaged", "copy it again, or convert with --weights-only"
    ):
        if kept is None:
            return _of_checkpoint(place, weights, run, grouping)
        tensors = _load(optimizer_file(place)) if kept["tensors"] else {}
        state, extras = unflatten(kept["structure"], tensors)
        cfg = None if kept["cfg"] is None else str(kept["cfg"])
        return TrainingState(int(kept["epoch"]), cfg, state, dict(extras))


def describe(state: TrainingState) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`state` as JSON for a description, and its tensors for :func:`optimizer_file`.

    Raises:
        ConfigError: a part of it cannot be kept in this form.
    """
    try:
        structure, tensors = flatten((state.optimizer_state, dict(state.extras)))
    except ConfigError as error:
        raise ConfigError(f"{error}; convert with --weights-only to leave it out") from None
    return {"epoch": state.epoch, "cfg": state.cfg, "structure": structure, "tensors": len(tensors)}, tensors


def optimizer_file(place: Path) -> Path:
    """The file beside a `.safetensors` file that holds the tensors of its optimizer."""
    return place.with_name("optimizer.safetensors" if place.stem == "model" else f"{place.stem}.optimizer.safetensors")


def _of_checkpoint(place: Path, weights: Weights, run: RunConfig, grouping: Grouping) -> TrainingState:
    """A checkpoint folder's moments by the published numbers, and the epochs that its updates amount to."""
    file = place.parent / "state.json"
    if not file.is_file():
        return TrainingState()
    state = read_json(file)
    plan = state.get("plan") or {}
    epoch_size = sum(s["size"] * s.get("replicas", 1) for s in plan.get("sources", ()))
    seen = int(state.get("update", 0)) * int(plan.get("effective_batch", 0))
    moments = place.parent / "optimizer.safetensors"
    optimizer = None
    if moments.is_file():
        optimizer = published_state(
            layout(weights.config, weights.datasets),
            grouping,
            optim=run.optim,
            moments=_load(moments),
            steps=int(state.get("steps_applied", state.get("update", 0))),
        )
    return TrainingState(epoch=max(seen // epoch_size - 1, 0) if epoch_size else 0, optimizer_state=optimizer)


def _load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with understood(f"{file}: the optimizer's tensors cannot be read", "copy it again, or convert with --weights-only"):
        return load_file(file)


__all__ = ["KEY", "TrainingState", "describe", "optimizer_file", "read_training_state"]
