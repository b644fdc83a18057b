"""Initialise a new run from existing weights (``init_from``): copy the tensors that fit and report the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from multitrain.config import ConfigError, ModelConfig
from multitrain.config.mvitv2 import MVITV2
from multitrain.interop import pyslowfast
from multitrain.interop.incompatible_checkpoints import backbone_mismatch, of_backbone
from multitrain.interop.inflation import CLASS_TOKEN, inflate, is_of_images
from multitrain.interop.positions import resize_positions, resize_relative
from multitrain.interop.state_dict_report import (
    LoadReport,
    Shape,
    abbreviated,
    compare,
    describe_mismatch,
    is_position_table,
    load_state,
    shapes,
)
from multitrain.interop.weights import read_weights

if TYPE_CHECKING:
    import torch

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
        return _from_tensors(model, path, interpolate_positions)
    weights = read_weights(path)
    state = dict(weights.state)
    notes = [*weights.report.notes, *_unseen_differences(weights.config, model.config)]
    _in_channels_of(state, weights.config, model.config, notes)
    report = compare(shapes(state), shapes(model.state_dict()))
    _require_same_backbone(path, report, weights.config)
    tables = [r for r in report.reshaped if is_position_table(r[0])]
    if tables and not interpolate_positions:
        wanted = f"--frames {model.config.frames} --crop {model.config.crop}"
        remedy = f", or resize them once: multitrain convert {path} resized.safetensors {wanted}"
        raise _other_clip_size(path, tables, remedy)
    if tables:
        state = resize_positions(state, weights.config, model.config.frames, model.config.crop)
        notes.append(_interpolated(tables))
        report = compare(shapes(state), shapes(model.state_dict()))
    load_state(model, state, strict=False, where=str(path))
    return LoadReport(report.matched, report.missing, report.unexpected, report.reshaped, tuple(notes))


def _other_clip_size(path: Path, tables: Sequence[tuple[str, Shape, Shape]], remedy: str = "") -> ConfigError:
    """The error for position tables that may be interpolated."""
    return ConfigError(
        f"{path}: position tables of another clip size ({abbreviated([describe_mismatch(*r) for r in tables])}); add "
        f"interpolate_positions=true{remedy}"
    )


def _interpolated(tables: Sequence[tuple[str, Shape, Shape]]) -> str:
    """The note about interpolated position tables."""
    return abbreviated([f"{name} interpolated from {list(a)} to {list(b)}" for name, a, b in tables])


def _from_tensors(model: MultiTrain, path: Path, interpolate_positions: bool) -> LoadReport:
    """Load a file without a usable network description, e.g. an official release; every backbone tensor must fit.

    Weights of an image network are inflated.
    """
    state, found = pyslowfast.read_tensors(path, model.config, model.datasets)
    notes, wanted = list(found), shapes(model.state_dict())
    images = model.config.backbone == MVITV2 and is_of_images(state)
    if images:
        state, note = inflate(state, wanted)
        notes.append(note)
    report = compare(shapes(state), wanted)
    tables = [r for r in report.reshaped if ".rel_pos_" in r[0] and len(r[1]) == 2 and r[1][1] == r[2][1]]
    others = tuple(r for r in report.reshaped if r not in tables)
    absent = tuple(name for name in report.missing if not (images and name == CLASS_TOKEN))
    problem = backbone_mismatch(path, replace(report, missing=absent, reshaped=others), shapes(state))
    if problem is not None:
        raise problem
    if tables and not interpolate_positions:
        raise _other_clip_size(path, tables)
    if tables:
        state |= {name: resize_relative(state[name].float(), to[0]) for name, _, to in tables}
        notes.append(_interpolated(tables))
        report = compare(shapes(state), wanted)
    load_state(model, state, strict=False, where=str(path))
    notes.append("note: the file does not say what its network computes; only names and shapes were compared")
    return replace(report, notes=tuple(notes))


def _unseen_differences(file: ModelConfig, model: ModelConfig) -> list[str]:
    """Notes about options that differ between file and model, and change what the backbone computes but no tensor's shape."""
    pairs = {
        option: (getattr(file, option), getattr(model, option))
        for option in ("heads", "kv_stride", "residual_q", "mean", "std")
    }
    if file.backbone == model.backbone == MVITV2:
        ours = model.mvitv2.model_dump()
        pairs |= {f"backbone_args.{n}": (value, ours[n]) for n, value in file.mvitv2.model_dump().items()}
    return [
        f"note: model.{option} is {ours} here and {theirs} in the file"
        for option, (theirs, ours) in pairs.items()
        if ours != theirs
    ]


def _in_channels_of(state: dict[str, torch.Tensor], file: ModelConfig, model: ModelConfig, notes: list[str]) -> None:
    """Reverse the colour channels of the patch embedding if the file's clips have the other order: the same function."""
    name = "patch_embed.proj.weight"
    if file.channels != model.channels and name in state:
        state[name] = state[name].flip(1)
        notes.append(f"{name} reversed from {file.channels} to {model.channels}, since model.channels={model.channels}")


def _require_same_backbone(path: str | Path, report: LoadReport, config: ModelConfig) -> None:
    """Raise ConfigError if a backbone tensor has another shape, except for the length of a position table."""
    other = [
        (name, found, wanted)
        for name, found, wanted in report.reshaped
        if of_backbone(name) and not (is_position_table(name) and found[-1] == wanted[-1])
    ]
    absent = [name for name in report.missing if of_backbone(name)]
    extra = [name for name in report.unexpected if of_backbone(name)]
    if other or absent or extra or not any(of_backbone(name) for name in report.matched):
        parts = [describe_mismatch(*r) for r in other[:2]]
        parts += [f"{len(absent)} tensors missing, e.g. {absent[0]}"] if absent else []
        parts += [f"{len(extra)} not known here, e.g. {extra[0]}"] if extra else []
        what = "; ".join(parts) or "none of its blocks fits"
        raise ConfigError(
            f"{path}: the weights of another backbone ({what}); set model=… to the network of the file: {_outline(config)}"
        )


def _outline(config: ModelConfig) -> str:
    options = ["frames", "crop", "depth", "width", "stages", "pool_q_everywhere"]
    values = {name: getattr(config, name) for name in options}
    if config.backbone is not None:
        values = (
            {"backbone": config.backbone} | values | {f"backbone_args.{k}": v for k, v in config.backbone_args.items()}
        )
    return " ".join(f"model.{name}={_typed(value)}" for name, value in values.items())


def _typed(value: object) -> str:
    """A value as it is typed in an override."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


__all__ = ["initialise_from"]
