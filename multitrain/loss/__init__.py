"""The loss: classification, projection and informative terms."""

from multitrain.loss.informative import embedding_gradient, informative_loss
from multitrain.loss.total import MultiDatasetLoss, Terms

__all__ = ["MultiDatasetLoss", "Terms", "embedding_gradient", "informative_loss"]
