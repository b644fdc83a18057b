"""Initialise a new run from existing weights (``init_from``): copy the tensors that fit and report the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop import pyslowfast
from multitrain.interop.incompatible_checkpoints import backbone_mismatch
from multitrain.interop.positions import resize_positions
from multitrain.interop.state_dict_report import (
    POSITION_TABLES,
    LoadReport,
    compare,
    describe_mismatch,
    load_state,
    shapes,
)
from multitrain.interop.weights import read_weights

if TYPE_CHECKING:
    from multitrain.model import MultiTrain


def initialise_from(model: MultiTrain, path: str | Path, *, interpolate_positions: bool = False) -> LoadReport:
    """Copy the weights at `path` that fit into `model`, and report the others. Not a resume: the run starts at update 0.

    A tensor fits if name and shape are equal: backbone and heads of the same datasets are copied; heads,
    projections and an expander that the file does not have keep their initial values.

    Args:
        model: changed in place.
        path: see :func:`read_weights`.
        interpolate_positions: interpolate position tables of another clip size (bicubic in space, linear in time).

    Raises:
        ConfigError: there are no weights; they have another backbone, or position tables of another size and
            `interpolate_positions` is false.
    """
    path = Path(path)
    if path.suffix == ".pyth" and path.is_file() and not pyslowfast.has_published_cfg(path):
        return _from_tensors(model, path)
    weights = read_weights(path)
    state = weights.state
    notes = [*weights.report.notes, *_unseen_differences(weights.config, model.config)]
    report = compare(shapes(state), shapes(model.state_dict()))
    _require_same_backbone(path, report, weights.config)
    tables = [r for r in report.reshaped if r[0] in POSITION_TABLES]
    if tables and not interpolate_positions:
        wanted = f"--frames {model.config.frames} --crop {model.config.crop}"
        raise ConfigError(
            f"{path}: position tables of another clip size ({'; '.join(describe_mismatch(*r) for r in tables)}); add "
            f"interpolate_positions=true, or resize them once: multitrain convert {path} resized.safetensors {wanted}"
        )
    if tables:
        state = resize_positions(state, weights.config, model.config.frames, model.config.crop)
        notes.extend(f"{name} interpolated from {list(a)} to {list(b)}" for name, a, b in tables)
        report = compare(shapes(state), shapes(model.state_dict()))
    load_state(model, state, strict=False, where=str(path))
    return LoadReport(report.matched, report.missing, report.unexpected, report.reshaped, tuple(notes))


def _from_tensors(model: MultiTrain, path: Path) -> LoadReport:
    """Load a file without a usable network description, e.g. an official release; every backbone tensor must fit."""
    state, notes = pyslowfast.read_tensors(path, model.config, model.datasets)
    report = compare(shapes(state), shapes(model.state_dict()))
    problem = backbone_mismatch(path, report, shapes(state))
    if problem is not None:
        raise problem
    load_state(model, state, strict=False, where=str(path))
    note = "note: the file does not say what its network computes; only names and shapes were compared"
    return LoadReport(report.matched, report.missing, report.unexpected, report.reshaped, (*notes, note))


def _unseen_differences(file: ModelConfig, model: ModelConfig) -> list[str]:
    """Notes about options that differ between file and model, and change what the backbone computes but no tensor's shape."""
    return [
        f"note: model.{option} is {getattr(model, option)} here and {getattr(file, option)} in the file"
        for option in ("heads", "kv_stride", "residual_q")
        if getattr(file, option) != getattr(model, option)
    ]


def _require_same_backbone(path: str | Path, report: LoadReport, config: ModelConfig) -> None:
    """Raise ConfigError if a backbone tensor has another shape, except for the length of a position table."""
    other = [
        (name, found, wanted)
        for name, found, wanted in report.reshaped
        if not name.startswith(("heads.", "projections.", "expander."))
        and not (name in POSITION_TABLES and found[-1] == wanted[-1])
    ]
    if other or not any(name.startswith("blocks.") for name in report.matched):
        what = "; ".join(describe_mismatch(*r) for r in other[:2]) or "none of its blocks fits"
        raise ConfigError(
            f"{path}: the weights of another backbone ({what}); set model=… to the network of the file: {_outline(config)}"
        )


def _outline(config: ModelConfig) -> str:
    return (
        f"model.frames={config.frames} model.crop={config.crop} model.depth={config.depth} model.width={config.width} "
        f"model.stages=[{','.join(map(str, config.stages))}] model.pool_q_everywhere={str(config.pool_q_everywhere).lower()}"
    )


__all__ = ["initialise_from"]
