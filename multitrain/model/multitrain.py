"""The model: backbone, one head per dataset, cross-dataset projections, expander (Liang et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multitrain.config import ConfigError, ModelConfig, nearest
from multitrain.model.backbone import Backbone
from multitrain.model.heads import Heads, LinearHead, MlpHead, Projections
from multitrain.model.initialisation import initialise
from multitrain.model.layers import Mlp, Recompute
from multitrain.model.low_precision import linear
from multitrain.model.mvit import MViT
from multitrain.model.mvitv2 import MViTv2
from multitrain.model.own_backbone import OwnBackbone
from multitrain.model.random import draw_keys

EXPANDER = "/"
"""Key of the expander's hidden layer; no dataset can have this name."""


@dataclass
class Outputs:
    """The model's outputs that the loss takes, for B clips."""

    features: Tensor
    """Pooled clip features [B, C]."""
    logits: dict[str, Tensor] = field(default_factory=dict)
    """By dataset: [B, K]."""
    projected: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """By (source, target): the source head's logits in the target's classes, [B, K_target]."""
    expanded: Tensor | None = None
    """The expander's output [B, C], the input of the informative loss; None for a model without an expander."""


class MultiTrain(Backbone):
    """A video network with one head per dataset; its class is a subclass that has the backbone of the configuration.

    The constructor applies the published initialisation with seed 0; `initialise` applies that of another seed.

    Args:
        config: the network.
        datasets: class count by dataset name, in head order.
        activation_checkpointing: what the backward pass recomputes: "none", "mlp", "selective" or "full".
        multi_label: datasets whose clips may have several labels; their probabilities are sigmoids.


    Raises:
        ConfigError: no dataset, a class count below 1, or `multi_label` naming an unknown dataset.
    """

    def __new__(cls, config: ModelConfig | None = None, *_: object, **__: object) -> MultiTrain:
        """An object of the subclass that has the backbone of `config`."""
        return super().__new__(cls if config is None else with_backbone(cls, config))

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """How copies are made: the subclass has no name by which it could be found."""
        base = next(kind for kind in type(self).__mro__ if not issubclass(kind, BACKBONES))
        return _blank, (base, self.config), self.__dict__

    def __init__(
        self,
        config: ModelConfig,
        datasets: dict[str, int],
        activation_checkpointing: Recompute = "none",
        multi_label: Collection[str] = (),
    ) -> None:
        _check(datasets, multi_label)
        super().__init__(config, activation_checkpointing)
        self.datasets = dict(datasets)
        self.multi_label = frozenset(multi_label)
        self.heads = Heads((name, self._head(name)) for name in datasets)
        self.projections = Projections(datasets) if config.projections and len(datasets) > 1 else None
        self.expander = Mlp(self.dim, config.expander_hidden, self.dim) if config.expander else None
        self.initialise(0)

    def _head(self, name: str) -> nn.Module:
        c, classes = self.config, self.datasets[name]
        if c.head == "linear":
            return LinearHead(self.dim, classes, c.head_dropout, name)
        return MlpHead(self.dim, c.head_hidden, classes, c.head_dropout, c.dropout_logits, name)

    def initialise(self, seed: int) -> None:
        """Reset every parameter to a pure function of its name and `seed`; a further head does not change the other parameters."""
        initialise(self, seed)
        self.reset_backbone(seed)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Probabilities by dataset, float [B, K], for normalised clips [B, 3, T, S, S]."""
        keys = self._keys(clips, None)
        features = self.features(clips, keys)
        logits = self._logits(features, self._hidden(features), keys)
        return {name: self.probabilities(name, z) for name, z in logits.items()}

    def probabilities(self, name: str, logits: Tensor) -> Tensor:
        """Softmax, or sigmoid for a multi-label dataset, in fp32 or better: [B, K] -> [B, K]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.sigmoid() if name in self.multi_label else logits.softmax(-1)

    def outputs(self, clips: Tensor, keys: Tensor | None = None) -> Outputs:
        """Everything the loss needs, for normalised clips [B, 3, T, S, S] and, in training, the clips' keys int64 [B]."""
        keys = self._keys(clips, keys)
        features = self.features(clips, keys)
        hidden = self._hidden(features)
        logits = self._logits(features, hidden, keys)
        projected = {} if self.projections is None else self.projections(logits)
        return Outputs(
            features, logits, projected, None if self.expander is None else self.expander.fc2(hidden[EXPANDER])
        )

    def embeddings(self, clips: Tensor, keys: Tensor | None = None) -> Tensor:
        """The expander's output [B, C] alone, equal to that of `outputs`; for the first pass of the informative loss.

        Raises:
            ConfigError: the model has no expander.
        """
        if self.expander is None:
            raise ConfigError("this model has no expander (model.expander=false), so there are no embeddings")
        expanded: Tensor = self.expander.fc2(self._hidden(self.features(clips, keys))[EXPANDER])
        return expanded

    def _hidden(self, features: Tensor) -> dict[str, Tensor]:
        """Activated hidden layers [B, ·] of all MLP heads, by dataset, and of the expander, by one matrix product."""
        layers = {name: head.fc1 for name in self.datasets if isinstance(head := self.heads.of(name), MlpHead)}
        if self.expander is not None:
            layers[EXPANDER] = self.expander.fc1
        if not layers:
            return {}
        weight = torch.cat([layer.weight for layer in layers.values()])
        bias = torch.cat([layer.bias for layer in layers.values()])
        parts = F.gelu(linear(features, weight, bias)).split([layer.out_features for layer in layers.values()], -1)
        return dict(zip(layers, parts))

    def _logits(self, features: Tensor, hidden: dict[str, Tensor], keys: Tensor | None) -> dict[str, Tensor]:
        heads = {name: self.heads.of(name) for name in self.datasets}
        return {
            name: head.logits(hidden[name], keys) if isinstance(head, MlpHead) else head(features, keys)
            for name, head in heads.items()
        }

    def _keys(self, clips: Tensor, keys: Tensor | None) -> Tensor | None:
        return draw_keys(clips.shape[0], clips.device) if keys is None and self.training else keys


BACKBONES = (MViT, MViTv2, OwnBackbone)


def with_backbone(cls: type[MultiTrain], config: ModelConfig) -> type[MultiTrain]:
    """The subclass of `cls`, and of the backbone of `config`."""
    return _subclass(cls, OwnBackbone if config.own_backbone else MViT if config.backbone is None else MViTv2)


_SUBCLASSES: dict[tuple[type, type], type[MultiTrain]] = {}


def _subclass(cls: type[MultiTrain], backbone: type[Backbone]) -> type[MultiTrain]:
    found = _SUBCLASSES.get((cls, backbone))
    if found is None:
        found = type(cls.__name__, (cls, backbone), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        _SUBCLASSES[cls, backbone] = found
    return found


def _blank(cls: type[MultiTrain], config: ModelConfig) -> MultiTrain:
    return MultiTrain.__new__(with_backbone(cls, config))


def _check(datasets: dict[str, int], multi_label: Collection[str]) -> None:
    if not datasets:
        raise ConfigError("a model needs at least one dataset, for example {'kinetics': 400}")
    for name, classes in datasets.items():
        if classes < 1:
            raise ConfigError(f"dataset {name!r} has {classes} classes; it needs at least 1")
    for name in multi_label:
        if name not in datasets:
            raise ConfigError(
                f"multi_label names {name!r}, which is not a dataset of this model; {nearest(name, datasets)}"
            )
