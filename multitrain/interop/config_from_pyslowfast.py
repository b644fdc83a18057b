"""Run configurations for weights without a MultiTrain configuration: from the published cfg text and the shipped datasets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from multitrain.config import ModelConfig, RunConfig, compose, validate
from multitrain.config.boundary import understood
from multitrain.interop import protocol
from multitrain.interop.pyslowfast import PublishedCheckpoint


def published_run(file: PublishedCheckpoint, path: Path) -> RunConfig:
    """The run configuration of a `.pyth` file, from its YAML text and the options that `multitrain convert` stored in it.

    Raises:
        ConfigError: an option has a type that the published code does not write.
    """
    cfg = file.settings
    own, _ = protocol.read(file.extras.get(protocol.KEY), path)
    with understood(
        f"{path}: its cfg has values of other kinds than such options", "use the cfg that the training code wrote"
    ):
        entries = published_datasets(cfg, file.datasets)
        for name, entry in entries.items():
            entry |= protocol.read_options(cfg, name)
            entry["multi_label"] = name in file.multi_label
        data = cfg.get("DATA", {})
        reading = {"sampling_rate": data.get("SAMPLING_RATE", 3), "target_fps": data.get("TARGET_FPS", 30)}
        run = _compose_run(file.config, entries, reading, own)
        return run if own else _with_short_side(run, int((data.get("TRAIN_JITTER_SCALES") or [256])[0]))


def published_datasets(cfg: Mapping[str, Any], datasets: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Annotation folder, video folder and class count by dataset, from the YAML text of a `.pyth` file."""
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


def _with_short_side(run: RunConfig, short_side: int) -> RunConfig:
    """`run` with the published code's short side for single-crop tests, which does not depend on the crop size."""
    if round(run.model.crop * 256 / 224) == short_side:
        return run
    values = run.model_dump(mode="json")
    for dataset in values["data"]["datasets"].values():
        if dataset["sampling"] == "stride" and dataset["spatial_views"] == 1 and dataset["test_short_side"] is None:
            dataset["test_short_side"] = short_side
    return validate(values)


def generic_run(model: ModelConfig, classes_of: Mapping[str, int], multi_label: Collection[str]) -> RunConfig:
    """The default configuration for this network and these datasets."""
    entries: dict[str, dict[str, Any]] = {
        name: {
            "annotations": f"datasets/{name}",
            "videos": f"datasets/{name}/videos",
            "classes": classes,
            "multi_label": name in multi_label,
        }
        for name, classes in classes_of.items()
    }
    return _compose_run(model, entries, {}, {})


def _compose_run(
    model: ModelConfig,
    entries: Mapping[str, Mapping[str, Any]],
    reading: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]],
) -> RunConfig:
    """The default configuration with this network and these datasets; uses a shipped dataset if name and class count agree.

    Args:
        entries: settings by dataset.
        reading: settings of ``data`` for all datasets.
        own: settings by dataset that take precedence over the shipped ones.
    """
    shipped = compose()
    known = shipped.data.datasets
    datasets = {}
    for name, entry in entries.items():
        settings = dict(entry)
        if name in known and known[name].classes == entry["classes"]:
            settings = known[name].model_dump(mode="json") | {
                "separator": entry.get("separator", known[name].separator)
            }
        datasets[name] = settings | dict(own.get(name, {}))
    values = shipped.model_dump(mode="json")
    values["model"] = model.model_dump(mode="json")
    values["data"] |= {"datasets": datasets, **reading}
    values["augment"]["mix_probability"] = 0.0
    values["loss"] |= {"informative_weight": 0.0, "projection_weight": 0.0}
    return validate(values)


__all__ = ["generic_run", "published_datasets", "published_run"]
