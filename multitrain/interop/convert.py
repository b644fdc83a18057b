"""One kind of weights file into another: `.pyth` and `.safetensors`, from anything that holds a model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError, ModelConfig, RunConfig
from multitrain.interop import pyslowfast
from multitrain.interop.weights import HEADER, Weights, locate, read_model, resize_positions


@dataclass(frozen=True)
class Converted:
    """What was written."""

    target: Path
    tensors: int
    parameters: int
    datasets: dict[str, int]
    notes: tuple[str, ...] = ()


def convert(
    source: str | Path, target: str | Path, *, frames: int | None = None, crop: int | None = None, force: bool = False
) -> Converted:
    """Writes the weights at `source` as `target`, whose ending says how: `.pyth` or `.safetensors`.

    From `.pyth` to `.pyth` every tensor, the configuration text and the optimizer state stay as they are.

    Args:
        source: see :func:`multitrain.interop.weights.read_weights`.
        target: a new file.
        frames, crop: clip size of the result; position tables are interpolated when it is another one.
        force: replace `target` when it exists.

    Raises:
        ConfigError: nothing to read, a target that exists, an ending that is not known, a clip size that cannot be.
    """
    source, target = Path(source), Path(target)
    if target.suffix not in (".pyth", ".safetensors"):
        raise ConfigError(f"{target}: its ending says no known format; end it in .pyth or .safetensors")
    if target.exists() and not force:
        raise ConfigError(f"{target}: exists already; choose another name, or add --force to replace it")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; create it first")
    stored, run = read_model(source)
    weights, notes = _resized(stored, frames, crop)
    if target.suffix == ".pyth":
        notes += _write_pyth(source, target, weights, run, resized=bool(notes))
    else:
        _write_safetensors(source, target, weights, run)
    count = sum(t.numel() for t in weights.state.values())
    return Converted(target, len(weights.state), count, weights.datasets, tuple(notes))


def _resized(weights: Weights, frames: int | None, crop: int | None) -> tuple[Weights, list[str]]:
    old = weights.config
    frames, crop = frames or old.frames, crop or old.crop
    if (frames, crop) == (old.frames, old.crop):
        return weights, []
    try:
        new = ModelConfig.model_validate(old.model_dump() | {"frames": frames, "crop": crop})
    except ValueError as error:
        raise ConfigError(f"clips of {frames} × {crop}² cannot be: {' '.join(str(error).split())[:200]}") from None
    state = resize_positions(weights.state, old, frames, crop)
    note = f"position tables interpolated from {old.frames} × {old.crop}² to {frames} × {crop}²"
    return weights._replace(config=new, state=state), [note]


def _write_pyth(source: Path, target: Path, weights: Weights, run: RunConfig, *, resized: bool) -> list[str]:
    import warnings

    kept: dict[str, Any] = {}
    if source.suffix == ".pyth":
        file = pyslowfast.read_published(source)
        kept = {"epoch": file.epoch}
        if not resized:
            kept |= {"cfg": file.cfg, "optimizer_state": file.optimizer_state}
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
            **kept,
        )
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _write_safetensors(source: Path, target: Path, weights: Weights, run: RunConfig) -> None:
    from safetensors.torch import save_file

    values = run.model_dump(mode="json") | {"model": weights.config.model_dump(mode="json")}
    description = {
        "model": weights.config.model_dump(mode="json"),
        "datasets": weights.datasets,
        "multi_label": list(weights.multi_label),
        "class_names": weights.class_names,
        "run": values,
        "source": str(source if source.suffix == ".pyth" else locate(source)),
    }
    text = json.dumps(description, ensure_ascii=False)
    state = {name: tensor.contiguous() for name, tensor in weights.state.items()}
    _replace(target, lambda temporary: save_file(state, temporary, metadata={HEADER: text}))
    beside = target.parent / "config.json"
    if not beside.exists():  # for people and other tools; the file's own header is what is read
        _replace(beside, lambda path: path.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n"))


def _replace(path: Path, write: Any) -> None:
    """Calls `write` with a temporary path and renames the result to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["Converted", "convert"]
