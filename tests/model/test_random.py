"""Masks are a pure function of the clip's key and the layer, with the right statistics."""

from __future__ import annotations

import pytest
import torch

from multitrain.model.random import KeyedDropout, KeyedDropPath, draw_keys, random_bits, stream_of, uniform, uniform53

KEYS = torch.arange(-500, 500, dtype=torch.int64) * 7_919_000_000_000_000_003


def splitmix64(z: int) -> int:
    """SplitMix64's finaliser in unbounded integers."""
    mask = (1 << 64) - 1
    z &= mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64_and_stays_what_it_is() -> None:
    stream = stream_of("blocks.3.attn")
    assert stream == 0x40E7838CCA4C7C13
    for key in (0, 1, -1, 2**63 - 1, -(2**63)):
        state = splitmix64(splitmix64(key) ^ stream)
        expected = [splitmix64(state + i * 0x9E3779B97F4A7C15) for i in (1, 2, 3)]
        actual = random_bits(torch.tensor([key]), stream, 3)[0].tolist()
        assert [a & ((1 << 64) - 1) for a in actual] == expected
    assert random_bits(KEYS[:4], stream, 5, start=2).equal(random_bits(KEYS[:4], stream, 7)[:, 2:])


def test_uniform_numbers_are_uniform_and_independent_over_keys_counters_and_streams() -> None:
    u = uniform(KEYS, 1, 64)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    histogram = torch.histc(u, 50, 0, 1) / u.numel()
    assert (histogram - 0.02).abs().max() < 6 * (0.02 / u.numel()) ** 0.5
    for other in (uniform(KEYS + 1, 1, 64), uniform(KEYS, 2, 64), u.roll(1, 1), u.roll(1, 0)):
        assert torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1].abs() < 5 / u.numel() ** 0.5
    assert uniform(torch.arange(2000), 3, 1).unique().numel() > 1990
    inside = uniform53(KEYS, 1, 64)
    assert inside.min() > 0
    assert inside.max() < 1


@pytest.mark.parametrize("kind", [KeyedDropout, KeyedDropPath])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_do_not_depend_on_how_the_batch_is_split(kind: type, p: float) -> None:
    layer, x = kind(p, stream_of("a")), torch.randn(1000, 3, 4)
    whole = layer(x, KEYS)
    halves = torch.cat([layer(x[:300], KEYS[:300]), layer(x[300:], KEYS[300:])])
    order = torch.randperm(1000)
    assert whole.equal(halves)
    assert whole[order].equal(layer(x[order], KEYS[order]))
    assert whole.equal(layer(x, KEYS))
    assert not whole.equal(kind(p, stream_of("b"))(x, KEYS))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_zeroes_the_share_p_and_keeps_the_mean(p: float) -> None:
    out = KeyedDropout(p, 5)(torch.ones(1000, 50), KEYS)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)] if p else [1.0])
    assert out.mean().item() == pytest.approx(1, abs=0.1)


def test_drop_path_drops_whole_clips_and_divides_the_kept_ones_by_their_probability() -> None:
    out = KeyedDropPath(0.2, 5)(torch.ones(1000, 6, 7), KEYS)
    kept = out[:, 0, 0]
    assert out.equal(kept[:, None, None].expand_as(out))
    assert kept.unique().tolist() == pytest.approx([0.0, 1.25])
    assert (kept == 0).float().mean().item() == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("kind", [KeyedDropout, KeyedDropPath])
def test_nothing_is_dropped_in_eval_mode_or_with_probability_zero(kind: type) -> None:
    x = torch.randn(1000, 3)
    assert kind(0.5, 1).eval()(x, KEYS) is x
    assert kind(0.0, 1)(x, KEYS) is x


def test_without_keys_masks_come_from_torchs_generator() -> None:
    layer, x = KeyedDropout(0.5, 1), torch.ones(8, 100)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert layer(x).equal(first)
    assert not first.equal(second)
    assert draw_keys(5).shape == (5,)


def test_half_precision_keeps_the_mean() -> None:
    x = torch.ones(1000, 50, dtype=torch.bfloat16)
    out = KeyedDropout(0.1, 5)(x, KEYS)
    assert out.dtype == torch.bfloat16
    assert out.max().item() == pytest.approx(1 / 0.9, rel=2**-8)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_probabilities_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        KeyedDropout(p, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cpu_and_gpu_draw_the_same_numbers() -> None:
    assert uniform(KEYS.cuda(), 9, 33).cpu().equal(uniform(KEYS, 9, 33))
