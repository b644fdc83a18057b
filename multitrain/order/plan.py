"""The order of the samples: ``sample(g) → (dataset, index, pass)``, a pure function of the plan and the sample number g.

Update s trains on the samples ``[s * effective_batch, (s + 1) * effective_batch)``. The only state is s, so a run resumes at any
update, on any number of GPUs, and sees every video exactly once per epoch of its dataset ("pass" in the record's field).
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import index
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from multitrain.order.permutation import key, permute
from multitrain.order.windows import SHARD_VIDEOS, Part, scatter, shard_pass

ORDER_VERSION = 1
"""Incremented with every change of the order of an existing plan; a run refuses to resume in another order."""

SAMPLE_DTYPE = np.dtype([("dataset", "<i4"), ("index", "<i8"), ("pass", "<i8")])
"""One sample: its dataset (position in `Plan.sources`), its video in that dataset, and that dataset's epoch."""
TICKET = SAMPLE_DTYPE
"""The older name."""

Mixture = Literal["interleave", "concat"]
Proportions = Literal["size", "weights", "temperature"]


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture."""

    name: str
    size: int
    """Videos."""
    replicas: int = 1
    """Passes over the dataset in one epoch of the mixture."""
    weight: float | None = None
    """Share in the mixture with proportions=weights; any positive scale."""
    digest: str = ""
    """Digest of the annotations. Part of the fingerprint, without influence on the order."""

    def __post_init__(self) -> None:
        _make_integers(self, "size", "replicas")
        if self.size < 1 or self.replicas < 1:
            raise ValueError(f"dataset {self.name!r} needs at least one video and one replica: {self}")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"dataset {self.name!r} has weight {self.weight}; a weight is a positive number")

    @property
    def draws(self) -> int:
        """Videos that an epoch draws from this dataset."""
        return self.size * self.replicas


@dataclass(frozen=True)
class Plan:
    """The order of all videos of a run.

    mixture=interleave: every update holds the datasets in their proportions, exactly where these are whole numbers (see
    `apportion`), and each dataset has its own keyed permutation per epoch. mixture=concat: one keyed permutation per epoch of
    the union of all replicas of all datasets, as in the published code.

    Raises:
        ValueError: when the settings contradict each other; one line.
    """

    sources: Sequence[Source]
    _: KW_ONLY
    seed: int
    effective_batch: int
    """Videos per update."""
    mixture: Mixture = "interleave"
    proportions: Proportions = "size"
    """interleave: by videos × replicas, by `Source.weight`, or by (videos × replicas) to the power 1 / temperature."""
    temperature: float = 1.0
    group: int = 1
    """interleave: this many consecutive samples are of one dataset, but for a few at the end of an update."""
    shuffle_window: int | None = None
    """Shards that an update reads of a dataset, or one more, in place of any: see `multitrain.order.windows`. None: all videos
    of a pass are permuted at once."""
    shard_videos: int = SHARD_VIDEOS
    """Videos of a shard; counts with `shuffle_window` only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        _make_integers(self, "seed", "effective_batch", "group", "shard_videos")
        if self.shuffle_window is not None:
            _make_integers(self, "shuffle_window")
        if min(self.shuffle_window or 1, self.shard_videos) < 1 or self.shuffle_window == 0:
            raise ValueError(
                f"shuffle_window={self.shuffle_window} with shard_videos={self.shard_videos}: both are numbers from 1 up"
            )
        names = [s.name for s in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a plan needs one dataset or more, each with a name of its own; got {names}")
        if self.mixture not in get_args(Mixture) or self.proportions not in get_args(Proportions):
            raise ValueError(f"no such mixture={self.mixture} with proportions={self.proportions}")
        if self.mixture == "concat" and self.proportions != "size":
            raise ValueError(f"mixture=concat takes proportions=size only, not {self.proportions}")
        if self.proportions == "weights" and any(s.weight is None for s in self.sources):
            raise ValueError("proportions=weights needs a weight for every dataset")
        if not 0.01 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not possible; use a number from 0.01 upwards")
        if self.effective_batch < 1 or self.group < 1 or self.effective_batch % self.group:
            raise ValueError(f"effective_batch={self.effective_batch} is not a multiple of group={self.group}")

    @cached_property
    def epoch_size(self) -> int:
        """Samples in one epoch: the videos of all datasets, times their replicas."""
        return sum(s.draws for s in self.sources)

    def updates(self, epochs: float) -> int:
        """The fewest updates that hold `epochs` epochs; with proportions=size, those of one epoch omit no video."""
        return math.ceil(simplest(epochs) * self.epoch_size / self.effective_batch)

    def samples(self, start: int, stop: int) -> NDArray[np.void]:
        """The videos of samples ``[start, stop)``, as `SAMPLE_DTYPE` [stop - start]; the cost does not depend on `start`.

        Raises:
            ValueError: unless 0 <= start <= stop.
        """
        start, stop = index(start), index(stop)
        if not 0 <= start <= stop:
            raise ValueError(f"samples are numbered from 0 upwards, so there is no range [{start}, {stop})")
        samples = np.empty(stop - start, SAMPLE_DTYPE)
        if start < stop:
            fill = self._interleave if self.mixture == "interleave" else self._concat
            fill(samples, start, stop)
        return samples

    def tickets(self, start: int, stop: int) -> NDArray[np.void]:
        """The older name of :meth:`samples`."""
        warnings.warn("Plan.tickets is now called Plan.samples", DeprecationWarning, stacklevel=2)
        return self.samples(start, stop)

    def digest(self, start: int, stop: int) -> str:
        """A digest of the samples ``[start, stop)``, 16 hex digits."""
        return hashlib.blake2b(self.samples(start, stop).tobytes(), digest_size=8).hexdigest()

    def fallback_index(self, sample: np.void, attempt: int) -> int:
        """The index of the video to show in place of an unreadable one, from the same dataset.

        Attempts 0, 1, 2 … name different videos, and never the unreadable one itself, until the dataset has no more.
        """
        source, bad = self.sources[int(sample["dataset"])], int(sample["index"])
        others = source.size - 1
        if not others:
            return bad
        turn = np.array([attempt % others])
        other = int(permute(turn, others, key("stand-in", self.seed, source.name, bad, int(sample["pass"])))[0])
        return other + (other >= bad)

    stand_in = fallback_index
    """The earlier name of `fallback_index`."""

    def describe(self) -> dict[str, Any]:
        """All that the order depends on, in JSON's types."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "effective_batch": self.effective_batch,
            "mixture": self.mixture,
            "proportions": self.proportions,
            "temperature": float(self.temperature),
            "group": self.group,
            **self._windows(),
            "sources": [asdict(s) | {"weight": None if s.weight is None else float(s.weight)} for s in self.sources],
        }

    def _windows(self) -> dict[str, Any]:
        """What `describe` says of windows: nothing without any, as before there were any."""
        if self.shuffle_window is None:
            return {}
        return {"shuffle_window": self.shuffle_window, "shard_videos": self.shard_videos}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `describe`, in hex: two plans of one fingerprint are one order of the same videos."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The differences from another plan's `describe`, one line each; empty for the same plan."""
        was, now = dict(other), self.describe()
        old, new = ({s["name"]: s for s in d.pop("sources", ())} for d in (was, now))
        lines = _changes("", was, now)
        lines += [f"dataset {name!r} was not there" for name in new if name not in old]
        lines += [f"dataset {name!r} is gone" for name in old if name not in new]
        for name in new:
            lines += _changes(f"dataset {name!r}: ", old.get(name, new[name]), new[name])
        if list(old) != list(new) and sorted(old) == sorted(new):
            lines.append(f"the order of the datasets was {', '.join(old)}; is now {', '.join(new)}")
        return lines

    def _concat(self, samples: NDArray[np.void], start: int, stop: int) -> None:
        """One epoch of the union of all replicas of all datasets, shuffled by one permutation."""
        ends = np.cumsum([s.draws for s in self.sources])
        sizes = np.array([s.size for s in self.sources])
        replicas = np.array([s.replicas for s in self.sources])
        if self.shuffle_window is not None:
            self._concat_in_windows(samples, start, stop)
            return
        union, place = self._shuffled(("concat", self.seed), np.arange(start, stop), self.epoch_size)
        dataset = np.searchsorted(ends, place, side="right")
        replica, video = np.divmod(place - (ends - sizes * replicas)[dataset], sizes[dataset])
        samples["dataset"], samples["index"], samples["pass"] = dataset, video, union * replicas[dataset] + replica

    def _interleave(self, samples: NDArray[np.void], start: int, stop: int) -> None:
        """Sample k of a dataset is at position k of an infinite sequence of permutations of the dataset."""
        samples["dataset"], draw = self._assign_slots(start, stop)
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(samples["dataset"] == number)
            if own.size:
                shuffled = self._shuffled if self.shuffle_window is None else self._in_windows
                epoch, video = shuffled(("order", self.seed, source.name), draw[own], source.size)
                samples["index"][own], samples["pass"][own] = video, epoch

    def _in_windows(
        self, name: tuple[str | int, ...], place: NDArray[np.int64], size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As `_shuffled`, with shuffling in windows of shards."""
        epoch, _, video = self._windowed((Part(size, 1),), name, place)
        return epoch, scatter(video, size)

    def _concat_in_windows(self, samples: NDArray[np.void], start: int, stop: int) -> None:
        """As `_concat`, permuting the shards of all replicas of all datasets."""
        parts = tuple(Part(s.size, s.replicas) for s in self.sources)
        union, part, video = self._windowed(parts, ("concat", self.seed), np.arange(start, stop))
        replicas = np.array([s.replicas for s in self.sources])
        dataset = np.searchsorted(np.cumsum(replicas), part, side="right")
        replica = part - (np.cumsum(replicas) - replicas)[dataset]
        for number, source in enumerate(self.sources):
            own = np.flatnonzero(dataset == number)
            samples["index"][own] = scatter(video[own], source.size)
        samples["dataset"], samples["pass"] = dataset, union * replicas[dataset] + replica

    def _windowed(
        self, parts: tuple[Part, ...], name: tuple[str | int, ...], place: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Epoch, part (replicas counted one by one) and position within the part, for ascending positions [N] of the sequence."""
        epoch, offset = np.divmod(place, sum(p.videos * p.replicas for p in parts))
        part, video = np.empty_like(epoch), np.empty_like(epoch)
        assert self.shuffle_window is not None
        for number in range(int(epoch[0]), int(epoch[-1]) + 1):
            own = slice(*np.searchsorted(epoch, [number, number + 1]))
            shards = shard_pass(parts, self.shard_videos, self.shuffle_window, (*name, number))
            part[own], video[own] = shards.shuffled(offset[own])
        return epoch, part, video

    def _shuffled(
        self, name: tuple[str | int, ...], place: NDArray[np.int64], size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and video for ascending positions [N] of an infinite sequence of epochs, each a permutation of range(size)."""
        epoch, offset = np.divmod(place, size)
        first, last = int(epoch[0]), int(epoch[-1])
        keys = np.array([key(*name, number) for number in range(first, last + 1)], np.uint64)
        return epoch, permute(offset, size, keys[epoch - first] if len(keys) > 1 else keys)

    def _assign_slots(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """For each sample in ``[start, stop)``: its dataset, and its ordinal among the samples of that dataset."""
        batch = self.effective_batch
        first, end = start // batch, -(-stop // batch)
        drawn = [self._drawn(update) for update in range(first, end + 1)]
        datasets, draws = [], []
        for before, after in pairwise(drawn):
            dataset, ordinal = layout(tuple(b - a for a, b in zip(before, after)), self.group)
            datasets.append(dataset)
            draws.append(np.array(before)[dataset] + ordinal)
        wanted = slice(start - first * batch, stop - first * batch)
        return np.concatenate(datasets)[wanted], np.concatenate(draws)[wanted]

    def _drawn(self, updates: int) -> list[int]:
        """Samples of each dataset in the first `updates` updates: whole shares exactly, the others apportioned."""
        whole, fractional = self._shares
        seats = self.effective_batch - sum(whole)
        rest = apportion(updates * seats, fractional)
        return [updates * share + seated for share, seated in zip(whole, rest)]

    @cached_property
    def _shares(self) -> tuple[list[int], list[int]]:
        """For each dataset: its videos per update if that is a whole number, else 0; and its weight if not, else 0."""
        weights = self._weights()
        shares = [divmod(self.effective_batch * w, sum(weights)) for w in weights]
        whole = [share if not remainder else 0 for share, remainder in shares]
        return whole, [w if remainder else 0 for w, (_, remainder) in zip(weights, shares)]

    def _weights(self) -> list[int]:
        """The proportions of the datasets as integers; floats are replaced by the simplest fractions close to them."""
        if self.proportions == "size":
            return [s.draws for s in self.sources]
        if self.proportions == "weights":
            fractions = [simplest(s.weight or 0) for s in self.sources]
        else:
            context = Context(prec=28)  # Decimal, since the last bit of a float's power differs between C libraries.
            power = context.divide(1, Decimal(repr(float(self.temperature))))
            fractions = [simplest(context.power(s.draws, power)) for s in self.sources]
        scale = math.lcm(*(f.denominator for f in fractions))
        return [int(f * scale) for f in fractions]


def apportion(seats: int, weights: Sequence[int]) -> list[int]:
    """Distribute `seats` in proportion to `weights` by the method of Webster and Sainte-Laguë.

    The method is unbiased and monotone: with one seat more, no share decreases (Balinski and Young, "Fair Representation",
    1982). So it defines an order of all samples that can be evaluated at any seat directly. Shares that are all whole numbers
    are met exactly; otherwise a share of n with the fraction f of the seats is off by (1 + n f) / 2 at most. Weight 0 gets no
    seat; ties go to the first.
    """
    total = sum(weights)
    if not total:
        return [0] * len(weights)
    counts = [(2 * seats * w + total) // (2 * total) for w in weights]
    claims = [n for n, w in enumerate(weights) if w]
    while sum(counts) > seats:
        counts[max(claims, key=lambda n: (Fraction(2 * counts[n] - 1, weights[n]), n))] -= 1
    while sum(counts) < seats:
        counts[min(claims, key=lambda n: (Fraction(2 * counts[n] + 1, weights[n]), n))] += 1
    return counts


@lru_cache(maxsize=256)
def layout(counts: tuple[int, ...], group: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The slots of an update, `counts` of each dataset: groups of one dataset spread evenly, incomplete groups last.

    Returns:
        dataset int32 [sum of counts], and ordinal int64: the number of the dataset's samples before this one.
    """
    groups = [count // group for count in counts]
    owner = np.repeat(np.arange(len(counts)), groups)
    moment = np.concatenate([(np.arange(n) + 0.5) / n for n in groups])
    spread = np.repeat(owner[np.argsort(moment, kind="stable")], group)
    dataset = np.concatenate([spread, np.repeat(np.arange(len(counts)), [count % group for count in counts])])
    ordinal = np.empty(len(dataset), np.int64)
    ordinal[np.argsort(dataset, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    dataset = dataset.astype(np.int32)
    dataset.flags.writeable = ordinal.flags.writeable = False
    return dataset, ordinal


def simplest(number: float | Decimal) -> Fraction:
    """A fraction of few digits within 1e-14 (relative) of `number`: 0.3 is 3/10, and 1/3 as a float is 1/3 again.

    Raises:
        ValueError: unless 0 <= number < infinity.
    """
    if not 0 <= number < math.inf:
        raise ValueError(f"{number} is not a number from 0 upwards")
    exact, limit = Fraction(number), 1
    while abs((fraction := exact.limit_denominator(limit)) - exact) > exact / 10**14:
        limit *= 10
    return fraction


def _make_integers(instance: object, *names: str) -> None:
    """Replace numpy's integers by Python's, which do not overflow; refuse floats."""
    for name in names:
        object.__setattr__(instance, name, index(getattr(instance, name)))


def _changes(prefix: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    fields = [*now, *(f for f in was if f not in now)]
    changed = [f for f in fields if was.get(f) != now.get(f)]
    return [f"{prefix}{f} was {_short(was.get(f))}, is now {_short(now.get(f))}" for f in changed]


def _short(value: object) -> str:
    """`value` for a message; digests are shortened."""
    text = str(value) or "none"
    return text if len(text) <= 16 else text[:12] + "…"
