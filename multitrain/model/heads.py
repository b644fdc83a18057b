"""From clip features to logits: one head per dataset, and one projection per ordered pair of datasets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multitrain.config import ConfigError
from multitrain.model.low_precision import Linear, linear
from multitrain.model.random import KeyedDropout, stream_of


def escape(name: str) -> str:
    """A dataset's name as a module name; percent-encodes what torch does not accept ("." and names of module attributes).

    Raises:
        ConfigError: the name is empty, or contains "/", which other places use as a separator.
    """
    if not name or "/" in name:
        raise ConfigError(f"{name!r} cannot name a dataset; use at least one character and no '/'")
    escaped = name.replace("%", "%25").replace(".", "%2E")
    if escaped in dir(_ByDataset(())):
        escaped = "".join(f"%{byte:02X}" for byte in escaped[0].encode()) + escaped[1:]
    return escaped


def unescape(name: str) -> str:
    """The dataset's name, given a module name; the inverse of `escape`."""
    return unquote(name)


class MlpHead(nn.Module):
    """Linear → GELU → dropout → linear, with `dropout_logits` followed by dropout, as in the published code."""

    def __init__(self, dim: int, hidden: int, classes: int, dropout: float, dropout_logits: bool, name: str) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, classes)
        self.dropout = KeyedDropout(dropout, stream_of(f"heads.{name}.hidden"))
        self.dropout_logits = KeyedDropout(dropout if dropout_logits else 0.0, stream_of(f"heads.{name}.logits"))

    def forward(self, features: Tensor, keys: Tensor | None = None) -> Tensor:
        """features [B, dim], keys int64 [B] or None -> logits [B, classes]."""
        return self.logits(F.gelu(self.fc1(features)), keys)

    def logits(self, hidden: Tensor, keys: Tensor | None) -> Tensor:
        """Dropout and the second linear layer: activated hidden layer [B, hidden] -> logits [B, classes]."""
        return self.dropout_logits(self.fc2(self.dropout(hidden, keys)), keys)


class LinearHead(Linear):
    """Dropout → linear."""

    def __init__(self, dim: int, classes: int, dropout: float, name: str) -> None:
        super().__init__(dim, classes)
        self.dropout = KeyedDropout(dropout, stream_of(f"heads.{name}.features"))

    def forward(self, features: Tensor, keys: Tensor | None = None) -> Tensor:
        """features [B, dim], keys int64 [B] or None -> logits [B, classes]."""
        return super().forward(self.dropout(features, keys))


class _ByDataset(nn.ModuleDict):
    """Modules by dataset name; the names may contain any character but "/"."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__({escape(name): module for name, module in modules})

    def of(self, name: str) -> Any:
        """The module of the dataset called `name`."""
        return self[escape(name)]


class Heads(_ByDataset):
    """One head per dataset; every head is applied to every clip."""


class Projections(_ByDataset):
    """One linear layer W_ab without bias per ordered pair a ≠ b of datasets: `projections.<a>.<b>.weight` [K_b, K_a]."""

    def __init__(self, datasets: dict[str, int]) -> None:
        super().__init__(
            (a, _ByDataset((b, Linear(datasets[a], datasets[b], bias=False)) for b in datasets if b != a))
            for a in datasets
        )

    def forward(self, logits: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """ẑ_ab = W_ab z_a: logits [B, K_a] by dataset -> projected logits [B, K_b] by (source a, target b); one product per source."""
        joint: dict[tuple[str, str], Tensor] = {}
        for a, z in logits.items():
            others = [b for b in logits if b != a]
            weights = [self.of(a).of(b).weight for b in others]
            parts = linear(z, torch.cat(weights), None).split([len(w) for w in weights], -1)
            joint |= {(a, b): part for b, part in zip(others, parts)}
        return {(a, b): joint[a, b] for b in logits for a in logits if a != b}
