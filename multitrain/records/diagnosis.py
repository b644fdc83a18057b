"""What an expert would notice in the metrics of a run, each with a remedy: for its log, its status and its report. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from multitrain.config import RunConfig

WINDOW = 100
"""Updates over which means are taken; with fewer of them, nothing is noticed."""

Records = Sequence[Mapping[str, Any]]
"""Records of ``metrics.jsonl``, in order."""


class Finding(NamedTuple):
    """Something unusual in a run."""

    kind: str
    """A word for what it is about; of every kind a log tells one."""
    text: str
    """What was seen, with figures."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


def diagnose(
    records: Records,
    config: RunConfig,
    total_updates: int | None = None,
    validation: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Finding]:
    """The findings in consecutive `records`.

    Args:
        records: the newest ones of a run, or all.
        config: of the run.
        total_updates: length of the run, if known.
        validation: the last results, by dataset in percent.
    """
    if len(records) < WINDOW:
        return []
    recent = records[-WINDOW:]
    found = [*_gradients(records), *_spikes(records), *_loader(recent, config), *_rate(recent, config)]
    found += [
        *_informative(recent, config),
        *_heads(recent, config, total_updates),
        *_validation(recent, config, validation or {}),
    ]
    return found


def _gradients(records: Records) -> Iterator[Finding]:
    norms = [(r["update"], r["grad_norm"]) for r in records if r.get("grad_norm") is not None]
    if len(norms) < WINDOW // 2:
        return
    usual = median(norm for _, norm in norms)
    large = [(update, norm) for update, norm in norms if usual > 0 and norm >= 100 * usual]
    if large:
        update, norm = max(large, key=lambda item: item[1])
        yield Finding(
            "gradient",
            f"the gradient norm was {norm:.3g} at update {update}, {norm / usual:.0f} × its median "
            f"({len(large)} of {len(norms)} updates are above 100 ×)",
            "a smaller optim.lr or a longer optim.warmup_epochs; see which videos with data check",
        )


def _spikes(records: Records) -> Iterator[Finding]:
    losses = [(r["update"], r["loss"]) for r in records if r.get("loss") is not None]
    spikes = []
    for place in range(50, len(losses)):
        before = [loss for _, loss in losses[place - 50 : place]]
        usual = median(before)
        spread = median(abs(loss - usual) for loss in before)
        if losses[place][1] > max(2 * usual, usual + 10 * spread):
            spikes.append(losses[place])
    if spikes:
        update, loss = max(spikes, key=lambda item: item[1])
        yield Finding(
            "spike",
            f"{len(spikes)} of {len(losses)} updates have a loss of more than twice the median of the 50 before "
            f"(the largest {loss:.3g} at update {update})",
            "a smaller optim.lr, a longer warm-up, or optim.clip_norm=1",
        )


def _loader(recent: Records, config: RunConfig) -> Iterator[Finding]:
    waits = [r["data_wait_fraction"] for r in recent if r.get("data_wait_fraction") is not None]
    if not waits or fmean(waits) < 0.2:
        return
    wait = min(fmean(waits), 0.95)
    now = config.data.workers
    more = f"data.workers={math.ceil(now / (1 - wait))} (now {now}) if there are cores for them, " if now else ""
    on_cpu = all(r.get("device") == "cpu" for r in recent)
    yield Finding(
        "loader",
        f"ranks waited for videos {wait:.0%} of the last {len(waits)} updates",
        ("" if on_cpu else more) + "smaller videos (multitrain data resize), or a faster disk (data.stage)",
    )


def _rate(recent: Records, config: RunConfig) -> Iterator[Finding]:
    zero = [r["update"] for r in recent if r.get("lr") == 0.0]
    if len(zero) >= WINDOW // 2:
        yield Finding(
            "learning rate",
            f"the learning rate was 0 in {len(zero)} of the last {len(recent)} updates",
            f"optim.end_lr is {config.optim.end_lr:g} and optim.start_lr {config.optim.start_lr:g}: raise the one that applies",
        )


def _informative(recent: Records, config: RunConfig) -> Iterator[Finding]:
    weight = config.loss.informative_weight
    shares = [
        weight * r["loss_informative"] / r["loss"]
        for r in recent
        if weight and r.get("loss_informative") is not None and (r.get("loss") or 0) > 0
    ]
    if shares and fmean(shares) > 0.8:
        yield Finding(
            "informative",
            f"the informative loss is {fmean(shares):.0%} of the total",
            f"a smaller loss.informative_weight (now {weight:g}), or a larger batch",
        )


def _heads(recent: Records, config: RunConfig, total: int | None) -> Iterator[Finding]:
    late = total is not None and recent[-1]["update"] >= max(3 * total // 10, 3 * WINDOW)
    for name, dataset in config.data.datasets.items():
        losses = _own(recent, name)
        if not losses and any(r.get("loss_per_dataset") for r in recent):
            yield Finding(
                f"head {name}",
                f"{name}: no video in the last {len(recent)} updates, so its head learns nothing",
                "raise its share (data.proportions), or leave the dataset out",
            )
        elif losses and late and _classes(dataset) and fmean(losses) >= 0.98 * math.log(_classes(dataset)):
            yield Finding(
                f"head {name}",
                f"{name}: its loss is still {fmean(losses):.2f}, that of guessing among {_classes(dataset)} classes",
                "look at the labels with data show and data check; else a larger optim.lr or weights to start from (init_from)",
            )


def _validation(recent: Records, config: RunConfig, validation: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    for name, result in validation.items():
        dataset = config.data.datasets.get(name)
        if dataset is None or _classes(dataset) < 3 or result.get("top1") is None:
            continue
        losses, classes = _own(recent, name), _classes(dataset)
        if losses and fmean(losses) < 0.5 * math.log(classes) and result["top1"] <= 120 / classes:
            yield Finding(
                f"labels {name}",
                f"{name}: trains well (loss {fmean(losses):.2f}), but its validation is at chance ({result['top1']:.1f} %)",
                "val.csv seems to number its classes otherwise than train.csv; compare both with the class list",
            )


def _own(recent: Records, name: str) -> list[float]:
    """The losses of a dataset's own head, where it had videos."""
    values = [(r.get("loss_per_dataset") or {}).get(name) for r in recent]
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _classes(dataset: Any) -> int:
    """The number of classes of a dataset with one label a video; else 0."""
    return 0 if dataset.multi_label else int(dataset.classes or 0)
