"""RandAugment with Pillow: the reference implementation, bit-exact per operation with the published images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from multitrain.data.randaugment import FILL, Operation, affine

_ENHANCERS = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}


def apply(frames: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """Apply the operations in order to every frame of uint8 [T, H, W, 3]; the input is not changed."""
    return np.stack([apply_all(frame, operations) for frame in frames]) if operations else frames


def apply_all(frame: np.ndarray, operations: Sequence[Operation]) -> np.ndarray:
    """Apply the operations in order to one frame, uint8 [H, W, 3]; the input is not changed."""
    if not operations:
        return frame
    image = Image.fromarray(frame)
    for op in operations:
        image = apply_one(image, op)
    return np.asarray(image)


def apply_one(image: Image.Image, op: Operation) -> Image.Image:
    """Apply one operation to one RGB image."""
    fill = (FILL, FILL, FILL)
    if op.name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if op.name == "Equalize":
        return ImageOps.equalize(image)
    if op.name == "Invert":
        return ImageOps.invert(image)
    if op.name == "Posterize":  # by hand: newer Pillow versions reject 0 bits, which the largest magnitude gives
        mask = ~((1 << (8 - int(op.argument))) - 1)
        return image.point([v & mask for v in range(256)] * 3)
    if op.name == "Solarize":
        return ImageOps.solarize(image, int(op.argument))
    if op.name == "SolarizeAdd":
        table = [min(255, v + int(op.argument)) if v < 128 else v for v in range(256)]
        return image.point(table * 3)
    if op.name in _ENHANCERS:
        return _ENHANCERS[op.name](image).enhance(op.argument)
    if op.name == "Rotate":
        return image.rotate(op.argument, resample=Image.Resampling.BICUBIC, fillcolor=fill)
    matrix = affine(op, *image.size)
    if matrix is None:
        raise ValueError(f"unknown operation {op.name!r}")
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )
