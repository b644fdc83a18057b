"""The network: from normalised clips to the logits of every dataset."""

from multitrain.model.multitrain import MultiTrain, Outputs
from multitrain.model.mvit import MViT

__all__ = ["MViT", "MultiTrain", "Outputs"]
