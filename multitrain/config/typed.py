"""Refuse typed overrides that have no effect, or that would train in an unintended way.

Stored configurations are not checked here: a run that was submitted continues unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from multitrain.config.errors import ConfigError
from multitrain.config.overrides import Override, split, value_of
from multitrain.config.run import RunConfig

WITHOUT_EFFECT: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "epochs": (
        lambda c: c.updates is not None,
        "the run's length is updates={0.updates}; add updates=null, or leave it out",
    ),
    "optim.warmup_epochs": (
        lambda c: c.optim.warmup_updates is not None,
        "the warm-up is optim.warmup_updates={0.optim.warmup_updates}; add optim.warmup_updates=null, or leave it out",
    ),
    "data.temperature": (
        lambda c: c.data.proportions != "temperature" and c.data.temperature != 1,
        "data.proportions is {0.data.proportions}; add data.proportions=temperature, or leave it out",
    ),
}
"""Options that another option overrides: the condition, and the message with the remedy."""


def refuse_typed(words: Sequence[str], config: RunConfig, before: RunConfig | None = None) -> None:
    """Refuse overrides that cannot have the effect that they express.

    Args:
        words: the newly typed overrides.
        config: the resulting configuration.
        before: the configuration of the run that they change; None for a new run.

    Raises:
        ConfigError: one line that names the override and the remedy.
    """
    typed = {override.key: override for override in map(split, words)}
    for override in typed.values():
        _refuse_empty_mapping(override, config)
    for option, (is_unused, why) in WITHOUT_EFFECT.items():
        if option in typed and not typed[option].deletes and is_unused(config):
            raise ConfigError(f"{typed[option].word}: changes nothing, since {why.format(config)}")
    for name, weight in config.loss.dataset_weights.items():
        if weight < 0 and (before is None or before.loss.dataset_weights.get(name) != weight):
            raise ConfigError(
                f"loss.dataset_weights.{name}={weight:g}: a weight below 0 trains away from the labels; use 0 or more"
            )
    if config.eval.every is not None or config.then == "eval":
        _refuse_small_test_sides(config, before)


def _refuse_empty_mapping(override: Override, config: RunConfig) -> None:
    if override.text is None or override.text.replace(" ", "") != "{}" or value_of(override) != {}:
        return
    node: Any = config.model_dump(mode="json")
    for part in override.key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node:
        raise ConfigError(
            f"{override.word}: changes nothing, since mappings are added to; ~{override.key}.NAME takes an entry away "
            f"(there are {', '.join(list(node)[:6])})"
        )


def _refuse_small_test_sides(config: RunConfig, before: RunConfig | None) -> None:
    crop = config.model.crop
    for name, dataset in config.data.datasets.items():
        earlier = before.data.datasets.get(name) if before else None
        side = dataset.test_short_side
        if side is not None and side < crop and (earlier is None or earlier.test_short_side != side):
            raise ConfigError(
                f"data.datasets.{name}.test_short_side={side}: smaller than model.crop={crop}; use at least {crop}"
            )


__all__ = ["WITHOUT_EFFECT", "refuse_typed"]
