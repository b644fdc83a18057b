"""Generate a Markdown page with every option of a run from the schema: ``python -m multitrain.config.reference``."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from multitrain.config.base import Settings
from multitrain.config.compose import config_folder
from multitrain.config.run import RunConfig
from multitrain.config.schema import fields, group

_HEAD = """\
# Configuration reference

<!-- Generated from the schema; do not edit: python -m multitrain.config.reference > docs/configuration.md -->

Hydra composes the configuration of a run from `configs/`; the `key=value` arguments of the command line change it, and the schema,
from which this page is generated, checks it. `python launch/submit.py … dry_run=true` shows what would be submitted;
`RUN/config.yaml` has every value of a run. *Default* is the schema's; the shipped files may set another value.
`python launch/submit.py … --cfg job` prints the complete configuration and nothing else; `--cfg all` adds the values derived from it.

## How options are typed

| typed | means |
| --- | --- |
| `nodes=2`, `"dry_run = true"` | a value; spaces around `=` are ignored |
| `data.root=/data/x (copy),v=2`, `data.root=~/data` | text is used literally; `~` is your home folder. Quote it for the shell |
| `model.stages=[1,3]`, `cluster.sbatch={mail-user: me@lab.org}` | a list, a mapping |
| `data=ssv2`, `data=mine` with `--config-dir DIR` | a file of a group: `configs/data/ssv2.yaml`, `DIR/data/mine.yaml` |
| `data.root='${oc.env:SCRATCH}/data'` | an environment variable, or another option: `${data.root}` |
| `init_from=first` | the name of a run in `runs`; else a path |
| `~data.datasets.mit` | removes an entry |

For option names of other projects (`batch_size`, `learning_rate`, `TRAIN.BATCH_SIZE`, `fp16`) the error names the option here.
Several values (`optim.lr=1e-4,2e-4`) are for `python launch/sweep.py`. Every `multitrain` verb accepts the same arguments and
`--config-dir`.

An override that has no effect beside the others (`cluster.partition=gpu` with `cluster=local`, `loss.scope=micro` without the informative
loss) is noted on standard error with the remedy; one that another option replaces (`epochs` beside `updates`) is refused.
"""


def reference() -> str:
    """The page."""
    parts = [_HEAD, "## Shipped files\n", _files(), "## The run\n", _table(RunConfig, "")]
    for name, field in fields().items():
        model, between = group(field)
        if model is not None:
            title = (name + between)[:-1]
            parts += [f"## `{title}`\n", f"{_flat(model.__doc__)}\n", _table(model, f"{title}.")]
    return "\n".join(parts)


def _files() -> str:
    lines = ["| option | choices |", "| --- | --- |"]
    folders = sorted({file.parent for file in config_folder().glob("*/*.yaml")})
    for folder in folders:
        choices = ", ".join(f"`{file.stem}`" for file in sorted(folder.glob("*.yaml")))
        lines.append(f"| `{folder.name}=` | {choices} |")
    return "\n".join(lines) + "\n"


def _table(model: type[Settings], prefix: str) -> str:
    lines = ["| option | values | default | what |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if group(field)[0] is None:
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
    names = {int: "whole number", float: "number", str: "text", bool: "`true` `false`", ByteSize: "bytes, e.g. `200G`,"}
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
