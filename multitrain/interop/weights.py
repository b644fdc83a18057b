"""Weights from anywhere a model can lie: a published `.pyth`, a run, a checkpoint folder, a `.safetensors` file.

A run is a folder with ``config.yaml`` and ``checkpoints/``; its newest checkpoint whose manifest fits is read. A
checkpoint is a folder with ``model.safetensors``, ``state.json`` and ``manifest.json``. A `.safetensors` file carries its
model's description in its header (written by `multitrain convert`), or has ``config.json`` or ``state.json`` beside it.
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
from multitrain.interop.archive import one_set, require_weights
from multitrain.interop.foreign_run import generic_run, published_datasets, published_run
from multitrain.interop.layout import layout, require_possible
from multitrain.interop.matching import Report, compare, require_all, shapes
from multitrain.interop.model_path import locate
from multitrain.text import printable

if TYPE_CHECKING:
    import torch

HEADER = "multitrain"
"""Key of a `.safetensors` header under which the model's description lies, as JSON."""


class Weights(NamedTuple):
    """A model's weights and what is needed to build it."""

    config: ModelConfig
    datasets: dict[str, int]
    """Classes by dataset, in head order."""
    multi_label: tuple[str, ...]
    class_names: dict[str, list[str]]
    """Names by label, for the datasets whose names are known."""
    state: dict[str, torch.Tensor]
    """CPU tensors by our names."""
    report: Report = Report((), (), ())
    """Which tensors of the file are those of its model."""


def read_weights(path: str | Path, *, strict: bool = True) -> Weights:
    """The weights at `path`.

    Args:
        path: a file or folder.
        strict: they must be exactly those of their model; otherwise what does not fit is left out, and reported.

    Raises:
        ConfigError: nothing there, damaged, not the weights of a model of ours, or NaN among them; one line with the remedy.
    """
    return read_model(path, strict=strict)[0]


def read_model(path: str | Path, *, strict: bool = True, copy: str | None = None) -> tuple[Weights, RunConfig]:
    """:func:`read_weights` and :func:`run_config` at once: what lies at `path` is opened and verified only once.

    Args:
        copy: of a file with several sets of weights, the one to take: see :func:`multitrain.interop.archive.open_archive`.
    """
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        file = pyslowfast.read_published(path, strict=strict, copy=copy)
        run = published_run(file, path)
        return _of_published(file, run), run
    place = locate(path)
    return _of_safetensors(place, strict=strict, copy=copy), _stored_run(place)


def run_config(path: str | Path) -> RunConfig:
    """The configuration that belongs to the weights at `path`: network, datasets, how clips are read.

    A run's, a checkpoint's and a converted file's own is stored with them. For a `.pyth` file it is put together from
    its YAML text and, for the datasets that this project ships an entry for, that entry.

    Raises:
        ConfigError: no configuration is stored there.
    """
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        return published_run(pyslowfast.read_published(path), path)
    return _stored_run(locate(path))


def description(place: Path) -> dict[str, Any]:
    """What the model in a `.safetensors` file is: from the file's header, else config.json, else a checkpoint's state.json.

    Raises:
        ConfigError: not a whole file, or no description of it.
    """
    from safetensors import safe_open

    with (
        understood(f"{place}: not a whole .safetensors file", "copy or write it again"),
        safe_open(place, framework="pt") as file,
    ):
        header = (file.metadata() or {}).get(HEADER)
    beside = (place.parent / n for n in (f"{place.stem}.json", "config.json", "state.json"))
    texts = [(header, f"{place}: its description")] if header else []
    texts += [(read_bytes(file, LARGEST_JSON), str(file)) for file in beside if file.is_file()]
    for text, where in texts:
        found = parse_json(text, where)
        if isinstance(found, dict) and "model" in found and "datasets" in found:
            return found
    raise ConfigError(
        f'{place}: no description of its model; put config.json beside it with "model" and "datasets", or convert it again'
    )


def _of_published(file: pyslowfast.Published, run: RunConfig) -> Weights:
    names = _names_beside(file, run)
    return Weights(file.config, file.datasets, file.multi_label, names, file.state, file.report)


