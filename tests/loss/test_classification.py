"""Own-head and projected losses are the cross-entropies of the definition, for soft and hard labels, one and many labels."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from multitrain.loss.classification import clip_losses
from multitrain.loss.projection import projected_losses

OWN = torch.tensor([True, False, True, True])
LOGITS = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
SOFT = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_soft_labels_are_taken_as_they_are_without_normalisation() -> None:
    expected = [-sum(SOFT[i, k] * F.log_softmax(LOGITS[i], 0)[k] for k in range(5)) for i in range(4)]
    expected[1] = torch.tensor(0.0)
    torch.testing.assert_close(
        clip_losses(LOGITS, SOFT, OWN), torch.stack(expected), rtol=1e-12, atol=1e-12, check_dtype=False
    )


def test_class_numbers_equal_their_one_hot_labels_and_foreign_ones_do_not_matter() -> None:
    numbers = torch.tensor([4, 4999, 0, 2])
    one_hot = F.one_hot(numbers.where(OWN, 0), 5).double()
    torch.testing.assert_close(
        clip_losses(LOGITS, numbers, OWN), clip_losses(LOGITS, one_hot, OWN), rtol=1e-12, atol=1e-12
    )


def test_several_labels_are_binary_cross_entropies_averaged_over_the_classes() -> None:
    labels = (SOFT > 0.5).double()
    p = LOGITS.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum(1) / 5
    torch.testing.assert_close(clip_losses(LOGITS, labels, OWN, multi_label=True), expected.where(OWN, 0.0))


def test_clips_of_other_datasets_get_neither_loss_nor_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    clip_losses(logits, SOFT, OWN).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2, 3]] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_computed_in_fp32_or_better(dtype: torch.dtype) -> None:
    logits = (LOGITS * 20).to(dtype)
    losses = clip_losses(logits, SOFT, OWN)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), clip_losses(logits.double(), SOFT, OWN), rtol=1e-5, atol=1e-5)


def test_the_projected_loss_is_the_mean_over_the_incoming_projections() -> None:
    projected = {("b", "a"): LOGITS, ("c", "a"): LOGITS.flip(0), ("a", "b"): LOGITS}
    actual = projected_losses(projected, "a", ["b", "c"], SOFT, OWN)
    expected = (clip_losses(LOGITS, SOFT, OWN) + clip_losses(LOGITS.flip(0), SOFT, OWN)) / 2
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="'d' to 'a'"):
        projected_losses(projected, "a", ["b", "d"], SOFT, OWN)


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 4\] do not fit logits of shape \[4, 5\]"):
        clip_losses(LOGITS, SOFT[:, :4], OWN)
    with pytest.raises(ValueError, match="multi-hot"):
        clip_losses(LOGITS, torch.zeros(4, dtype=torch.int64), OWN, multi_label=True)
