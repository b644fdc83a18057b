"""Read and check the results of a finished test (``metrics.json``). No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError
from multitrain.config.boundary import understood
from multitrain.config.reading import read_json
from multitrain.intervals import proportion
from multitrain.text import printable

FILE = "metrics.json"
MEASURES = ("top1", "top5", "map", "mean_class_accuracy")
"""Metrics in percent; None where a metric does not apply."""
MEASURE_NAMES = {"top1": "top-1", "top5": "top-5", "map": "mAP", "mean_class_accuracy": "mean class accuracy"}
_TEXTS = ("dataset", "head", "split", "precision", "weights")
_COUNTS = ("videos", "scored")


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results by dataset of the test in `folder`.

    Raises:
        ConfigError: there is no finished test, or the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: no {FILE}, so no finished evaluation; multitrain evaluate writes it")
    with understood(f"{file}: holds values that no test writes", "run `multitrain evaluate` again"):
        return {printable(str(name)): checked(result) for name, result in read_json(file)["datasets"].items()}


def checked(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one dataset, with values of the expected types. Raises ValueError, TypeError or KeyError."""
    out = dict(result)
    for key in MEASURES:
        if out.get(key) is not None:
            out[key] = float(out[key])
            if not math.isfinite(out[key]):
                raise ValueError(f"{key} is {out[key]}")
    out |= {key: printable(str(out[key])) for key in _TEXTS if key in out}
    out |= {key: int(out[key]) for key in _COUNTS if key in out}
    out["intervals"] = _intervals(out)
    out["views"] = [int(v) for v in out.get("views") or ()]
    names = out.get("class_names")
    out["class_names"] = [printable(str(name)) for name in names] if isinstance(names, list) else None
    out["unreadable"] = [dict(entry) for entry in out.get("unreadable") or ()]
    if "confusion" in out:
        out["confusion"] = [[int(t), int(p), int(n)] for t, p, n in out["confusion"]]
    return out


def _intervals(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The stored 95 % intervals in percent, by measure; for results of earlier versions those of the proportions."""
    stored = result.get("intervals")
    if stored is not None:
        return {m: [float(low), float(high)] for m in MEASURES if m in stored for low, high in [stored[m]]}
    scored = int(result.get("scored") or 0)
    known = {m: result[m] for m in ("top1", "top5") if result.get(m) is not None and 0 <= result[m] <= 100 and scored}
    return {m: [100 * end for end in proportion(round(share * scored / 100), scored)] for m, share in known.items()}
