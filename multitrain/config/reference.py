"""Every option of a run as one page of Markdown, made from the schema: ``python -m multitrain.config.reference``."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from multitrain.config.base import Settings
from multitrain.config.compose import config_folder
from multitrain.config.run import RunConfig

_HEAD = """\
# Configuration reference

<!-- Made from the schema; do not edit: python -m multitrain.config.reference > docs/configuration.md -->

A run is `configs/` put together by Hydra, changed by the `key=value` words of the command line, and checked against the schema
that this page is made from. `python launch/submit.py … dry_run=true` shows what would be submitted; `RUN/config.yaml` has
every value of a run. *Default* is the schema's; the shipped files may set another value. `python launch/submit.py … --cfg job`
prints the whole configuration that the words make, and nothing else; `--cfg all` adds what follows from it.

## How options are typed

| typed | means |
| --- | --- |
| `nodes=2`, `"dry_run = true"` | a value; blanks around `=` do not count |
| `data.root=/data/x (copy),v=2`, `data.root=~/data` | text is taken as it stands; `~` is your home. Quote it for the shell |
| `model.stages=[1,3]`, `cluster.sbatch={mail-user: me@lab.org}` | a list, a mapping |
| `data=ssv2`, `data=mine` with `--config-dir DIR` | a file of a group: `configs/data/ssv2.yaml`, `DIR/data/mine.yaml` |
| `data.root='${oc.env:SCRATCH}/data'` | an environment variable, or another option: `${data.root}` |
| `init_from=first` | a run in `runs` by its name; else a path |
| `~data.datasets.mit` | takes an entry away |

Names of other codes (`batch_size`, `learning_rate`, `TRAIN.BATCH_SIZE`, `fp16`) are answered with the option here. Several values
(`optim.lr=1e-4,2e-4`) are for `python launch/sweep.py`. Every `multitrain` verb takes the same words and `--config-dir`.
A word that would change nothing beside the others (`cluster.partition=gpu` with `cluster=local`, `loss.scope=micro` without the informative
loss) is refused with the remedy; a word that switches something off never is.
"""


def reference() -> str:
    """The page."""
    parts = [_HEAD, "## Shipped files\n", _files(), "## The run\n", _table(RunConfig, "")]
    for prefix, model in _groups(RunConfig, ""):
        parts += [f"## `{prefix[:-1]}`\n", f"{_flat(model.__doc__)}\n", _table(model, prefix)]
    return "\n".join(parts)


def _files() -> str:
    lines = ["| option | choices |", "| --- | --- |"]
    folders = sorted({file.parent for file in config_folder().glob("*/*.yaml")})
    for folder in folders:
        choices = ", ".join(f"`{file.stem}`" for file in sorted(folder.glob("*.yaml")))
        lines.append(f"| `{folder.name}=` | {choices} |")
    return "\n".join(lines) + "\n"


def _groups(model: type[Settings], prefix: str) -> Iterator[tuple[str, type[Settings]]]:
    for name, field in model.model_fields.items():
        nested, inner = _nested(field, f"{prefix}{name}")
        if nested is not None:
            yield inner, nested
            yield from _groups(nested, inner)


def _nested(field: FieldInfo, name: str) -> tuple[type[Settings] | None, str]:
    """The settings below a field and their prefix; entries of a mapping are shown as ``<name>``."""
    kind: Any = field.annotation
    prefix = f"{name}."
    if typing.get_origin(kind) is dict:
        kind, prefix = typing.get_args(kind)[1], f"{name}.<name>."
    return (kind, prefix) if isinstance(kind, type) and issubclass(kind, Settings) else (None, prefix)


def _table(model: type[Settings], prefix: str) -> str:
    lines = ["| option | values | default | what |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if _nested(field, name)[0] is None:
            cells = (f"`{prefix}{name}`", _values(field), _default(field), _flat(field.description))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    limits = []
    for rule in field.metadata:
        for sign, text in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of")):
            if getattr(rule, sign, None) is not None:
                limit = getattr(rule, sign)
                limits.append(f"{text} {limit:,}" if isinstance(limit, int) else f"{text} {limit:g}")
    return _kind(field.annotation) + (f" {', '.join(limits)}" if limits else "")


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("`null`" if a is type(None) else _kind(a) for a in arguments)
    if origin in (list, tuple):
        return "list of " + _kind(next(a for a in arguments if a is not Ellipsis))
    if origin is dict:
        return f"mapping to {_kind(arguments[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.default if field.default is not PydanticUndefined else None
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    elif field.is_required():
        return "must be given"
    shown = (
        {None: "null", True: "true", False: "false"}.get(value, value)
        if isinstance(value, (bool, type(None)))
        else value
    )
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`" if shown != "" else "empty"


def _flat(text: str | None) -> str:
    return " ".join((text or "").split()).replace("<name>", "`<name>`")


if __name__ == "__main__":
    import sys

    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")
