"""Convert weights: from any source of a model to a `.pyth` file, a `.safetensors` file, or a folder in MultiTrain's format.

The other content of a `.pyth` file (epoch, configuration text, optimizer state) is kept, so that converting to MultiTrain's formats and
back gives a bit-equal file. A run's AdamW moments become the published code's optimizer state.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError, RunConfig, dump
from multitrain.config.reading import parse_json
from multitrain.files import OutputFolder, refuse_run
from multitrain.interop import protocol, pyslowfast
from multitrain.interop.model_path import MODEL_FILE, belongs_to_run, resolve_model_file
from multitrain.interop.optimizer_state import Grouping
from multitrain.interop.outputs import output_folder, save_tensors
from multitrain.interop.positions import resize_positions, resized_config
from multitrain.interop.training_state import KEY, TrainingState, describe, optimizer_file, read_training_state
from multitrain.interop.weights import HEADER, Weights, read_model
from multitrain.records.checkpoints import sha256

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Converted:
    """Summary of a conversion: the file or folder written, the number of tensors and parameters, classes by dataset, notes for the user."""

    target: Path
    tensors: int
    parameters: int
    datasets: dict[str, int]
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    frames: int | None = None,
    crop: int | None = None,
    force: bool = False,
    weights_only: bool = False,
    grouping: Grouping = "ddp",
    copy: str | None = None,
) -> Converted:
    """Write the weights at `source` to `target`.

    Args:
        source: see :func:`multitrain.interop.weights.read_weights`.
        target: a new `.pyth` or `.safetensors` file, or a new folder, which gets ``model.safetensors`` and ``config.json``.
        frames, crop: clip size of the result (frames, pixels). A change interpolates the position tables and leaves out the
            optimizer state, which belongs to the old tables.
        force: replace an existing `target` if an earlier conversion wrote it and it was not changed since.
        weights_only: leave out the optimizer state.
        grouping: parameter groups of the optimizer state in a `.pyth` file made from a run: ``ddp`` for training with the
            published code on several GPUs, ``single`` for one GPU.
        copy: name of the set of weights to take instead of the trained ones, e.g. ``model_ema``; leaves out the
            optimizer state, which belongs to the trained weights.

    Raises:
        ConfigError: the source is missing or damaged; the target exists (with `force`: and is not a conversion), contains
            the source or has an unknown suffix; or the clip size is invalid.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, force)
    out = output_folder(target.absolute().parent, "convert", _names(target))
    stored, run = read_model(source, copy=copy)
    weights = stored
    notes = list(stored.report.notes)
    training = read_training_state(source, stored, run, grouping)
    if copy is not None:
        training = TrainingState(epoch=training.epoch, cfg=training.cfg)
    config = resized_config(stored.config, frames, crop)
    if config != stored.config:
        weights = stored._replace(
            config=config, state=resize_positions(stored.state, stored.config, config.frames, config.crop)
        )
        training = TrainingState(epoch=training.epoch)
        old = stored.config
        run = _for_crop(run, old.crop, config.crop)
        notes.append(
            f"position tables interpolated from {old.frames} × {old.crop}² to {config.frames} × {config.crop}²; "
            "the optimizer's state is left out"
        )
    elif weights_only:
        training = training._replace(optimizer_state=None, extras=TrainingState().extras)
    if target.suffix == ".pyth":
        notes += _write_pyth(out, target, weights, run, training, grouping)
    else:
        notes += _write_safetensors(source, out, Path(_names(target)[0]), weights, run, training)
        if target.suffix != ".safetensors":
            _complete_folder(out, _names(target), weights, run)
    count = sum(t.numel() for t in weights.state.values())
    return Converted(target, len(weights.state), count, weights.datasets, tuple(notes))


def _check_target(source: Path, target: Path, force: bool) -> None:
    refuse_run(target.parent if target.is_dir() else target)  # an earlier conversion is laid out as a checkpoint is
    if target.is_dir() and belongs_to_run(target):
        raise ConfigError(f"{target}: is a run's folder, which is never written into; choose another name")
    if target.suffix not in (".pyth", ".safetensors", "") and not target.is_dir():
        raise ConfigError(
            f"{target}: its ending says no known format; end it in .pyth or .safetensors, or give a folder without one"
        )
    if source.exists() and target.exists() and source.samefile(target):
        raise ConfigError(f"{target}: is the source; choose another name")
    if target.is_symlink():
        raise ConfigError(f"{target}: is a link, which is never written through; choose another name, or remove it")
    if target.exists() and not force and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; choose another name, or add --force to replace it")
    if target.is_dir() != (target.suffix not in (".pyth", ".safetensors")) and target.exists():
        raise ConfigError(f"{target}: is {'a folder' if target.is_dir() else 'a file'} already; choose another name")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; create it first")
    if not force:
        for name in _names(target)[1:]:
            if os.path.lexists(target.absolute().parent / name):
                raise ConfigError(
                    f"{target.absolute().parent / name}: is in the way of the conversion to {target.name}; choose another name"
                )


