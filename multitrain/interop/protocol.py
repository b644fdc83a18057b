"""How a run's datasets are tested, beside the weights in a `.pyth` file: what the published options hold, and all of it.

The published code tests every dataset with the same views and crops (``TEST.*``), takes the short side from
``DATA.TRAIN_JITTER_SCALES``, and decides on sampling and mirroring by the dataset's name. A run sets each of them for each
dataset. So the options are written for the first dataset, every dataset's own under a key that the published loader does
not look at, and what the published code would do otherwise is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitrain.config import DatasetConfig, RunConfig
from multitrain.config.boundary import understood
from multitrain.config.reading import parse_json
from multitrain.text import printable

KEY = "multitrain"
"""Where it lies in a `.pyth` file."""
OPTIONS = ("sampling", "flip", "temporal_views", "spatial_views", "test_short_side", "separator")
"""Options of a dataset that decide how its videos are read and tested."""
SEGMENTED = ("ssv2",)
"""Datasets whose videos the published code reads in segments and never mirrors."""


def describe(run: RunConfig, datasets: Sequence[str], class_names: Mapping[str, Sequence[str]]) -> str:
    """Options and class names of `datasets`, as JSON."""
    known = [name for name in datasets if name in run.data.datasets]
    reading = {name: run.data.datasets[name].model_dump(mode="json", include=set(OPTIONS)) for name in known}
    names = {name: list(class_names[name]) for name in datasets if name in class_names}
    return json.dumps({"datasets": reading, "class_names": names}, ensure_ascii=False)


def read(text: object, where: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """What :func:`describe` wrote: options and class names by dataset; empty for a file without.

    Raises:
        ConfigError: damaged.
    """
    if text is None:
        return {}, {}
    with understood(f"{where}: its {KEY!r} part is wrong", "convert the run again"):
        found = parse_json(str(text), f"{where}: its {KEY!r} part")
        options = {str(n): {k: entry[k] for k in OPTIONS if k in entry} for n, entry in found["datasets"].items()}
        names = {str(n): [printable(str(name)) for name in listed] for n, listed in found["class_names"].items()}
    return options, names


def options_of(dataset: DatasetConfig, crop: int) -> dict[str, dict[str, Any]]:
    """The published options, by section, by which a dataset is tested as it is here, so far as they can say it."""
    side = dataset.model_copy(update={"sampling": "stride", "spatial_views": 1}).short_side(crop)
    return {
        "DATA": {
            "TRAIN_JITTER_SCALES": [side, round(side * 320 / 256)],
            "RANDOM_FLIP": dataset.flip,
            "PATH_LABEL_SEPARATOR": dataset.separator,
        },
        "TEST": {"NUM_ENSEMBLE_VIEWS": dataset.temporal_views, "NUM_SPATIAL_CROPS": dataset.spatial_views},
    }


def read_options(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options of a dataset that only a published configuration describes; what it does not say is left out."""
    data, test = cfg.get("DATA") or {}, cfg.get("TEST") or {}
    segmented = name.lower() in SEGMENTED
    said = {
        "temporal_views": test.get("NUM_ENSEMBLE_VIEWS"),
        "spatial_views": test.get("NUM_SPATIAL_CROPS") if test.get("NUM_SPATIAL_CROPS") in (1, 3) else None,
        "flip": False if segmented else data.get("RANDOM_FLIP"),
        "separator": data.get("PATH_LABEL_SEPARATOR") or None,
        "sampling": "segment" if segmented else None,
    }
    return {option: value for option, value in said.items() if value is not None}


def lost(run: RunConfig, datasets: Sequence[str], crop: int) -> list[str]:
    """One line a dataset that the published code would read or test otherwise than this run does."""
    known = {name: run.data.datasets[name] for name in datasets if name in run.data.datasets}
    if not known:
        return []
    first = next(iter(known.values()))
    return [
        f"{name}: the published code would test with {_shown(other)} instead of {_shown(own)}; "
        "its options hold one protocol for all datasets (multitrain reads each dataset's own back from the file)"
        for name, dataset in known.items()
        if (own := _protocol(dataset, crop)) != (other := _published(name, first, crop))
    ]


def _protocol(dataset: DatasetConfig, crop: int) -> dict[str, object]:
    return {
        "views": f"{dataset.temporal_views} × {dataset.spatial_views} views",
        "side": f"short side {dataset.short_side(crop)}",
        "sampling": f"{dataset.sampling} sampling",
        "flip": "mirroring in training" if dataset.flip else "no mirroring",
    }


def _published(name: str, first: DatasetConfig, crop: int) -> dict[str, object]:
    """What the published code does with a dataset of that name, given the options that are written for `first`."""
    segmented = name.lower() in SEGMENTED
    side = crop if segmented or first.spatial_views > 1 else options_of(first, crop)["DATA"]["TRAIN_JITTER_SCALES"][0]
    read = {"sampling": "segment" if segmented else "stride", "flip": first.flip and not segmented}
    return _protocol(first.model_copy(update=read | {"test_short_side": side}), crop)


def _shown(protocol: Mapping[str, object]) -> str:
    return ", ".join(str(value) for value in protocol.values())


__all__ = ["KEY", "describe", "lost", "options_of", "read", "read_options"]
