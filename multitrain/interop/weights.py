"""Weights from anywhere a model can lie: a published `.pyth`, a run, a checkpoint folder, a `.safetensors` file.

A run is a folder with ``config.yaml`` and ``checkpoints/``; its newest checkpoint whose manifest fits is read. A
checkpoint is a folder with ``model.safetensors``, ``state.json`` and ``manifest.json``. A `.safetensors` file carries its
model's description in its header (written by `multitrain convert`), or has ``config.json`` or ``state.json`` beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from pydantic import ValidationError

from multitrain.config import ConfigError, DatasetConfig, ModelConfig, RunConfig, compose, load, validate
from multitrain.interop import pyslowfast
from multitrain.interop.matching import POSITIONS, Report, compare, listed, load_state, require_all, shapes, shown
from multitrain.interop.pyslowfast import layout

if TYPE_CHECKING:
    import torch

    from multitrain.model import MultiTrain

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


def read_weights(path: str | Path) -> Weights:
    """The weights at `path`, checked to be complete for their model.

    Raises:
        ConfigError: nothing there, damaged, or not the weights of a model of ours; one line with the remedy.
    """
    path = Path(path)
    if path.suffix == ".pyth":
        return _of_published(pyslowfast.read_published(path))
    return _of_safetensors(locate(path))


def read_model(path: str | Path) -> tuple[Weights, RunConfig]:
    """:func:`read_weights` and :func:`run_config` at once: what lies at `path` is opened and verified only once."""
    path = Path(path)
    if path.suffix == ".pyth":
        file = pyslowfast.read_published(path)
        return _of_published(file), _published_run(file)
    place = locate(path)
    return _of_safetensors(place), _stored_run(place)


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
    weights = read_weights(path)
    state, notes = weights.state, list(_unseen_differences(weights.config, model.config))
    report = compare(shapes(state), shapes(model.state_dict()))
    _require_same_backbone(path, report, weights.config)
    tables = [r for r in report.reshaped if r[0] in POSITIONS]
    if tables and not interpolate_positions:
        wanted = f"--frames {model.config.frames} --crop {model.config.crop}"
        raise ConfigError(
            f"{path}: position tables of another clip size ({'; '.join(shown(*r) for r in tables)}); "
            f"resize them first: multitrain convert {path} resized.safetensors {wanted}, then start from that"
        )
    if tables:
        state = resize_positions(state, weights.config, model.config.frames, model.config.crop)
        notes.extend(f"{name} interpolated from {list(a)} to {list(b)}" for name, a, b in tables)
        report = compare(shapes(state), shapes(model.state_dict()))
    load_state(model, state, strict=False, where=str(path))
    return Report(report.matched, report.missing, report.unexpected, report.reshaped, tuple(notes))


def resize_positions(
    state: Mapping[str, torch.Tensor], config: ModelConfig, frames: int, crop: int
) -> dict[str, torch.Tensor]:
    """`state` with position tables for clips of `frames` × `crop`²: bicubic in space, linear in time, corners not aligned.

    Args:
        state: tensors of a model of `config`; not changed.
        config: of the tables in `state`.
        frames, crop: of the tables returned.
    """
    from torch.nn import functional as F

    spatial, temporal = (state[name].float() for name in POSITIONS)
    old, new = config.crop // 4, crop // 4
    if new != old:
        grid = spatial.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        spatial = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).contiguous()
    if frames != config.frames:
        temporal = (
            F.interpolate(temporal.transpose(1, 2), size=frames // 2, mode="linear", align_corners=False)
            .transpose(1, 2)
            .contiguous()
        )
    changed = {name: t.to(state[name].dtype) for name, t in zip(POSITIONS, (spatial, temporal))}
    return {name: changed.get(name, tensor) for name, tensor in state.items()}


def run_config(path: str | Path) -> RunConfig:
    """The configuration that belongs to the weights at `path`: network, datasets, how clips are read.

    A run's, a checkpoint's and a converted file's own is stored with them. For a `.pyth` file it is put together from
    its YAML text and, for the datasets that this project ships an entry for, that entry.

    Raises:
        ConfigError: no configuration is stored there.
    """
    path = Path(path)
    if path.suffix == ".pyth":
        return _published_run(pyslowfast.read_published(path))
    return _stored_run(locate(path))


def locate(path: Path) -> Path:
    """The `.safetensors` file that `path` means: itself, a checkpoint folder's, or that of a run's newest whole checkpoint.

    Raises:
        ConfigError: there is none; the message says what was found and, for a damaged one, which is whole.
    """
    if path.name == "latest" and path.is_file() and not path.is_dir():
        path = path.parent / path.read_text().strip()
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; give a .pyth or .safetensors file, a run's folder or a checkpoint's folder"
        )
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path}: cannot hold a model; give a .pyth or .safetensors file, a run's folder or a checkpoint's folder"
        )
    return path


# -- folders ---------------------------------------------------------------------------------------------------------


def _in_folder(path: Path) -> Path:
    if path.name.startswith("update-"):
        reason = _damage(path)
        if reason:
            raise ConfigError(
                f"{path}: {reason}; use an older checkpoint of the run, or the run's folder to have the newest whole one found"
            )
        return path / "model.safetensors"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted((p for p in folder.glob("update-*") if p.is_dir()), reverse=True)
    damaged: list[str] = []
    for checkpoint in found:
        reason = _damage(checkpoint)
        if reason is None:
            return checkpoint / "model.safetensors"
        damaged.append(f"{checkpoint.name}: {reason}")
    if damaged:
        raise ConfigError(f"{path}: no checkpoint is whole ({listed(damaged, 2)}); restore one from a backup")
    files = sorted(p for p in path.iterdir() if p.suffix in (".pyth", ".safetensors"))
    hint = (
        f"it has {listed([p.name for p in files], 3)}: give that file"
        if files
        else "give a run's folder, a checkpoint's folder or a file"
    )
    raise ConfigError(f"{path}: holds no checkpoint (checkpoints/update-…); {hint}")


def _damage(folder: Path) -> str | None:
    """Why the checkpoint in `folder` is not whole, or None. Every file's size; hashes of what is read here."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
        for name in ("model.safetensors", "state.json"):
            if _sha256(folder / name) != files[name]["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__}: {error})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


# -- descriptions ----------------------------------------------------------------------------------------------------


def _of_published(file: pyslowfast.Published) -> Weights:
    names = _names_beside(file.settings, file.datasets)
    return Weights(file.config, file.datasets, file.multi_label, names, file.state)


def _of_safetensors(place: Path) -> Weights:
    found = _described(place)
    state = _read_safetensors(place)
    report = compare(shapes(state), layout(found.config, found.datasets))
    where = f"{place}: its tensors are not those of the model that it describes"
    require_all(report, where, "write it again with `multitrain convert`")
    return found._replace(state=state)


def _stored_run(place: Path) -> RunConfig:
    header = _description(place)
    if isinstance(header.get("run"), dict):
        return validate(header["run"])
    for folder in (place.parent, place.parent.parent.parent):
        if (folder / "config.yaml").is_file():
            return load(folder / "config.yaml")
    return _generic_run(_described(place))


def _description(place: Path) -> dict[str, Any]:
    """What the model in `place` is: from the file's header, else config.json, else a checkpoint's state.json."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{place}: not a whole .safetensors file ({' '.join(str(error).split())}); copy or write it again"
        ) from None
    texts = [header] if header else []
    texts += [(place.parent / n).read_text() for n in ("config.json", "state.json") if (place.parent / n).is_file()]
    for text in texts:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{place}: the description beside it is not JSON ({error}); write it again with `multitrain convert`"
            ) from None
        if isinstance(found, dict) and "model" in found and "datasets" in found:
            return found
    raise ConfigError(
        f'{place}: no description of its model; put config.json beside it with "model" and "datasets", or convert it again'
    )


def _described(place: Path) -> Weights:
    found = _description(place)
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
        run = yaml.safe_load(file.read_text())
    try:
        return dict(run["data"]["datasets"]) if run else {}
    except (KeyError, TypeError):
        return {}


def read_names(settings: Mapping[str, Any], classes: int) -> list[str] | None:
    """Class names of a dataset from its `class_names` file, else from `classes.txt` in its annotation folder.

    None when there is no such file, or when it does not have `classes` names.
    """
    folder, given = Path(settings.get("annotations") or "."), settings.get("class_names")
    for file in [*([Path(given), folder / given] if given else []), folder / "classes.txt"]:
        if file.is_file():
            try:
                names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
            except (OSError, UnicodeDecodeError):  # names are for display; numbers do as well
                return None
            return names if len(names) == classes else None
    return None


def _read_safetensors(place: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{place}: cannot be read ({' '.join(str(error).split())}); copy or write it again") from None


# -- run configurations for files of others ----------------------------------------------------------------------------


def _names_beside(cfg: Mapping[str, Any], datasets: Mapping[str, int]) -> dict[str, list[str]]:
    found = {}
    for name, settings in _published_datasets(cfg, datasets).items():
        names = read_names(settings, datasets[name])
        if names:
            found[name] = names
    return found


def _published_datasets(cfg: Mapping[str, Any], datasets: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Annotation and video folders as the YAML text of a `.pyth` has them, by dataset."""
    data, model = cfg.get("DATA", {}), cfg.get("MODEL", {})
    folders, prefixes = model.get("MULTI_PATH_TO_DATA_DIR") or [], model.get("MULTI_PATH_PREFIX") or []
    if len(datasets) == 1:
        folders, prefixes = [data.get("PATH_TO_DATA_DIR")], [data.get("PATH_PREFIX")]
    out: dict[str, dict[str, Any]] = {}
    for i, (name, classes) in enumerate(datasets.items()):
        folder = folders[i] if i < len(folders) else None
        prefix = prefixes[i] if i < len(prefixes) else None
        out[name] = {
            "annotations": folder or f"datasets/{name}",
            "videos": prefix or f"datasets/{name}/videos",
            "classes": classes,
        }
    return out


def _published_run(file: pyslowfast.Published) -> RunConfig:
    cfg = file.settings
    entries = _published_datasets(cfg, file.datasets)
    for name, entry in entries.items():
        entry["multi_label"] = name in file.multi_label
        entry["separator"] = cfg.get("DATA", {}).get("PATH_LABEL_SEPARATOR") or " "
    data = cfg.get("DATA", {})
    reading = {"sampling_rate": data.get("SAMPLING_RATE", 3), "target_fps": data.get("TARGET_FPS", 30)}
    run = _put_together(file.config, entries, reading)
    return _with_short_side(run, int((data.get("TRAIN_JITTER_SCALES") or [256])[0]))


def _with_short_side(run: RunConfig, short_side: int) -> RunConfig:
    """The published code's short side of single-crop tests, which does not follow the crop's size, where that matters."""
    if round(run.model.crop * 256 / 224) == short_side:
        return run
    values = run.model_dump(mode="json")
    for dataset in values["data"]["datasets"].values():
        if dataset["sampling"] == "stride" and dataset["spatial_views"] == 1 and dataset["test_short_side"] is None:
            dataset["test_short_side"] = short_side
    return validate(values)


def _generic_run(weights: Weights) -> RunConfig:
    entries: dict[str, dict[str, Any]] = {
        name: {
            "annotations": f"datasets/{name}",
            "videos": f"datasets/{name}/videos",
            "classes": classes,
            "multi_label": name in weights.multi_label,
        }
        for name, classes in weights.datasets.items()
    }
    return _put_together(weights.config, entries, {})


def _put_together(
    model: ModelConfig, entries: Mapping[str, Mapping[str, Any]], reading: Mapping[str, Any]
) -> RunConfig:
    """The shipped configuration with this network and these datasets; shipped entries where name and class count agree."""
    shipped = compose()
    known = shipped.data.datasets
    datasets = {
        name: known[name]
        if name in known and known[name].classes == entry["classes"]
        else DatasetConfig.model_validate(dict(entry))
        for name, entry in entries.items()
    }
    values = shipped.model_dump(mode="json")
    values["model"] = model.model_dump(mode="json")
    values["data"] |= {"datasets": {n: d.model_dump(mode="json") for n, d in datasets.items()}, **reading}
    values["augment"]["mix_probability"] = 0.0
    values["loss"] |= {"informative_weight": 0.0, "projection_weight": 0.0}
    return validate(values)


# -- differences -----------------------------------------------------------------------------------------------------


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


__all__ = [
    "HEADER",
    "Weights",
    "initialise_from",
    "locate",
    "read_model",
    "read_names",
    "read_weights",
    "resize_positions",
    "run_config",
]