def _names(target: Path) -> list[str]:
    """The files that a conversion to `target` writes, relative to its parent; the description may go to ``config.json`` instead."""
    target = target.absolute()
    if target.suffix == ".pyth":
        return [target.name]
    if target.suffix == ".safetensors":
        described = "config.json" if target.name == MODEL_FILE else target.with_suffix(".json").name
        return [target.name, optimizer_file(target).name, described]
    inside = (MODEL_FILE, optimizer_file(target / MODEL_FILE).name, "config.json", "config.yaml", "manifest.json")
    return [f"{target.name}/{name}" for name in inside]


def _for_crop(run: RunConfig, old: int, new: int) -> RunConfig:
    """`run` with its explicit short sides scaled from crop `old` to crop `new`."""
    datasets = {
        name: d.model_copy(update={"test_short_side": round(d.test_short_side * new / old)}) if d.test_short_side else d
        for name, d in run.data.datasets.items()
    }
    return run.model_copy(update={"data": run.data.model_copy(update={"datasets": datasets})})


def _write_pyth(
    out: OutputFolder, target: Path, weights: Weights, run: RunConfig, training: TrainingState, grouping: Grouping
) -> list[str]:
    """Write the file; return notes about what it cannot hold and what the published code cannot load."""
    extras = dict(training.extras)
    made = training.cfg is None or protocol.KEY in extras
    if made:
        extras[protocol.KEY] = protocol.describe(run, list(weights.datasets), weights.class_names)
    tested = next((run.data.datasets[name] for name in weights.datasets if name in run.data.datasets), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        pyslowfast.write_pyth(
            target,
            weights.config,
            weights.datasets,
            weights.state,
            multi_label=weights.multi_label,
            sampling_rate=run.data.sampling_rate,
            target_fps=run.data.target_fps,
            tested=tested,
            grouping=grouping,
            atomic_writer=lambda path: out.writing(path.name),
            **training._replace(extras=extras)._asdict(),
        )
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return notes + (protocol.unsupported_protocols(run, list(weights.datasets), weights.config.crop) if made else [])


def _write_safetensors(
    source: Path, out: OutputFolder, name: Path, weights: Weights, run: RunConfig, training: TrainingState
) -> list[str]:
    """Write the file, its optimizer state and its description; return a note if the description does not have its usual name."""
    kept, tensors = describe(training)
    values = run.model_dump(mode="json") | {"model": weights.config.model_dump(mode="json")}
    source = source if source.suffix == ".pyth" else resolve_model_file(source)
    description = describe_model(weights, values) | {"source": str(source), KEY: kept}
    out.remove(optimizer_file(name))
    if tensors:
        save_tensors(out, optimizer_file(name), tensors)
    beside = _description_file(out, name, description)
    write_model(out, name, weights.state, description, beside)
    if beside.name == "config.json":
        return []
    return [
        f"config.json exists for another model, or was edited, and is kept; the description of this model is in {beside.name}"
    ]


def describe_model(weights: Weights, run: Mapping[str, Any]) -> dict[str, Any]:
    """The description in a `.safetensors` file: network, datasets, class names, and the configuration `run` (plain values)."""
    return {
        "model": weights.config.model_dump(mode="json"),
        "datasets": weights.datasets,
        "multi_label": list(weights.multi_label),
        "class_names": weights.class_names,
        "run": dict(run),
    }


def write_model(
    out: OutputFolder, name: Path, state: Mapping[str, torch.Tensor], description: Mapping[str, Any], beside: Path
) -> None:
    """Write tensors with their description in the header, and the description as the JSON file `beside`. Raises ConfigError."""
    save_tensors(out, name, state, {HEADER: json.dumps(description, ensure_ascii=False)})
    out.write_text(beside, json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def _description_file(out: OutputFolder, name: Path, description: Mapping[str, Any]) -> Path:
    """``config.json`` in the folder of `name`, or ``NAME.json`` if config.json exists with other content."""
    beside = name.with_name("config.json")
    try:
        found = parse_json((out.root / beside).read_bytes(), out.root / beside)
        other = found != json.loads(json.dumps(description))  # not written by this command, or of another model
    except FileNotFoundError:
        other = False
    except (OSError, ValueError, AttributeError):
        other = True
    return name.with_suffix(".json") if other and name.name != MODEL_FILE else beside


def _complete_folder(out: OutputFolder, names: Sequence[str], weights: Weights, run: RunConfig) -> None:
    """Write ``config.yaml``, and last the manifest with every file's size and SHA-256."""
    *_, settings, manifest = names
    out.write_text(settings, dump(run.model_copy(update={"model": weights.config})))
    files = {}
    for file in sorted(out.root / name for name in names[:-1]):
        if file.exists():
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    out.write_text(manifest, json.dumps({"files": files}, indent=1) + "\n")


__all__ = ["Converted", "convert", "describe_model", "write_model"]
