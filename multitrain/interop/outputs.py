"""Output folders of conversions and exports, in which a command replaces only files that it made itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError
from multitrain.config.reading import parse_json
from multitrain.files import OutputFolder
from multitrain.interop.model_path import MODEL_FILE
from multitrain.interop.training_state import KEY, optimizer_file
from multitrain.interop.weights import HEADER
from multitrain.records.checkpoints import sha256

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 100 << 20
"""Maximum bytes of a safetensors header; the format's own limit."""


def output_folder(root: Path, maker: str, names: Iterable[str]) -> OutputFolder:
    """`root` as a folder in which `maker`, ``convert`` or ``export``, may write the files `names`.

    Earlier versions of `maker` kept no record; their files are recognised by the description in them.

    Raises:
        ConfigError: one of the files exists, and `maker` did not make it, or it was changed since.
    """
    out = OutputFolder(root, maker)
    there = [name for name in names if os.path.lexists(out.root / name)]
    if not any(out.is_recorded(name) for name in there):
        for name in [name for name in there if _made_by_earlier_version(maker, out.root / name)]:
            out.adopt(name)
    for name in there:
        out.check(name)
    return out


def save_tensors(
    out: OutputFolder, name: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to the safetensors file `name`. Raises ConfigError as `OutputFolder.writing` does."""
    from safetensors.torch import save_file

    state = {tensor_name: _contiguous(tensor) for tensor_name, tensor in tensors.items()}
    with out.writing(name) as temporary:
        save_file(state, temporary, metadata=metadata)


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if it is a view: the format does not support shared memory."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.contiguous().clone()


def _made_by_earlier_version(maker: str, file: Path) -> bool:
    try:
        if file.is_symlink():
            return False
        if file.name in ("README.md", "class_names.json"):
            return maker == "export" and _made_by_earlier_version(maker, file.parent / MODEL_FILE)
        if file.suffix == ".json" and file.name != "manifest.json":
            return _is_made_by(maker, parse_json(file.read_bytes(), file))
        if file.suffix == ".safetensors" and (model := _model_of(file)) is not None:
            kept = json.loads(_metadata(model)[HEADER])[KEY]
            return maker == "convert" and bool(len(_header(file).keys() - {"__metadata__"}) == kept["tensors"])
        if file.suffix == ".safetensors":
            return _is_made_by(maker, json.loads(_metadata(file)[HEADER]))
        return maker == "convert" and _matches_manifest(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ConfigError):
        return False


def _is_made_by(maker: str, description: Any) -> bool:
    """Whether `maker` wrote this description: a conversion's has the key of the training state, an export's does not."""
    return {"model", "datasets"} <= set(description) and (KEY in description) == (maker == "convert")


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: its tensors by name, and optionally ``__metadata__``."""
    with open(file, "rb") as content:
        size = int.from_bytes(content.read(8), "little")
        return dict(json.loads(content.read(min(size, _MAX_HEADER_BYTES))))


def _metadata(file: Path) -> Any:
    return _header(file)["__metadata__"]


def _model_of(file: Path) -> Path | None:
    """The model file to which the optimizer file `file` belongs; None if `file` is a model itself."""
    if file.name == "optimizer.safetensors":
        return file.with_name(MODEL_FILE)
    model = file.with_name(file.name.removesuffix(".optimizer.safetensors") + ".safetensors")
    return model if file == optimizer_file(model) else None


def _matches_manifest(file: Path) -> bool:
    """Whether `file` matches the size and digest in its folder's manifest, and the folder was written by ``convert``."""
    found = parse_json((file.parent / "manifest.json").read_bytes(), file)["files"]
    listed = found if file.name == "manifest.json" else {file.name: found[file.name]}
    same = all(sha256(file.parent / name) == entry["sha256"] for name, entry in listed.items())
    return same and _is_made_by("convert", json.loads(_metadata(file.parent / MODEL_FILE)[HEADER]))


__all__ = ["output_folder", "save_tensors"]
