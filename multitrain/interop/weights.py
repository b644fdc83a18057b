"""Read weights from a published `.pyth`, a run, a checkpoint folder or a `.safetensors` file.

A run is a folder with ``config.yaml`` and ``checkpoints/``; the newest valid checkpoint is read. A
checkpoint is a folder with ``model.safetensors``, ``state.json`` and ``manifest.json``. The description of the model in a
`.safetensors` file is in its header (written by `multitrain convert`), or in ``config.json`` or ``state.json`` in the same folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from multitrain.config import ConfigError, ModelConfig, RunConfig, load, validate
from multitrain.config.boundary import understood
from multitrain.config.class_names import find_class_names, read_class_names
from multitrain.config.reading import LARGEST_JSON, parse_json, read_bytes, read_yaml
from multitrain.interop import protocol, pyslowfast
from multitrain.interop.archive import require_weights, select_weights
from multitrain.interop.config_from_pyslowfast import generic_run, published_datasets, published_run
from multitrain.interop.layout import layout, require_possible
from multitrain.interop.model_path import resolve_model_file
from multitrain.interop.state_dict_report import LoadReport, compare, require_all, shapes
from multitrain.text import printable

if TYPE_CHECKING:
    import torch

HEADER = "multitrain"
"""Key of the model's description, as JSON, in a `.safetensors` header."""


class Weights(NamedTuple):
    """A model's weights, and the values needed to build it."""

    config: ModelConfig
    datasets: dict[str, int]
    """Classes by dataset, in head order."""
    multi_label: tuple[str, ...]
    class_names: dict[str, list[str]]
    """Class names in label order, for the datasets whose names are known."""
    state: dict[str, torch.Tensor]
    """CPU tensors by MultiTrain's names."""
    report: LoadReport = LoadReport((), (), ())
    """The comparison of the file's tensors with the model's."""


def read_weights(path: str | Path, *, strict: bool = True) -> Weights:
    """Read the weights at `path`.

    Args:
        path: a file or folder.
        strict: whether the tensors must be exactly those of their model; if not, tensors that do not fit are left out and reported.

    Raises:
        ConfigError: the file is missing or damaged, holds another model, or contains NaN or infinities.
    """
    return read_model(path, strict=strict)[0]


def read_model(path: str | Path, *, strict: bool = True, copy: str | None = None) -> tuple[Weights, RunConfig]:
    """Read weights and configuration as :func:`read_weights` and :func:`run_config` do, but open and verify the file only once.

    Args:
        path, strict: see :func:`read_weights`.
        copy: the set of weights to take: see :func:`multitrain.interop.archive.open_archive`.

    Raises:
        ConfigError: see :func:`read_weights` and :func:`run_config`.
    """
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        file = pyslowfast.read_published(path, strict=strict, copy=copy)
        run = published_run(file, path)
        return _of_published(file, run), run
    model_file = resolve_model_file(path)
    return _of_safetensors(model_file, strict=strict, copy=copy), _stored_run(model_file)


def run_config(path: str | Path) -> RunConfig:
    """Read the configuration that belongs to the weights at `path`: network, datasets, how clips are read.

    Runs, checkpoints and converted files store it. For a `.pyth` file it is composed from the file's YAML text and the
    shipped configuration of each dataset that the project ships.

    Raises:
        ConfigError: no configuration is stored there.
    """
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        return published_run(pyslowfast.read_published(path), path)
    return _stored_run(resolve_model_file(path))


def read_description(model_file: Path) -> dict[str, Any]:
    """Read the model description of a `.safetensors` file: from its header, else config.json, else a checkpoint's state.json.

    Raises:
        ConfigError: the file is damaged or incomplete, or has no description.
    """
    from safetensors import safe_open

    with (
        understood(f"{model_file}: not a whole .safetensors file", "copy or write it again"),
        safe_open(model_file, framework="pt") as file,
    ):
        header = (file.metadata() or {}).get(HEADER)
    beside = (model_file.parent / n for n in (f"{model_file.stem}.json", "config.json", "state.json"))
    texts = [(header, f"{model_file}: its description")] if header else []
    texts += [(read_bytes(file, LARGEST_JSON), str(file)) for file in beside if file.is_file()]
    for text, where in texts:
        found = parse_json(text, where)
        if isinstance(found, dict) and "model" in found and "datasets" in found:
            return found
    raise ConfigError(
        f'{model_file}: no description of its model; put config.json beside it with "model" and "datasets", or convert it again'
    )


