"""MultiTrain: one video transformer trained jointly on several action-recognition datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from multitrain.evaluation.predictor import Predictor


def load(path: str | Path, *, strict: bool = True, frames: int | None = None, crop: int | None = None) -> Predictor:
    """The model stored at `path`, on the CPU in eval mode. Its `report` says what became of every tensor of the file.

    Args:
        path: a published `.pyth` file, a run's folder, a checkpoint's folder, or a `.safetensors` file of ours.
        strict: refuse weights that are not exactly those of their model; otherwise missing ones are fresh, with a warning.
        frames, crop: size of the clips to be given, when another than the file's: position tables are interpolated.

    Raises:
        ConfigError: when `path` is none of these; the message says what was found there.
    """
    from multitrain.evaluation.predictor import load as load_predictor

    return load_predictor(path, strict=strict, frames=frames, crop=crop)


__all__ = ["__version__", "load"]
