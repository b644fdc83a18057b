"""Heads, projections and the names of datasets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from multitrain.config import ConfigError
from multitrain.model.heads import Heads, LinearHead, MlpHead, Projections, escape, unescape
from multitrain.model.random import KeyedDropout

KEYS = torch.arange(40, dtype=torch.int64)
NAMES = st.text(min_size=1).filter(lambda name: "/" not in name)


@given(NAMES)
def test_any_name_without_a_slash_can_be_a_module_and_comes_back(name: str) -> None:
    module_name = escape(name)
    assert unescape(module_name) == name
    heads = Heads([(name, nn.Linear(2, 3))])
    assert [n for n, _ in heads.named_parameters()] == [f"{module_name}.weight", f"{module_name}.bias"]
    assert heads.of(name) is heads[module_name]


@pytest.mark.parametrize("name", ["kinetics", "mit", "ssv2", "Moments_in Time-v2", "k400"])
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert escape(name) == name


@pytest.mark.parametrize(
    "name", ["forward", "training", "of", "type", "keys", "a.b", "%", "weight", "_modules", "half"]
)
def test_difficult_names_work_in_heads_and_projections(name: str) -> None:
    projections = Projections({name: 3, "other": 4})
    out = projections({name: torch.ones(2, 3), "other": torch.ones(2, 4)})
    assert set(out) == {(name, "other"), ("other", name)}
    assert set(projections.state_dict()) == {f"{escape(name)}.other.weight", f"other.{escape(name)}.weight"}


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_would_break_files_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="dataset"):
        escape(name)


def test_two_names_never_meet() -> None:
    names = ["a.b", "a%2Eb", "a%252Eb", "of", "%6Ff", "%256Ff"]
    assert len({escape(name) for name in names}) == len(names)


def test_an_mlp_head_drops_out_before_its_last_layer_only() -> None:
    head, x = MlpHead(6, 8, 5, 0.5, dropout_logits=False, name="a").train(), torch.randn(40, 6)
    hidden = head.dropout(F.gelu(head.fc1(x)), KEYS)
    torch.testing.assert_close(head(x, KEYS), head.fc2(hidden))
    assert (hidden == 0).float().mean().item() == pytest.approx(0.5, abs=0.12)
    assert (head(x, KEYS) != 0).all()


def test_dropping_out_logits_halves_them_and_doubles_the_rest() -> None:
    head, x = MlpHead(6, 8, 5, 0.5, dropout_logits=True, name="a").train(), torch.randn(40, 6)
    logits = head.fc2(head.dropout(F.gelu(head.fc1(x)), KEYS))
    out = head(x, KEYS)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * logits[kept])
    assert (~kept).float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_a_linear_head_drops_out_its_input() -> None:
    head, x = LinearHead(6, 5, 0.5, "a").train(), torch.randn(40, 6)
    torch.testing.assert_close(head(x, KEYS), F.linear(head.dropout(x, KEYS), head.weight, head.bias))
    assert set(head.state_dict()) == {"weight", "bias"}


def test_every_dropout_of_a_model_has_a_stream_of_its_own() -> None:
    heads = Heads([(n, MlpHead(6, 8, 5, 0.5, True, n)) for n in "ab"] + [("c", LinearHead(6, 5, 0.5, "c"))])
    streams = [m.stream for m in heads.modules() if isinstance(m, KeyedDropout)]
    assert len(set(streams)) == len(streams) == 5


def test_projections_map_every_heads_logits_into_every_other_dataset() -> None:
    sizes = {"a": 3, "b": 4, "c": 5}
    projections = Projections(sizes)
    logits = {name: torch.randn(2, size) for name, size in sizes.items()}
    out = projections(logits)
    assert len(out) == 6
    for (a, b), z in out.items():
        weight = projections.get_parameter(f"{a}.{b}.weight")
        assert weight.shape == (sizes[b], sizes[a])
        torch.testing.assert_close(z, logits[a] @ weight.T)
