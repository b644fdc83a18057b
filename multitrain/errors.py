"""The one exception for what a user can cause. It stands below every package, so that all of them can raise it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or combination that cannot work. The message is one line: what, where, and the remedy."""


__all__ = ["ConfigError"]