def _of_safetensors(place: Path, *, strict: bool, copy: str | None) -> Weights:
    found = _described(place)
    state, notes = one_set(place, _read_safetensors(place), copy)
    require_possible(place, found.config, found.datasets, len(state))
    with understood(f"{place}: describes no network", "write it again with `multitrain convert`"):
        report = compare(shapes(state), layout(found.config, found.datasets))
    if strict:
        where = f"{place}: its tensors are not those of the model that it describes"
        require_all(report, where, "write it again with `multitrain convert`")
    kept = {name: state[name] for name in report.matched}
    require_weights(place, kept)
    return found._replace(state=kept, report=replace(report, notes=notes))


def _stored_run(place: Path) -> RunConfig:
    header = description(place)
    if isinstance(header.get("run"), dict):
        with understood(f"{place}: the configuration in it cannot be used", "write it again with `multitrain convert`"):
            return validate(header["run"])
    for folder in (place.parent, place.parent.parent.parent):
        if (folder / "config.yaml").is_file():
            return load(folder / "config.yaml")
    found = _described(place)
    return generic_run(found.config, found.datasets, found.multi_label)


def _described(place: Path) -> Weights:
    found = description(place)
    with understood(f"{place}: the description of its model is wrong", "write it again with `multitrain convert`"):
        config = ModelConfig.model_validate(found["model"])
        datasets = {str(name): int(classes) for name, classes in found["datasets"].items()}
        names = {str(d): [printable(str(n)) for n in v] for d, v in (found.get("class_names") or {}).items() if v}
        multi_label = tuple(str(name) for name in found.get("multi_label") or ())
    names = {name: listed for name, listed in names.items() if len(listed) == datasets.get(name)}
    for name, settings in _stored_datasets(place, found).items():
        if name in datasets and name not in names and (read := read_names(settings, datasets[name])):
            names[name] = read
    return Weights(config, datasets, multi_label, names, {})


def _stored_datasets(place: Path, found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Dataset settings of the run that the weights come from, as plain mappings; empty when not stored."""
    run = found.get("run")
    file = place.parent / "config.yaml"
    if run is None and file.is_file():
        run = read_yaml(file)
    try:
        entries: dict[str, Any] = run["data"]["datasets"]  # type: ignore[index]
        return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    except (AttributeError, KeyError, TypeError):
        return {}


def read_names(settings: Mapping[str, Any], classes: int) -> list[str] | None:
    """Class names of a dataset from its `class_names` file, else from a file in its annotation folder.

    None when there is no such file, or when it does not have `classes` names; see :mod:`multitrain.config.class_names`.
    """
    folder, given = Path(str(settings.get("annotations") or ".")), settings.get("class_names")
    for file in [Path(str(given)), folder / str(given)] if given else []:
        if _is_file(file):
            try:
                names = read_class_names(file)
            except ConfigError:  # names are for display; numbers do as well
                return None
            return names if len(names) == classes else None
    try:
        return find_class_names(folder, classes)
    except (OSError, ValueError):  # another user's folder; a name that is none
        return None


def _is_file(path: Path) -> bool:
    """Whether a file is there and may be looked at."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # another user's folder; a name that is none
        return False


def _read_safetensors(place: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with understood(f"{place}: cannot be read", "copy or write it again"):
        return load_file(place)


def _names_beside(file: pyslowfast.Published, run: RunConfig) -> dict[str, list[str]]:
    """Names that lie in the file, else from the annotation folders of its own text, else from those of the shipped entries."""
    _, kept = protocol.read(file.extras.get(protocol.KEY), Path("the file"))
    found = {name: names for name, names in kept.items() if len(names) == file.datasets.get(name)}
    own = published_datasets(file.settings, file.datasets)
    for name, classes in file.datasets.items():
        if name in found:
            continue
        places = (own[name], run.data.datasets[name].model_dump())
        names = next((n for place in places if (n := read_names(place, classes))), None)
        if names:
            found[name] = names
    return found


__all__ = ["HEADER", "Weights", "description", "read_model", "read_names", "read_weights", "run_config"]
