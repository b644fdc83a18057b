"""Entry points of `torch.hub`: ``torch.hub.load("CHECKOUT", "multitrain", "model.safetensors", source="local")``."""

from __future__ import annotations

from typing import Any

dependencies = ["torch", "numpy", "av", "cv2", "hydra", "pydantic", "safetensors", "yaml"]


def multitrain(path: str, **options: Any) -> Any:
    """A trained model, on the CPU in eval mode.

    Args:
        path: what `multitrain.load` takes: a `.safetensors` or published `.pyth` file, a run's or checkpoint's folder; or
            the http(s) address of such a file, which is downloaded once to torch.hub's cache.
        options: of `multitrain.evaluation.predictor.load`: ``class_names`` {dataset: names or file}.
    """
    from multitrain.evaluation.predictor import load

    return load(_downloaded(path) if path.startswith(("http://", "https://")) else path, **options)


def _downloaded(address: str) -> str:
    """The file at an address, in torch.hub's cache; the address is part of its name, so that two are never confused."""
    import hashlib
    import os
    from urllib.parse import urlsplit

    import torch

    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    os.makedirs(folder, exist_ok=True)
    name = os.path.basename(urlsplit(address).path) or "model.safetensors"
    place = os.path.join(folder, f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}")
    if not os.path.exists(place):
        torch.hub.download_url_to_file(address, place)
    return place
