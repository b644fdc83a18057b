"""The informative loss: variance and covariance of the expander's outputs (VICReg, Bardes et al., ICLR 2022, eq. 1–4).

It is a function of all clips of a batch, not a mean over clips: its mean over micro-batches is a different loss.
`embedding_gradient` gives the exact loss over the whole batch in two passes (the gradient cache of Gao et al., RepL4NLP 2021). The first
pass computes the embeddings of all clips without a graph, then the loss and its gradient with respect to them. The second pass runs
each micro-batch with a graph and backpropagates its rows of that gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from multitrain.config import ConfigError
from multitrain.loss.precision import at_least_fp32, no_autocast

EPSILON = 1e-4
"""Added to the variance before the square root."""
TARGET_STD = 1.0
"""The std term penalises a dimension whose standard deviation is below this."""


def informative_loss(
    embeddings: Tensor, std_weight: float = 25.0, covariance_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, std term, covariance term) of embeddings [n, D]; scalars in fp32, or fp64 for fp64 embeddings.

    std_j = sqrt(var_unbiased(e_j) + 1e-4); std term = mean_j max(0, 1 − std_j); Cov = ēᵀē / (n − 1);
    covariance term = (1/D) Σ_{j≠k} Cov_jk²; loss = std_weight · std term + covariance_weight · covariance term.

    Raises:
        ConfigError: fewer than two clips, which have no variance.
    """
    clips, dim = embeddings.shape
    if clips < 2:
        raise ConfigError(
            f"the informative loss needs the embeddings of at least 2 clips, but got {clips}; "
            "use micro_batch=2 or more, augment.copies=2 or loss.informative_weight=0"
        )
    with no_autocast(embeddings):
        e = at_least_fp32(embeddings)
        e = e - e.mean(0)
        covariance = e.T @ e / (clips - 1)
        variance = covariance.diagonal()
        std_term = torch.relu(TARGET_STD - torch.sqrt(e.var(0) + EPSILON)).mean()
        covariance_term = (covariance - torch.diag(variance)).square().sum() / dim
        return std_weight * std_term + covariance_weight * covariance_term, std_term, covariance_term


def embedding_gradient(
    embeddings: Tensor, std_weight: float = 25.0, covariance_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂embeddings) for the embeddings [M, D] of all clips: a scalar and [M, D], detached, in fp32 or fp64."""
    with torch.enable_grad():
        e = at_least_fp32(embeddings.detach()).clone().requires_grad_()
        loss = informative_loss(e, std_weight, covariance_weight)[0]
        (gradient,) = torch.autograd.grad(loss, e)
    return loss.detach(), gradient
