"""MultiTrain: one video transformer trained jointly on several action-recognition datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from multitrain.evaluation.predictor import Predictor


def load(path: str) -> Predictor:
    """The model stored at `path`, on the CPU in eval mode.

    Args:
        path: a published `.pyth` file, a run's folder, a checkpoint's folder, or a `.safetensors` file of ours.

    Raises:
        ConfigError: when `path` is none of these; the message says what was found there.
    """
    from multitrain.evaluation.predictor import load as load_predictor

    return load_predictor(path)


__all__ = ["__version__", "load"]
