"""The stored values: what a CPU computes in fp64. python -m benchmarks.gpu_check.stored [tiny] [mvit_b] writes `stored/CASE.json`.

Write them anew only when the network, the loss or the case changed on purpose; `mvit_b` takes a few minutes and 5 GB on one core.
The values themselves rest on tests/model/test_golden.py, which compares the model with the published code.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.network import CASES, NO_GRADIENT, Found, network, sketch, step

FOLDER = Path(__file__).with_name("stored")
FLOOR = 1e-3
"""A gradient's error is taken relative to its own norm, or to this fraction of the largest gradient's if that is more."""


def load(case: str) -> dict[str, Any]:
    """The stored values of a case."""
    found: dict[str, Any] = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    return found


def errors(found: Found, stored: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(relative error of each loss term, relative L2 error of each output and gradient).

    Gradients that are truly zero are left out. A missing or further value has the error infinity.
    """
    terms = {n: abs(found.terms.get(n, math.nan) - v) / max(abs(v), 1e-3) for n, v in stored["terms"].items()}
    values = {}
    largest = {
        out: max(v["norm"] for n, v in stored["values"].items() if n.startswith("out.") == out) for out in (True, False)
    }
    for name in stored["values"].keys() | found.values.keys():
        if name.endswith(NO_GRADIENT):
            continue
        if name not in stored["values"] or name not in found.values:
            values[name] = math.inf
            continue
        held = stored["values"][name]
        apart = [a - b for a, b in zip(sketch(name, found.values[name]), held["sketch"])]
        distance = math.sqrt(sum(a * a for a in apart) / len(apart))
        values[name] = distance / max(held["norm"], FLOOR * largest[name.startswith("out.")])
    return terms, values


def total(errors: dict[str, float], stored: dict[str, Any]) -> float:
    """The relative L2 error of the whole gradient."""
    norms = {n: v["norm"] for n, v in stored["values"].items() if not n.startswith("out.") and n in errors}
    largest = max(norms.values())
    square = sum((errors[n] * max(norm, FLOOR * largest)) ** 2 for n, norm in norms.items())
    return math.sqrt(square / sum(norm**2 for norm in norms.values()))


def compute(name: str) -> dict[str, Any]:
    """The values of a case, by the CPU in fp64, with the checkpointing mode that takes the least memory."""
    case = CASES[name]
    found = step(network(case, "full").double(), case, "fp64", torch.device("cpu"))
    values = {n: {"norm": float(v.double().norm()), "sketch": sketch(n, v)} for n, v in found.values.items()}
    return {"case": name, "clips": case.clips, "terms": found.terms, "values": values} | _cost(name)


def _cost(name: str) -> dict[str, float]:
    from multitrain.model.cost import flops

    parameters, operations = flops(CASES[name].config, CASES[name].datasets)
    return {"parameters": parameters, "multiply_adds_per_clip": operations}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def main(names: list[str]) -> None:
    """Write the stored values of these cases."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or list(CASES):
        content = _rounded(compute(name))
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in content.pop("values").items()]
        head = json.dumps(content)[:-1]
        text = head + ', "values": {\n' + ",\n".join(lines) + "\n}}\n"
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}.json: {len(text) / 1e3:.0f} kB, loss {content['terms']['total']}")


if __name__ == "__main__":
    main(sys.argv[1:])
