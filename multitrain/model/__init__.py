"""A clip becomes logits."""

from multitrain.model.multitrain import MultiTrain, Outputs
from multitrain.model.mvit import MViT

__all__ = ["MViT", "MultiTrain", "Outputs"]
