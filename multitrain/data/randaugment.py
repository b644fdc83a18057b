"""RandAugment's policy: draws the operations of a clip and their arguments (Cubuk et al., 2020, in the notation of timm).

Two backends apply the operations: `randaugment_pil`, bit-exact with the published images, and `randaugment_opencv`,
several times faster.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from multitrain.config import ConfigError
from multitrain.data.random import KeyedRNG

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
"""Each layer draws one of these, uniformly and with replacement."""

FILL = 128
"""Grey level that geometric operations use outside the frame."""

_LAYER_PROBABILITY = 0.5
_TOP = 10.0


@dataclass(frozen=True)
class Operation:
    """One operation with its argument.

    argument: Rotate: degrees counter-clockwise. Posterize: bits kept. Solarize: threshold. SolarizeAdd: grey levels.
    Color, Contrast, Brightness, Sharpness: enhancement factor (1 changes nothing). ShearX, ShearY: pixels per pixel.
    TranslateX, TranslateY: fraction of the width or height. AutoContrast, Equalize, Invert: none (0).
    """

    name: str
    argument: float = 0.0


@dataclass(frozen=True)
class Policy:
    """RandAugment's hyperparameters."""

    magnitude: float = _TOP
    """Mean magnitude, 0 to 10 (m)."""
    layers: int = 2
    """Operations drawn per clip (n); each is applied with probability 1/2."""
    magnitude_std: float = 0.0
    """Standard deviation of the magnitude, which is drawn for each operation and clipped to 0 … 10 (mstd)."""
    increasing: bool = False
    """Whether a larger magnitude is always a stronger change (inc1)."""


def parse_policy(notation: str) -> Policy:
    """Parse a policy such as ``rand-m7-n4-mstd0.5-inc1``; omitted parts have the defaults of `Policy`.

    Raises:
        ConfigError: the notation is invalid.
    """
    head, *settings = notation.split("-")
    found: dict[str, float] = {}
    for setting in settings:
        match = re.fullmatch(r"(m|n|mstd|inc)(\d+(?:\.\d+)?)", setting)
        if match is None:
            break
        found[match[1]] = float(match[2])
    if head != "rand" or len(found) != len(settings) or found.get("n", 0.0) % 1:
        raise ConfigError(f"augment.randaugment={notation!r} is not RandAugment notation; e.g. rand-m7-n4-mstd0.5-inc1")
    default = Policy()
    return Policy(
        magnitude=found.get("m", default.magnitude),
        layers=int(found.get("n", default.layers)),
        magnitude_std=found.get("mstd", default.magnitude_std),
        increasing=bool(found.get("inc", default.increasing)),
    )


def draw_operations(policy: Policy, draws: KeyedRNG) -> list[Operation]:
    """Draw the operations of one clip, in order; all its frames get the same ones."""
    drawn = []
    for _ in range(policy.layers):
        name = OPERATIONS[draws.integer(0, len(OPERATIONS) - 1)]
        if not draws.coin(_LAYER_PROBABILITY):
            continue
        magnitude = draws.normal(policy.magnitude, policy.magnitude_std)
        sign = -1.0 if draws.coin(0.5) else 1.0
        drawn.append(operation(name, min(max(magnitude, 0.0), _TOP), sign, increasing=policy.increasing))
    return drawn


def operation(name: str, magnitude: float, sign: float, *, increasing: bool) -> Operation:
    """The operation at a magnitude from 0 to 10; `sign` is used by operations with two directions."""
    level = magnitude / _TOP
    if name in ("AutoContrast", "Equalize", "Invert"):
        return Operation(name)
    if name == "Rotate":
        return Operation(name, sign * level * 30.0)
    if name in ("ShearX", "ShearY"):
        return Operation(name, sign * level * 0.3)
    if name in ("TranslateX", "TranslateY"):
        return Operation(name, sign * level * 0.45)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return Operation(name, 1.0 + sign * level * 0.9 if increasing else level * 1.8 + 0.1)
    if name == "SolarizeAdd":
        return Operation(name, int(level * 110))
    if name == "Posterize":
        bits = int(level * 4)
        return Operation(name, 4 - bits if increasing else bits)
    if name == "Solarize":
        threshold = int(level * 256)
        return Operation(name, 256 - threshold if increasing else threshold)
    raise ValueError(f"unknown operation {name!r}")


def affine(op: Operation, width: int, height: int) -> tuple[float, float, float, float, float, float] | None:
    """The affine map of a geometric operation, or None for other operations.

    (a, b, c, d, e, f) maps the output point (x, y) to the input point (ax + by + c, dx + ey + f). Coordinates refer to
    pixel corners: the centre of the first pixel is (0.5, 0.5).
    """
    if op.name == "ShearX":
        return (1.0, op.argument, 0.0, 0.0, 1.0, 0.0)
    if op.name == "ShearY":
        return (1.0, 0.0, 0.0, op.argument, 1.0, 0.0)
    if op.name == "TranslateX":
        return (1.0, 0.0, op.argument * width, 0.0, 1.0, 0.0)
    if op.name == "TranslateY":
        return (1.0, 0.0, 0.0, 0.0, 1.0, op.argument * height)
    if op.name == "Rotate":
        angle = -math.radians(op.argument)
        a, b = math.cos(angle), math.sin(angle)
        x, y = width / 2.0, height / 2.0
        return (a, b, x - a * x - b * y, -b, a, y + b * x - a * y)
    return None
