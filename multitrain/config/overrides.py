"""Parse typed ``key=value`` overrides, so that any path works unquoted and every mistake is a message of one line.

The value of an option that is text in the schema is used literally. Numbers, lists and mappings are parsed with Hydra's grammar,
in which parentheses, ``~``, ``=`` and commas have a meaning.
"""

from __future__ import annotations

import itertools
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitrain.config.errors import ConfigError, nearest
from multitrain.config.reading import parse_yaml, shown
from multitrain.config.schema import option_type

LONGEST_WORD = 20_000
"""Limit of the length of one override, in characters."""
DEEPEST_WORD = 20
"""Limit of nested brackets in one override."""
MOST_COMBINATIONS = 10_000
"""Limit of the runs of one sweep."""
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Override:
    """One typed override."""

    prefix: str
    """``""``, ``+``, ``++`` or ``~`` (delete)."""
    key: str
    """The option's dotted name, or a config group."""
    text: str | None
    """The text after ``=``; None for ``~key``."""

    @property
    def word(self) -> str:
        """The override as it is typed, without spaces around ``=``."""
        return f"{self.prefix}{self.key}" + ("" if self.text is None else f"={self.text}")

    @property
    def deletes(self) -> bool:
        """Whether it removes an option."""
        return self.prefix == "~"


def split(word: str) -> Override:
    """Split an override into its parts. Raises ConfigError: it is not ``key=value``, or the key is not valid."""
    if len(word) > LONGEST_WORD:
        raise ConfigError(f"{shown(word, 60)}: {len(word)} characters in one option; put long values into a YAML file")
    if "\0" in word or "\n" in word:
        raise ConfigError(f"{shown(word, 80)!r}: line breaks cannot stand in an option; write it in one line")
    left, equals, right = word.partition("=")
    left = left.strip().removeprefix("override ").strip()
    prefix = next((p for p in ("++", "+", "~") if left.startswith(p)), "")
    key = left[len(prefix) :].strip()
    if not equals and prefix != "~":
        raise ConfigError(f"{shown(word, 80)!r} is no override; write key=value, e.g. nodes=2 or cluster.partition=low")
    if not key or any(not part for part in key.split(".")) or set(key) & set("[]{}()'\"$,"):
        raise ConfigError(
            f"{shown(word, 80)!r}: {shown(key, 60)!r} is no option's name; write key=value, e.g. optim.lr=1e-4"
        )
    return Override(prefix, key, right.strip() if equals else None)


def tidy(word: str) -> str:
    """An override without the spaces around ``=``; other arguments, and invalid ones, stay as they are."""
    left, equals, right = word.partition("=")
    return f"{left.strip()}={right.strip()}" if equals and not word.startswith("-") else word


def is_group(key: str, groups: Collection[str]) -> bool:
    """Whether a key selects a file of a config group."""
    return key.split("@")[0] in groups or "/" in key or key.startswith("hydra")


def group_word(override: Override, folders: Sequence[Path], has_default: bool) -> str:
    """The selection of a config group in Hydra's grammar.

    Args:
        folders: the folders with config groups.
        has_default: whether the shipped configuration selects a file of this group, which the override replaces.

    Raises:
        ConfigError: the value is not the name of a file of the group.
    """
    key, text = override.key, override.text
    if override.deletes or key.startswith("hydra"):
        if isinstance(_hydra(text or "", override.word), (_Unreadable, _Several)):
            remedy = f"write ~{key}" if override.deletes else f"write {key}='…', with the value in quotation marks"
            raise ConfigError(f"{shown(override.word, 100)}: cannot be read; {remedy}")
        return override.word
    group = key.split("@")[0]
    known = sorted({p.stem for f in folders for p in (f / group).glob("*.yaml")})
    if text and (text.endswith((".yaml", ".yml")) or ("/" in text and not text.startswith("["))):
        raise ConfigError(_file_for_group(group, Path(text), known))
    chosen = _hydra(text or "")
    names = chosen if isinstance(chosen, list) else [chosen]
    if isinstance(chosen, _Several):
        raise ConfigError(
            f"{key}={text}: one {group} for a run; python launch/sweep.py starts a run for each of several"
        )
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{override.word}: {group} is chosen by name; {nearest(str(text), known)}")
    return f"{'' if has_default else '+'}{key}={text}"


def _file_for_group(group: str, file: Path, known: Sequence[str]) -> str:
    name, parent = file.stem, file.parent
    if name in known and (str(parent) == "." or not file.exists()):
        return f"{group}={file}: {group} is chosen by name; write {group}={name}"
    home = parent.parent if parent.name == group else Path("DIR")
    move = "" if parent.name == group else f"put the file at DIR/{group}/{name}.yaml and "
    return f"{group}={file}: {group} is chosen by name, not by path; {move}write --config-dir {home} {group}={name}"


