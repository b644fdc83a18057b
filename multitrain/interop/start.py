"""Starting a run from other weights: what fits is copied, what does not is named. Not resuming: the run begins at update 0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop import pyslowfast
from multitrain.interop.matching import POSITIONS, Report, compare, load_state, shapes, shown
from multitrain.interop.official import unfit
from multitrain.interop.positions import resize_positions
from multitrain.interop.weights import read_weights

if TYPE_CHECKING:
    from multitrain.model import MultiTrain


def initialise_from(model: MultiTrain, path: str | Path, *, interpolate_positions: bool = False) -> Report:
    """Copies what fits of the weights at `path` into `model`; what does not is left as it is and reported.

    A tensor fits when name and shape are the same, so backbone and heads of the same datasets are copied, and heads,
    projections and expander that the file does not have stay fresh.

    Args:
        model: changed in place.
        path: see :func:`read_weights`.
        interpolate_positions: resize position tables of another clip size (bicubic in space, linear in time).

    Raises:
        ConfigError: no weights there; position tables of another size without `interpolate_positions`; another backbone.
    """
    path = Path(path)
    if path.suffix == ".pyth" and path.is_file() and not pyslowfast.has_published_cfg(path):
        return _from_tensors(model, path)
    weights = read_weights(path)
    state = weights.state
    notes = [*weights.report.notes, *_unseen_differences(weights.config, model.config)]
    report = compare(shapes(state), shapes(model.state_dict()))
    _require_same_backbone(path, report, weights.config)
    tables = [r for r in report.reshaped if r[0] in POSITIONS]
    if tables and not interpolate_positions:
        wanted = f"--frames {model.config.frames} --crop {model.config.crop}"
        raise ConfigError(
            f"{path}: position tables of another clip size ({'; '.join(shown(*r) for r in tables)}); add "
            f"interpolate_positions=true, or resize them once: multitrain convert {path} resized.safetensors {wanted}"
        )
    if tables:
        state = resize_positions(state, weights.config, model.config.frames, model.config.crop)
        notes.extend(f"{name} interpolated from {list(a)} to {list(b)}" for name, a, b in tables)
        report = compare(shapes(state), shapes(model.state_dict()))
    load_state(model, state, strict=False, where=str(path))
    return Report(report.matched, report.missing, report.unexpected, report.reshaped, tuple(notes))


def _from_tensors(model: MultiTrain, path: Path) -> Report:
    """Starts from a file that does not say what its network is, e.g. an official release: every backbone tensor must fit."""
    state, notes = pyslowfast.read_tensors(path, model.config, model.datasets)
    report = compare(shapes(state), shapes(model.state_dict()))
    problem = unfit(path, report, shapes(state))
    if problem is not None:
        raise problem
    load_state(model, state, strict=False, where=str(path))
    note = "note: the file does not say what its network computes; only names and shapes were compared"
    return Report(report.matched, report.missing, report.unexpected, report.reshaped, (*notes, note))


def _unseen_differences(file: ModelConfig, model: ModelConfig) -> list[str]:
    """Options that change what the backbone computes but no tensor's shape, where file and model differ."""
    return [
        f"note: model.{option} is {getattr(model, option)} here and {getattr(file, option)} in the file"
        for option in ("heads", "kv_stride", "residual_q")
        if getattr(file, option) != getattr(model, option)
    ]


def _require_same_backbone(path: str | Path, report: Report, config: ModelConfig) -> None:
    """Raises ConfigError when a tensor before the heads has another shape; a position table's length does not count."""
    other = [
        (name, found, wanted)
        for name, found, wanted in report.reshaped
        if not name.startswith(("heads.", "projections.", "expander."))
        and not (name in POSITIONS and found[-1] == wanted[-1])
    ]
    if other or not any(name.startswith("blocks.") for name in report.matched):
        what = "; ".join(shown(*r) for r in other[:2]) or "none of its blocks fits"
        raise ConfigError(
            f"{path}: the weights of another backbone ({what}); set model=… to the network of the file: {_outline(config)}"
        )


def _outline(config: ModelConfig) -> str:
    return (
        f"model.frames={config.frames} model.crop={config.crop} model.depth={config.depth} model.width={config.width} "
        f"model.stages=[{','.join(map(str, config.stages))}] model.pool_q_everywhere={str(config.pool_q_everywhere).lower()}"
    )


__all__ = ["initialise_from"]
