"""Turn every failure to read a user's file, or to write to a user's path, into a message of one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from multitrain.config.errors import ConfigError
from multitrain.config.reading import shown
from multitrain.text import quoted


@contextmanager
def understood(where: str, remedy: str) -> Iterator[None]:
    """Run a block that parses a user's file; every exception in it becomes a ConfigError of one line.

    Args:
        where: ``FILE: what is wrong with it``, for the message.
        remedy: what to do, for the message.

    Raises:
        ConfigError: the block failed; a ConfigError of the block itself gets the name of the file.
    """
    try:
        yield
    except ConfigError as error:
        file = where.partition(": ")[0]
        if type(error) is ConfigError and file not in str(error):
            raise ConfigError(f"{file}: {error}") from None
        raise
    except OSError as error:
        raise ConfigError(f"{where} ({error.strerror or error}); {remedy}") from None
    except Exception as error:  # a damaged file makes parsers raise any exception
        raise ConfigError(f"{where} ({in_words(error)}); {remedy}") from None


def refused_by_system(error: OSError) -> str:
    """The message of one line for an error of the operating system."""
    where = f"{shown(os.fsdecode(error.filename))}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the space left"


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation, e.g. ``depth=0: input should be greater than 0``."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = " ".join(first["msg"].removeprefix("Value error, ").split()).partition(", unable to parse")[0]
    if first["type"] == "extra_forbidden":
        return f"{shown(where, 80)} is an unknown option"
    if not where:
        return message
    value = f"={shown(repr(first['input']), 60)}" if first["type"] != "missing" else ""
    return f"{shown(where, 80)}{value}: {message[0].lower()}{message[1:]}"


def in_words(error: Exception) -> str:
    """An exception of a parser as a clause for a message of one line."""
    if isinstance(error, KeyError):
        return f"the entry {quoted(str(error.args[0]), 80) if error.args else ''} is missing"
    if isinstance(error, ValidationError):
        return first_problem(error)
    said = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Run a block that writes to `place`, a file or folder that a user has named.

    Raises:
        ConfigError: the operating system refused the write.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or place}: cannot be written ({error.strerror or error}); choose another place"
        ) from None
