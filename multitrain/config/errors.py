"""The exception for users' mistakes, and suggestions of known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from multitrain.errors import ConfigError


def nearest(name: str, known: Iterable[str], most: int = 20) -> str:
    """A clause with the known names closest to `name`, e.g. ``did you mean 'micro_batch'?``.

    If no name is close, it lists all names (up to `most`).
    """
    names = sorted(known)
    if not names:
        return "none is known here"
    close = difflib.get_close_matches(name[:200], names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    listed = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"known here: {listed}"


__all__ = ["ConfigError", "nearest"]
