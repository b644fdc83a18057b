"""The whole loss equals its definition summed clip by clip, and the two-pass gradient is the whole batch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from multitrain.config import ConfigError, LossConfig
from multitrain.loss import MultiDatasetLoss, embedding_gradient, informative_loss


def problem(
    datasets: dict[str, int], n: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Outputs, soft targets and dataset ids of `n` clips; some targets are multi-hot like."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    out = SimpleNamespace(
        logits={name: normal(n, k) for name, k in datasets.items()},
        projected={(a, b): normal(n, datasets[b]) for a in datasets for b in datasets if a != b},
        expanded=normal(n, 6),
    )
    targets = {name: torch.rand(n, k, generator=generator, dtype=torch.float64) for name, k in datasets.items()}
    return out, targets, torch.randint(len(datasets), (n,), generator=generator)


def by_definition(
    out: Any, targets: dict[str, Tensor], ids: Tensor, names: list[str], config: LossConfig, multi_label: set[str]
) -> tuple[float, float, float]:
    """The sums of the definition (Liang et al., NeurIPS 2022, §3), clip by clip."""

    def loss(z: Tensor, y: Tensor, name: str) -> float:
        if name in multi_label:
            return F.binary_cross_entropy(z.sigmoid(), y).item()
        return -(y * F.log_softmax(z, 0)).sum().item()

    classification = projection = 0.0
    for i, position in enumerate(ids.tolist()):
        name = names[position]
        weight, y = config.dataset_weights.get(name, 1.0), targets[name][i]
        classification += weight * loss(out.logits[name][i], y, name)
        others = [a for a in names if a != name]
        if others:
            across = sum(loss(out.projected[a, name][i], y, name) for a in others) / len(others)
            projection += weight * config.projection_weight * across
    informative = informative_loss(out.expanded, config.std_weight, config.covariance_weight)[0].item()
    return classification / len(ids), projection / len(ids), informative


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 10_000), st.data())
def test_every_term_equals_its_definition_clip_by_clip(count: int, n: int, seed: int, data: st.DataObject) -> None:
    datasets = {f"d{i}": 2 + i for i in range(count)}
    multi_label = data.draw(st.sets(st.sampled_from(list(datasets))))
    config = LossConfig(projection_weight=0.7, informative_weight=0.3, std_weight=5, dataset_weights={"d0": 2.5})
    out, targets, ids = problem(datasets, n, seed)
    terms = MultiDatasetLoss(datasets, config, multi_label)(out, targets, ids)
    classification, projection, informative = by_definition(out, targets, ids, list(datasets), config, multi_label)
    assert terms.classification.item() == pytest.approx(classification, rel=1e-12)
    assert terms.projection.item() == pytest.approx(projection, rel=1e-12, abs=1e-15)
    assert terms.informative.item() == pytest.approx(informative, rel=1e-12)
    assert terms.total.item() == pytest.approx(classification + projection + 0.3 * informative, rel=1e-12)


def test_each_dataset_is_logged_with_its_own_mean_and_count() -> None:
    datasets = {"a": 3, "b": 4, "c": 5}
    out, targets, _ = problem(datasets, 4)
    ids = torch.tensor([0, 0, 1, 0])
    terms = MultiDatasetLoss(datasets, LossConfig(dataset_weights={"a": 7.0}))(out, targets, ids)
    own = [-(targets["a"][i] * F.log_softmax(out.logits["a"][i], 0)).sum().item() for i in (0, 1, 3)]
    assert terms.per_dataset["a"].item() == pytest.approx(sum(own) / 3, rel=1e-12)
    assert {name: count.item() for name, count in terms.counts.items()} == {"a": 3, "b": 1, "c": 0}
    assert terms.per_dataset["c"].item() == 0
    assert not terms.per_dataset["a"].requires_grad


def test_class_numbers_may_come_by_dataset_or_as_one_tensor() -> None:
    datasets = {"a": 3, "b": 4}
    out, _, ids = problem(datasets, 6)
    numbers = torch.tensor([2, 3, 0, 1, 2, 0]).minimum(torch.tensor([2, 3])[ids])
    loss = MultiDatasetLoss(datasets, LossConfig())
    one_hot = {name: F.one_hot(numbers.where(ids == d, 0), k).double() for d, (name, k) in enumerate(datasets.items())}
    expected = loss(out, one_hot, ids).total
    torch.testing.assert_close(loss(out, numbers, ids).total, expected)
    torch.testing.assert_close(loss(out, {"a": numbers, "b": numbers}, ids).total, expected)


def test_the_projection_loss_trains_the_foreign_heads() -> None:
    datasets = {"a": 3, "b": 4}
    out, targets, _ = problem(datasets, 3)
    MultiDatasetLoss(datasets, LossConfig())(out, targets, torch.zeros(3, dtype=torch.int64)).projection.backward()
    assert out.projected["b", "a"].grad.abs().sum() > 0
    assert out.projected["a", "b"].grad.abs().sum() == 0


def test_a_zero_weight_switches_a_term_off_and_needs_no_output() -> None:
    datasets = {"a": 3, "b": 4}
    out, targets, ids = problem(datasets, 1)
    out.projected, out.expanded = {}, None
    terms = MultiDatasetLoss(datasets, LossConfig(projection_weight=0, informative_weight=0))(out, targets, ids)
    assert terms.projection.item() == terms.informative.item() == 0
    assert terms.total.equal(terms.classification)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_give_fp32_terms_and_gradients_in_their_own_dtype(dtype: torch.dtype) -> None:
    datasets = {"a": 3, "b": 4}
    out, targets, ids = problem(datasets, 4, dtype=dtype)
    terms = MultiDatasetLoss(datasets, LossConfig())(out, targets, ids)
    for term in (terms.total, terms.classification, terms.projection, terms.informative):
        assert term.dtype == torch.float32
    terms.total.backward()
    assert out.expanded.grad.dtype == dtype


def test_two_passes_give_the_whole_batchs_loss_and_gradient_from_micro_batches() -> None:
    """The mean over micro-batches of the two-pass gradient is the gradient of the loss over all clips of the update."""
    datasets, config, n, parts = {"a": 3, "b": 4}, LossConfig(), 12, 4
    out, targets, ids = problem(datasets, n)
    x, weight = torch.randn(n, 5, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def outputs(rows: slice) -> Any:
        logits = {name: z[rows].detach() for name, z in out.logits.items()}
        projected = {pair: z[rows].detach() for pair, z in out.projected.items()}
        return SimpleNamespace(logits=logits, projected=projected, expanded=x[rows] @ weight)

    def take(rows: slice) -> dict[str, Tensor]:
        return {name: y[rows] for name, y in targets.items()}

    loss = MultiDatasetLoss(datasets, config, clips_per_update=n)
    whole = loss(outputs(slice(None)), targets, ids)
    (expected,) = torch.autograd.grad(whole.total, weight)

    value, gradient = embedding_gradient((x @ weight).detach(), config.std_weight, config.covariance_weight)
    actual, total = torch.zeros_like(weight), 0.0
    for part in range(parts):
        rows = slice(part * n // parts, (part + 1) * n // parts)
        terms = loss(outputs(rows), take(rows), ids[rows], surrogate=(value, gradient[rows]))
        assert terms.informative.item() == pytest.approx(whole.informative.item(), rel=1e-14)
        actual += torch.autograd.grad(terms.total / parts, weight)[0]
        total += terms.total.item() / parts
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    assert total == pytest.approx(whole.total.item(), rel=1e-13)


def test_a_part_of_an_update_is_refused_without_its_surrogate() -> None:
    datasets = {"a": 3}
    out, targets, ids = problem(datasets, 4)
    with pytest.raises(ConfigError, match="all 8 clips of an update, but this call sees 4"):
        MultiDatasetLoss(datasets, LossConfig(scope="update"), clips_per_update=8)(out, targets, ids)
    MultiDatasetLoss(datasets, LossConfig(scope="micro"), clips_per_update=8)(out, targets, ids)
    MultiDatasetLoss(datasets, LossConfig(scope="update"), clips_per_update=4)(out, targets, ids)


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    datasets = {"a": 3, "b": 4}
    out, targets, ids = problem(datasets, 4)
    loss = MultiDatasetLoss(datasets, LossConfig())
    with pytest.raises(ValueError, match="3 dataset ids do not fit logits of 4 clips"):
        loss(out, targets, ids[:3])
    with pytest.raises(ValueError, match="gradient of shape"):
        loss(out, targets, ids, surrogate=(torch.zeros(()), torch.zeros(3, 6)))
    with pytest.raises(ConfigError, match="multi_label names 'x'"):
        MultiDatasetLoss(datasets, LossConfig(), multi_label=["x"])
    out.projected = {}
    with pytest.raises(ValueError, match="projection from 'b' to 'a'"):
        loss(out, targets, ids)
    out.expanded = None
    with pytest.raises(ValueError, match="no expander"):
        MultiDatasetLoss(datasets, LossConfig(projection_weight=0))(out, targets, ids)
    alone = problem(datasets, 1)
    with pytest.raises(ConfigError, match="at least 2 clips"):
        loss(*alone)