def _of_published(file: pyslowfast.PublishedCheckpoint, run: RunConfig) -> Weights:
    names = _find_names(file, run)
    return Weights(file.config, file.datasets, file.multi_label, names, file.state, file.report)


def _of_safetensors(model_file: Path, *, strict: bool, copy: str | None) -> Weights:
    found = _from_description(model_file)
    state = _read_safetensors(model_file)
    notes: tuple[str, ...] = ()
    if copy is not None or not found.config.own_backbone:  # whose tensors have a prefix that other files' sets have too
        state, notes = select_weights(model_file, state, copy)
    require_possible(model_file, found.config, found.datasets, len(state))
    with understood(f"{model_file}: describes no network", "write it again with `multitrain convert`"):
        report = compare(shapes(state), layout(found.config, found.datasets))
    if strict:
        where = f"{model_file}: its tensors are not those of the model that it describes"
        require_all(report, where, "write it again with `multitrain convert`")
    kept = {name: state[name] for name in report.matched}
    require_weights(model_file, kept)
    return found._replace(state=kept, report=replace(report, notes=notes))


def _stored_run(model_file: Path) -> RunConfig:
    header = read_description(model_file)
    if isinstance(header.get("run"), dict):
        with understood(
            f"{model_file}: the configuration in it cannot be used", "write it again with `multitrain convert`"
        ):
            return validate(header["run"])
    for folder in (model_file.parent, model_file.parent.parent.parent):
        if (folder / "config.yaml").is_file():
            return load(folder / "config.yaml")
    found = _from_description(model_file)
    return generic_run(found.config, found.datasets, found.multi_label)


def _from_description(model_file: Path) -> Weights:
    found = read_description(model_file)
    with understood(f"{model_file}: the description of its model is wrong", "write it again with `multitrain convert`"):
        config = ModelConfig.model_validate(found["model"])
        datasets = {str(name): int(classes) for name, classes in found["datasets"].items()}
        names = {str(d): [printable(str(n)) for n in v] for d, v in (found.get("class_names") or {}).items() if v}
        multi_label = tuple(str(name) for name in found.get("multi_label") or ())
    names = {name: listed for name, listed in names.items() if len(listed) == datasets.get(name)}
    for name, settings in _stored_datasets(model_file, found).items():
        if name in datasets and name not in names and (read := read_names(settings, datasets[name])):
            names[name] = read
    return Weights(config, datasets, multi_label, names, {})


def _stored_datasets(model_file: Path, found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Dataset settings of the run that produced the weights, as plain mappings; empty if they are not stored."""
    run = found.get("run")
    file = model_file.parent / "config.yaml"
    if run is None and file.is_file():
        run = read_yaml(file)
    try:
        entries: dict[str, Any] = run["data"]["datasets"]  # type: ignore[index]
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    except (AttributeError, KeyError, TypeError):
        return {}


def read_names(settings: Mapping[str, Any], classes: int) -> list[str] | None:
    """Read a dataset's class names from its `class_names` file, else from a file in its annotation folder.

    None if there is no such file or it does not have `classes` names; see :mod:`multitrain.config.class_names`.
    """
    folder, given = Path(str(settings.get("annotations") or ".")), settings.get("class_names")
    for file in [Path(str(given)), folder / str(given)] if given else []:
        if _is_file(file):
            try:
                names = read_class_names(file)
            except ConfigError:  # names are for display only; the display falls back to numbers
                return None
            return names if len(names) == classes else None
    try:
        return find_class_names(folder, classes)
    except (OSError, ValueError):  # another user's folder, or an invalid path
        return None


def _is_file(path: Path) -> bool:
    """Whether `path` is a file; False where the user may not look."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # another user's folder, or an invalid path
        return False


def _read_safetensors(model_file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with understood(f"{model_file}: cannot be read", "copy or write it again"):
        return load_file(model_file)


def _find_names(file: pyslowfast.PublishedCheckpoint, run: RunConfig) -> dict[str, list[str]]:
    """Class names by dataset: those in the file, else from the annotation folders of its cfg, else of the shipped datasets."""
    _, kept = protocol.read(file.extras.get(protocol.KEY), Path("the file"))
    found = {name: names for name, names in kept.items() if len(names) == file.datasets.get(name)}
    own = published_datasets(file.settings, file.datasets)
    for name, classes in file.datasets.items():
        if name in found:
            continue
        sources = (own[name], run.data.datasets[name].model_dump())
        names = next((n for model_file in sources if (n := read_names(model_file, classes))), None)
        if names:
            found[name] = names
    return found


__all__ = ["HEADER", "Weights", "read_description", "read_model", "read_names", "read_weights", "run_config"]
