"""Test protocols of a run's datasets in a `.pyth` file.

The published code tests every dataset with the same views and crops (``TEST.*``), takes the short side from
``DATA.TRAIN_JITTER_SCALES``, and derives sampling and mirroring from the dataset's name. A run sets each of these per dataset. A
converted file therefore has the published options of the first dataset, and the options of every dataset under a key that the
published loader ignores. `unsupported_protocols` lists the datasets that the published code would test differently.
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
"""Key of the options of all datasets in a `.pyth` file."""
OPTIONS = ("sampling", "flip", "temporal_views", "spatial_views", "test_short_side", "separator")
"""Options of a dataset that determine how its videos are read and tested."""
SEGMENTED = ("ssv2",)
"""Datasets whose frames the published code samples in segments and never mirrors."""


def describe(run: RunConfig, datasets: Sequence[str], class_names: Mapping[str, Sequence[str]]) -> str:
    """Options and class names of `datasets`, as JSON."""
    known = [name for name in datasets if name in run.data.datasets]
    reading = {name: run.data.datasets[name].model_dump(mode="json", include=set(OPTIONS)) for name in known}
    names = {name: list(class_names[name]) for name in datasets if name in class_names}
    return json.dumps({"datasets": reading, "class_names": names}, ensure_ascii=False)


def read(text: object, where: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Parse the text of :func:`describe`: (options by dataset, class names by dataset); empty for None.

    Raises:
        ConfigError: the text is damaged.
    """
    if text is None:
        return {}, {}
    with understood(f"{where}: its {KEY!r} part is wrong", "convert the run again"):
        found = parse_json(str(text), f"{where}: its {KEY!r} part")
        options = {str(n): {k: entry[k] for k in OPTIONS if k in entry} for n, entry in found["datasets"].items()}
        names = {str(n): [printable(str(name)) for name in listed] for n, listed in found["class_names"].items()}
    return options, names


def options_of(dataset: DatasetConfig, crop: int) -> dict[str, dict[str, Any]]:
    """The published options, by section, that reproduce a dataset's test protocol as far as they can express it."""
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
    """Options of a dataset, read from a published configuration; options that it does not set are left out."""
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


def unsupported_protocols(run: RunConfig, datasets: Sequence[str], crop: int) -> list[str]:
    """One line per dataset that the published code would read or test differently from this run."""
    known = {name: run.data.datasets[name] for name in datasets if name in run.data.datasets}
    if not known:
        return []
    first = next(iter(known.values()))
    return [
        f"{name}: the published code would test with {_format(other)} instead of {_format(own)}; "
        "its options hold one protocol for all datasets (multitrain reads each dataset's own back from the file)"
        for name, dataset in known.items()
        if (own := _protocol(dataset, crop)) != (other := _published_protocol(name, first, crop))
    ]


def _protocol(dataset: DatasetConfig, crop: int) -> dict[str, object]:
    return {
        "views": f"{dataset.temporal_views} × {dataset.spatial_views} views",
        "side": f"short side {dataset.short_side(crop)}",
        "sampling": f"{dataset.sampling} sampling",
        "flip": "mirroring in training" if dataset.flip else "no mirroring",
    }


def _published_protocol(name: str, first: DatasetConfig, crop: int) -> dict[str, object]:
    """The protocol that the published code applies to a dataset of that name, given the options written for `first`."""
    segmented = name.lower() in SEGMENTED
    side = crop if segmented or first.spatial_views > 1 else options_of(first, crop)["DATA"]["TRAIN_JITTER_SCALES"][0]
    read = {"sampling": "segment" if segmented else "stride", "flip": first.flip and not segmented}
    return _protocol(first.model_copy(update=read | {"test_short_side": side}), crop)


def _format(protocol: Mapping[str, object]) -> str:
    return ", ".join(str(value) for value in protocol.values())


__all__ = ["KEY", "describe", "options_of", "read", "read_options", "unsupported_protocols"]
