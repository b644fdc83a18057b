"""Refuse typed overrides that have no effect, or that would train in an unintended way.

Stored configurations are not checked here: a run that was submitted continues unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multitrain.config.compose import dump
from multitrain.config.errors import ConfigError
from multitrain.config.overrides import Override, split, value_of
from multitrain.config.run import RunConfig
from multitrain.config.without_effect import REPLACED, idle


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
        _refuse_boolean_number(override, config)
        if override.key in REPLACED and (line := _idle(override, config)):
            raise ConfigError(line)
    for name, weight in config.loss.dataset_weights.items():
        if weight < 0 and (before is None or before.loss.dataset_weights.get(name) != weight):
            raise ConfigError(
                f"loss.dataset_weights.{name}={weight:g}: a weight below 0 trains away from the labels; use 0 or more"
            )
    if config.eval.every is not None or config.then == "eval":
        _refuse_small_test_sides(config, before)


def _refuse_boolean_number(override: Override, config: RunConfig) -> None:
    """Refuse ``gpus=true``, which pydantic would take for 1."""
    if override.text is None or not isinstance(value_of(override), bool):
        return
    if type(_value_in(config, override.key)) in (int, float):
        raise ConfigError(f"{override.word}: a number is needed, e.g. {override.key}=1")


def _value_in(config: RunConfig, key: str) -> Any:
    """The value of an option by its dotted name; None when there is none."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _refuse_empty_mapping(override: Override, config: RunConfig) -> None:
    if override.text is None or override.text.replace(" ", "") != "{}" or value_of(override) != {}:
        return
    if node := _value_in(config, override.key):
        raise ConfigError(
            f"{override.word}: changes nothing, since mappings are added to; ~{override.key}.NAME takes an entry away "
            f"(there are {', '.join(list(node)[:6])})"
        )


def equal_pair(configs: Sequence[RunConfig]) -> tuple[int, int] | None:
    """The positions of the first two configurations that differ in the name at most, the later one first; None if there are none."""
    known: dict[str, int] = {}
    for number, config in enumerate(configs):
        earlier = known.setdefault(dump(config.model_copy(update={"name": None})), number)
        if earlier != number:
            return number, earlier
    return None


def idle_words(words: Sequence[str], config: RunConfig) -> list[str]:
    """One line about each word that changes nothing because of other options, with what to do; none about words that switch
    something off.

    Args:
        words: overrides that are typed now.
        config: what they make, with everything else.
    """
    typed = {override.key: override for override in map(split, words)}
    return [line for override in typed.values() if (line := _idle(override, config))]


def _idle(override: Override, config: RunConfig) -> str | None:
    found = idle(override.key)
    value = None if override.deletes else value_of(override)
    if found is None or value is None or value is False or value in ([], {}):
        return None
    is_unused, why = found
    return f"{override.word}: changes nothing, since {why.format(config)}" if is_unused(config) else None


def _refuse_small_test_sides(config: RunConfig, before: RunConfig | None) -> None:
    crop = config.model.crop
    for name, dataset in config.data.datasets.items():
        earlier = before.data.datasets.get(name) if before else None
        side = dataset.test_short_side
        if side is not None and side < crop and (earlier is None or earlier.test_short_side != side):
            raise ConfigError(
                f"data.datasets.{name}.test_short_side={side}: smaller than model.crop={crop}; use at least {crop}"
            )
