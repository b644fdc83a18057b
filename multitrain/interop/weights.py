"""Weights from anywhere a model can lie: a published `.pyth`, a run, a checkpoint folder, a `.safetensors` file.

A run is a folder with ``config.yaml`` and ``checkpoints/``; its newest checkpoint whose manifest fits is read. A
checkpoint is a folder with ``model.safetensors``, ``state.json`` and ``manifest.json``. A `.safetensors` file carries its
model's description in its header (written by `multitrain convert`), or has ``config.json`` or ``state.json`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from multitrain.config import ConfigError, ModelConfig, RunConfig, load, validate
from multitrain.config.class_names import find_class_names, read_class_names
from multitrain.config.reading import parse_json, read_yaml
from multitrain.interop import pyslowfast
from multitrain.interop.foreign_run import generic_run, published_datasets, published_run
from multitrain.interop.layout import layout
from multitrain.interop.matching import Report, compare, require_all, shapes
from multitrain.interop.places import locate

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
        ConfigError: nothing there, damaged, or not the weights of a model of ours; one line with the remedy.
    """
    return read_model(path, strict=strict)[0]


def read_model(path: str | Path, *, strict: bool = True) -> tuple[Weights, RunConfig]:
    """:func:`read_weights` and :func:`run_config` at once: what lies at `path` is opened and verified only once."""
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        file = pyslowfast.read_published(path, strict=strict)
        run = published_run(file)
        return _of_published(file, run), run
    place = locate(path)
    return _of_safetensors(place, strict=strict), _stored_run(place)


def run_config(path: str | Path) -> RunConfig:
    """The configuration that belongs to the weights at `path`: network, datasets, how clips are read.

    A run's, a checkpoint's and a converted file's own is stored with them. For a `.pyth` file it is put together from
    its YAML text and, for the datasets that this project ships an entry for, that entry.

    Raises:
        ConfigError: no configuration is stored there.
    """
    path = Path(path)
    if path.suffix == ".pyth" and not path.is_dir():
        return published_run(pyslowfast.read_published(path))
    return _stored_run(locate(path))


def description(place: Path) -> dict[str, Any]:
    """What the model in a `.safetensors` file is: from the file's header, else config.json, else a checkpoint's state.json.

    Raises:
        ConfigError: not a whole file, or no description of it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{place}: not a whole .safetensors file ({' '.join(str(error).split())}); copy or write it again"
        ) from None
    texts = [header] if header else []
    texts += [
        (place.parent / n).read_text()
        for n in (f"{place.stem}.json", "config.json", "state.json")
        if (place.parent / n).is_file()
    ]
    for text in texts:
        found = parse_json(text, f"{place}: the description beside it")
        if isinstance(found, dict) and "model" in found and "datasets" in found:
            return found
    raise ConfigError(
        f'{place}: no description of its model; put config.json beside it with "model" and "datasets", or convert it again'
    )


def _of_published(file: pyslowfast.Published, run: RunConfig) -> Weights:
    names = _names_beside(file, run)
    return Weights(file.config, file.datasets, file.multi_label, names, file.state, file.report)


def _of_safetensors(place: Path, *, strict: bool) -> Weights:
    found = _described(place)
    state = _read_safetensors(place)
    report = compare(shapes(state), layout(found.config, found.datasets))
    if strict:
        where = f"{place}: its tensors are not those of the model that it describes"
        require_all(report, where, "write it again with `multitrain convert`")
    return found._replace(state={name: state[name] for name in report.matched}, report=report)


def _stored_run(place: Path) -> RunConfig:
    header = description(place)
    if isinstance(header.get("run"), dict):
        return validate(header["run"])
    for folder in (place.parent, place.parent.parent.parent):
        if (folder / "config.yaml").is_file():
            return load(folder / "config.yaml")
    found = _described(place)
    return generic_run(found.config, found.datasets, found.multi_label)


def _described(place: Path) -> Weights:
    found = description(place)
    try:
        config = ModelConfig.model_validate(found["model"])
        datasets = {str(name): int(classes) for name, classes in found["datasets"].items()}
    except (ValidationError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{place}: the description of its model is wrong ({' '.join(str(error).split())[:200]}); write it again"
        ) from None
    names = {str(d): [str(n) for n in v] for d, v in (found.get("class_names") or {}).items() if v}
    for name, settings in _stored_datasets(place, found).items():
        if name in datasets and name not in names and (read := read_names(settings, datasets[name])):
            names[name] = read
    return Weights(config, datasets, tuple(found.get("multi_label") or ()), names, {})


def _stored_datasets(place: Path, found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Dataset settings of the run that the weights come from, as plain mappings; empty when not stored."""
    run = found.get("run")
    file = place.parent / "config.yaml"
    if run is None and file.is_file():
        run = read_yaml(file)
    try:
        return dict(run["data"]["datasets"]) if run else {}
    except (KeyError, TypeError):
        return {}


def read_names(settings: Mapping[str, Any], classes: int) -> list[str] | None:
    """Class names of a dataset from its `class_names` file, else from a file in its annotation folder.

    None when there is no such file, or when it does not have `classes` names; see :mod:`multitrain.config.class_names`.
    """
    folder, given = Path(settings.get("annotations") or "."), settings.get("class_names")
    for file in [Path(given), folder / given] if given else []:
        if file.is_file():
            try:
                names = read_class_names(file)
            except ConfigError:  # names are for display; numbers do as well
                return None
            return names if len(names) == classes else None
    return find_class_names(folder, classes)


def _read_safetensors(place: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{place}: cannot be read ({' '.join(str(error).split())}); copy or write it again") from None


def _names_beside(file: pyslowfast.Published, run: RunConfig) -> dict[str, list[str]]:
    """Names from the annotation folders of the file's own text, else from those of the shipped entries."""
    found = {}
    own = published_datasets(file.settings, file.datasets)
    for name, classes in file.datasets.items():
        places = (own[name], run.data.datasets[name].model_dump())
        names = next((n for place in places if (n := read_names(place, classes))), None)
        if names:
            found[name] = names
    return found


__all__ = ["HEADER", "Weights", "description", "read_model", "read_names", "read_weights", "run_config"]
