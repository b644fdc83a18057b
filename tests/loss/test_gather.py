"""With real processes: gathering embeddings gives every rank the union's loss, and the mean gradient is the union's."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from multitrain.config import LossConfig
from multitrain.loss import MultiDatasetLoss, Terms, embedding_gradient
from multitrain.loss.gather import all_gather

DATASETS = {"a": 3, "b": 4}
PER_RANK = 3


def data(n: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    targets = {name: torch.rand(n, k, generator=generator, dtype=torch.float64) for name, k in DATASETS.items()}
    return x, targets, torch.randint(2, (n,), generator=generator)


class Toy(torch.nn.Module):
    """A linear model with all the outputs that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        width = 3 + 4 + 4 + 3 + 6
        self.weight = torch.nn.Parameter(torch.randn(5, width, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        a, b, ab, ba, expanded = (x @ self.weight).split([3, 4, 4, 3, 6], 1)
        return SimpleNamespace(logits={"a": a, "b": b}, projected={("a", "b"): ab, ("b", "a"): ba}, expanded=expanded)


def union(world: int) -> tuple[Terms, Tensor]:
    model, (x, targets, ids) = Toy(), data(world * PER_RANK)
    terms = MultiDatasetLoss(DATASETS, LossConfig())(model(x), targets, ids)
    terms.total.backward()
    assert model.weight.grad is not None
    return terms, model.weight.grad


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rows = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    x, targets, ids = data(world * PER_RANK)
    own = {name: y[rows] for name, y in targets.items()}
    results: dict[str, Any] = {}

    group = dist.group.WORLD
    loss = MultiDatasetLoss(DATASETS, LossConfig(), group=group, clips_per_update=world * PER_RANK)
    model = Toy()
    terms = loss(model(x[rows]), own, ids[rows])
    terms.total.backward()
    results["gathered"] = (terms.informative.detach(), terms.classification.detach(), mean_gradient(model, world))

    model = Toy()
    with torch.no_grad():
        everyone = all_gather(model(x[rows]).expanded, group)
    value, gradient = embedding_gradient(everyone)
    for i in range(rows.start, rows.stop):
        part = slice(i, i + 1)
        terms = loss(model(x[part]), {n: y[part] for n, y in targets.items()}, ids[part], (value, gradient[part]))
        (terms.total / PER_RANK).backward()
    results["two passes"] = (terms.informative.detach(), None, mean_gradient(model, world))

    y = (torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank).requires_grad_()
    gathered = all_gather(y.t(), group)
    (gathered * torch.arange(gathered.numel()).view_as(gathered) * (rank + 1)).sum().backward()
    results["gather"] = (gathered.detach(), y.grad, None)
    results["half"] = all_gather(torch.full((2, 3), rank + 0.5, dtype=torch.bfloat16), group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def mean_gradient(model: Toy, world: int) -> Tensor:
    """What data-parallel training makes of the ranks' gradients."""
    assert model.weight.grad is not None
    grad = model.weight.grad.clone()
    dist.all_reduce(grad)
    return grad / world


@pytest.fixture(scope="module", params=[2])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("way", ["gathered", "two passes"])
def test_every_rank_sees_the_unions_informative_loss_and_the_mean_gradient_is_the_unions(
    results: list[dict[str, Any]], way: str
) -> None:
    terms, gradient = union(len(results))
    for result in results:
        torch.testing.assert_close(result[way][0], terms.informative.detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(result[way][2], gradient, rtol=1e-12, atol=1e-12)
    if way == "gathered":
        mean = torch.stack([result[way][1] for result in results]).mean()
        torch.testing.assert_close(mean, terms.classification.detach(), rtol=1e-13, atol=1e-13)


def test_the_gathers_gradient_is_the_sum_over_the_ranks_losses(results: list[dict[str, Any]]) -> None:
    world = len(results)
    parts = [(torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank).t() for rank in range(world)]
    weights = torch.arange(6.0 * world, dtype=torch.float64).view(2 * world, 3) * sum(range(1, world + 1))
    for rank, result in enumerate(results):
        gathered, grad, _ = result["gather"]
        assert gathered.equal(torch.cat(parts))
        torch.testing.assert_close(grad, weights[2 * rank : 2 * rank + 2].t())


def test_half_precision_is_gathered_as_it_is(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["half"].dtype == torch.bfloat16
        assert result["half"][:, 0].tolist() == [r + 0.5 for r in range(len(results)) for _ in range(2)]


def test_without_a_group_nothing_is_gathered() -> None:
    x = torch.ones(2, 3)
    assert all_gather(x, None) is x
