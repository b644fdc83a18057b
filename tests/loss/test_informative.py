"""The informative loss is VICReg's variance and covariance, exact in any precision of training, and its gradient is cacheable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from multitrain.config import ConfigError
from multitrain.loss import embedding_gradient, informative_loss


def embeddings(n: int = 12, dim: int = 5, scale: float = 0.5) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale + 3


def by_definition(e: Tensor, std_weight: float, covariance_weight: float) -> tuple[float, float, float]:
    """Sums written out."""
    n, dim = e.shape
    means = [sum(e[i, j].item() for i in range(n)) / n for j in range(dim)]
    covariance = [
        [sum((e[i, j].item() - means[j]) * (e[i, k].item() - means[k]) for i in range(n)) / (n - 1) for k in range(dim)]
        for j in range(dim)
    ]
    std = sum(max(0.0, 1 - math.sqrt(covariance[j][j] + 1e-4)) for j in range(dim)) / dim
    cov = sum(covariance[j][k] ** 2 for j in range(dim) for k in range(dim) if j != k) / dim
    return std_weight * std + covariance_weight * cov, std, cov


@pytest.mark.parametrize(("n", "dim"), [(2, 1), (2, 7), (12, 5), (50, 3)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_it_equals_the_sums_written_out_in_fp64(n: int, dim: int, scale: float) -> None:
    e = embeddings(n, dim, scale)
    for actual, expected in zip(informative_loss(e, 25, 1), by_definition(e, 25, 1)):
        assert actual.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert informative_loss(e, 3, 0.5)[0].item() == pytest.approx(by_definition(e, 3, 0.5)[0], rel=1e-12)


def test_its_gradient_is_right() -> None:
    assert torch.autograd.gradcheck(lambda e: informative_loss(e)[0], embeddings().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_widened_before_anything_can_overflow(dtype: torch.dtype) -> None:
    e = (embeddings(64, 32, 30.0)).to(dtype)
    loss, _, covariance = informative_loss(e)
    assert loss.dtype == torch.float32
    assert covariance.item() == pytest.approx(informative_loss(e.double())[2].item(), rel=1e-5)
    assert covariance > 1000


def test_autocast_does_not_lower_its_precision() -> None:
    e = embeddings(64, 32).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = informative_loss(e)
    for a, b in zip(inside, informative_loss(e)):
        assert a.equal(b)


def test_a_tiny_covariance_beside_a_large_variance_is_not_lost_in_fp32() -> None:
    e = torch.zeros(4, 2, dtype=torch.float64)
    e[:, 0] = torch.tensor([100.0, -100, 100, -100])
    e[:, 1] = torch.tensor([1.0, 0.9, -1, -1]) * 1e-3
    assert informative_loss(e.float())[2].item() == pytest.approx(by_definition(e, 25, 1)[2], rel=1e-4)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_clips_are_an_error_not_nan(n: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 2 clips, but got {n}") as error:
        informative_loss(torch.zeros(n, 5))
    assert "\n" not in str(error.value)


def test_the_cached_gradient_is_autograds() -> None:
    e = embeddings().requires_grad_()
    loss = informative_loss(e, 20, 2)[0]
    loss.backward()
    with torch.no_grad():
        value, gradient = embedding_gradient(e, 20, 2)
    assert value.equal(loss.detach())
    torch.testing.assert_close(gradient, e.grad, rtol=1e-14, atol=1e-14)
    assert not gradient.requires_grad
    assert embedding_gradient(e.detach().to(torch.bfloat16))[1].dtype == torch.float32


def test_identical_embeddings_have_a_finite_gradient() -> None:
    _, gradient = embedding_gradient(torch.ones(4, 3))
    assert gradient.isfinite().all()
