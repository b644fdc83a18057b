"""Training state stored with weights: epoch, configuration text and AdamW's state, in the published code's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from multitrain.config import ConfigError, RunConfig
from multitrain.config.boundary import understood
from multitrain.config.reading import read_json
from multitrain.interop import pyslowfast
from multitrain.interop.json_tensors import flatten, unflatten
from multitrain.interop.layout import layout
from multitrain.interop.model_path import resolve_model_file
from multitrain.interop.optimizer_state import Grouping, published_state
from multitrain.interop.weights import Weights, read_description

if TYPE_CHECKING:
    import torch

KEY = "training"
"""Key of the training state in a model description."""


class TrainingState(NamedTuple):
    """What the published code restores in addition to the weights."""

    epoch: int = 0
    """0-based number of the last finished epoch."""
    cfg: str | None = None
    """YAML text of the `.pyth` file from which the weights came."""
    optimizer_state: Any = None
    extras: Mapping[str, Any] = MappingProxyType({})
    """Other content of that `.pyth` file."""


def read_training_state(path: Path, weights: Weights, run: RunConfig, grouping: Grouping) -> TrainingState:
    """Read the training state stored with the weights at `path`.

    Args:
        path: see :func:`multitrain.interop.weights.read_weights`.
        weights, run: read from `path`.
        grouping: parameter groups of an optimizer state that is made from a checkpoint's moments.

    Raises:
        ConfigError: the state is damaged.
    """
    if path.suffix == ".pyth" and path.is_file():
        file = pyslowfast.read_published(path)
        return TrainingState(file.epoch, file.cfg, file.optimizer_state, file.extras)
    model_file = resolve_model_file(path)
    kept = read_description(model_file).get(KEY)
    with understood(
        f"{model_file}: the optimizer's state beside it is damaged", "copy it again, or convert with --weights-only"
    ):
        if kept is None:
            return _of_checkpoint(model_file, weights, run, grouping)
        tensors = _load(optimizer_file(model_file)) if kept["tensors"] else {}
        state, extras = unflatten(kept["structure"], tensors)
        cfg = None if kept["cfg"] is None else str(kept["cfg"])
        return TrainingState(int(kept["epoch"]), cfg, state, dict(extras))


def describe(state: TrainingState) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Convert `state` to (JSON for a model description, tensors for :func:`optimizer_file`).

    Raises:
        ConfigError: a part of it cannot be represented.
    """
    try:
        structure, tensors = flatten((state.optimizer_state, dict(state.extras)))
    except ConfigError as error:
        raise ConfigError(f"{error}; convert with --weights-only to leave it out") from None
    return {"epoch": state.epoch, "cfg": state.cfg, "structure": structure, "tensors": len(tensors)}, tensors


def optimizer_file(model_file: Path) -> Path:
    """The file with the optimizer's tensors that belongs to a `.safetensors` file."""
    return model_file.with_name(
        "optimizer.safetensors" if model_file.stem == "model" else f"{model_file.stem}.optimizer.safetensors"
    )


def _of_checkpoint(model_file: Path, weights: Weights, run: RunConfig, grouping: Grouping) -> TrainingState:
    """The training state of a checkpoint folder: its AdamW moments as a published state, and its updates as epochs."""
    file = model_file.parent / "state.json"
    if not file.is_file():
        return TrainingState()
    state = read_json(file)
    plan = state.get("plan") or {}
    epoch_size = sum(s["size"] * s.get("replicas", 1) for s in plan.get("sources", ()))
    seen = int(state.get("update", 0)) * int(plan.get("effective_batch", 0))
    moments = model_file.parent / "optimizer.safetensors"
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
