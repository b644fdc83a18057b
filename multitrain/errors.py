"""The one exception for what a user can cause. It stands below every package but `text`, so that all of them can raise it."""

from __future__ import annotations

from multitrain.text import printable


class ConfigError(ValueError):
    """A setting, file or combination that cannot work. The message is one line: what, where, and the remedy.

    What a terminal would obey in it (names and words of strangers) becomes an escape here, for all code that prints it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(printable, str(message).split("\n"))))
