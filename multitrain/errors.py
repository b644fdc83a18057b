"""The one exception for what a user can cause. It stands below every package but `text`, so that all of them can raise it."""

from __future__ import annotations

import re

from multitrain.text import printable

_USER = re.compile(r"://[^/\s'\"@]+@")
_QUERY = re.compile(r"(://[^\s'\"?]+)\?[^\s'\"]+")


class ConfigError(ValueError):
    """A setting, file or combination that cannot work. The message is one line: what, where, and the remedy.

    What a terminal would obey in it (names and words of strangers) becomes an escape here, for all code that prints it. Of an
    address, its user, password and query are left out.
    """

    def __init__(self, message: object = "") -> None:
        text = _QUERY.sub(r"\1?…", _USER.sub("://…@", str(message)))
        super().__init__("\n".join(map(printable, text.split("\n"))))