def value_of(override: Override) -> Any:
    """The value of an override, before the schema checks it.

    Raises:
        ConfigError: unbalanced brackets, or several values.
    """
    key, text = override.key, override.text or ""
    kinds = _members(option_type(key))
    read = _hydra(text)
    if is_text(key):
        return read if read is None or isinstance(read, str) else text
    if not isinstance(read, (_Several, _Unreadable)):
        return read
    if text[:1] in ("[", "{"):
        return _bracketed(key, text)
    if str in kinds:
        return text
    if isinstance(read, _Several) and kinds:
        is_list = any(typing.get_origin(kind) in (list, tuple) for kind in kinds)
        remedy = (
            f"write {key}=[{text}]" if is_list else "give one; python launch/sweep.py starts a run for each of several"
        )
        raise ConfigError(f"{key}={shown(text, 80)}: several values; {remedy}")
    return text


class NotListed(ConfigError):
    """Several values that only a sweeper of Hydra's can count, such as ``interval(0,1)``."""


def alternatives(word: str) -> list[str]:
    """The words that a typed one stands for: ``key=a,b`` for ``key=a`` and ``key=b``; else itself.

    Raises:
        ConfigError: no override, or no value.
        NotListed: the values cannot be listed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(word)
    except HydraException:
        if not is_text(split(word).key):  # a path such as ~/data is one value
            raise ConfigError(f"{shown(word, 100)!r} is not an option; write key=a,b for several values") from None
        return [word]
    if not parsed.is_sweep_override():
        return [word]
    try:
        found = list(itertools.islice(parsed.sweep_string_iterator(), MOST_COMBINATIONS + 1))
    except (HydraException, ValueError):
        raise NotListed(f"{shown(word, 100)}: these values cannot be listed; write them out, key=a,b") from None
    if not found:
        raise ConfigError(f"{shown(word, 100)}: no value; write key=a,b for several values")
    key = word.partition("=")[0]
    return [f"{key}={value}" for value in found]


def readable(word: str) -> str:
    """A word in Hydra's grammar: a text that the grammar would refuse, such as ``data.root=(x``, stands in quotation marks."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        key, equals, text = word.partition("=")
        return f"{key}{equals}{in_quotes(text)}" if equals and is_text(split(word).key) else word
    return word


def in_quotes(text: str) -> str:
    """A text as a quoted value of Hydra's grammar, in which backslashes count before a quotation mark only."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def combinations(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the :func:`alternatives` of words, the last word's changing first.

    Raises:
        ConfigError: as there; or there are too many.
    """
    axes = [alternatives(word) for word in words]
    if math.prod(map(len, axes)) > MOST_COMBINATIONS:
        longest = max(words, key=lambda word: len(alternatives(word)))
        raise ConfigError(
            f"{shown(longest, 100)}: more than {MOST_COMBINATIONS} combinations in one sweep; give fewer values, or cut it in several"
        )
    return [list(point) for point in itertools.product(*axes)]


def is_text(key: str) -> bool:
    """Whether an option is text in the schema, so that its value is used literally."""
    kinds = _members(option_type(key)) - {type(None)}
    return bool(kinds) and all(kind is str or isinstance(kind, str) for kind in kinds)


def _bracketed(key: str, text: str) -> Any:
    """A list or mapping that Hydra's grammar refuses, parsed as YAML, which accepts ``~`` and parentheses in texts."""
    opened = []
    for c in text:
        if c in _BRACKETS:
            opened.append(_BRACKETS[c])
        elif opened and c == opened[-1]:
            opened.pop()
    if opened:
        raise ConfigError(f"{key}={shown(text, 80)}: a closing {opened[-1]} is missing")
    try:
        return parse_yaml(text, key)
    except ConfigError:
        raise ConfigError(
            f"{key}={shown(text, 80)}: not a list or mapping; write [a, b] or {{name: value}}, with quotation marks around texts"
        ) from None


class _Several:
    """Several values: a sweep in Hydra's grammar."""


class _Unreadable:
    """Not in Hydra's grammar."""


def _hydra(text: str, word: str | None = None) -> Any:
    """A value parsed with Hydra's grammar, or the reason why it cannot be; `word`: the complete override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    depth = deepest = 0
    for c in text:
        depth += (c in _BRACKETS) - (c in _BRACKETS.values())
        deepest = max(deepest, depth)
    if deepest > DEEPEST_WORD:
        return _Unreadable()
    try:
        parsed = OverridesParser.create().parse_override(word or f"k={text}")
        return _Several() if parsed.is_sweep_override() else parsed.value()
    except (HydraException, ValueError, TypeError, RecursionError):
        return _Unreadable()


def _members(kind: Any) -> set[Any]:
    """The types that an annotation allows; for a Literal, its values."""
    if kind is None:
        return set()
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return {m for part in typing.get_args(kind) for m in (_members(part) or {part})}
    if typing.get_origin(kind) is typing.Literal:
        return set(typing.get_args(kind))
    return {kind}


def apply(config: Any, override: Override) -> None:
    """Set or remove an option of a composed configuration (an OmegaConf DictConfig).

    Raises:
        ConfigError: the value cannot be parsed, or the option to remove does not exist.
    """
    from omegaconf import OmegaConf, open_dict

    if not override.deletes:
        OmegaConf.update(config, override.key, value_of(override), merge=True, force_add=True)
        return
    *parents, last = override.key.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    if not isinstance(node, Mapping) and not OmegaConf.is_dict(node):
        node = {}
    if last not in node:
        raise ConfigError(
            f"~{override.key}: there is no {override.key} to take away; {nearest(last, map(str, node), most=100)}"
        )
    with open_dict(config):
        del node[last]
