"""Parse command lines of `multitrain VERB`: argparse with errors of one line, and ``key=value`` at any position."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from multitrain.config.aliases import suggestion
from multitrain.config.boundary import refused_by_system
from multitrain.config.errors import ConfigError
from multitrain.config.overrides import tidy
from multitrain.config.paths import refuse_private
from multitrain.config.reading import shown

Arguments = Sequence[str]
MISTAKE = 2
"""Exit status of a command with a wrong option, or an input that it cannot use."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with errors of one line, whose description keeps its lines, and without abbreviated options."""

    def __init__(self, prog: str, description: str | None, **more: Any) -> None:
        more = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **more}
        super().__init__(prog=prog, description=description, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


class Parser(OneLineParser):
    """The parser of a verb.

    Args:
        verb: the words after ``multitrain`` on the command line, e.g. ``evaluate`` or ``data check``.
        description: what the verb does.
        examples: complete command lines that work.
    """

    def __init__(self, verb: str, description: str, *examples: str) -> None:
        lines = ["examples:" if len(examples) > 1 else "example:", *(f"  {e}" for e in examples)]
        super().__init__(f"multitrain {verb}", description, epilog="\n".join(lines))
        self.add_argument(
            "--config-dir",
            action="append",
            default=[],
            metavar="DIR",
            help="folder with your own config groups, e.g. DIR/data/mine.yaml for data=mine",
        )

    def add_overrides(self, example: str) -> None:
        """Accept any number of ``key=value`` as ``overrides``; parse with :meth:`parse_with_overrides`."""
        self.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"options, e.g. {example}")

    def parse_with_overrides(self, arguments: Arguments) -> argparse.Namespace:
        """Like `parse_args`, but with ``key=value`` at any position, even after ``--dataset a b``."""
        with_value = {option for action in self._actions if action.nargs is None for option in action.option_strings}
        overrides: list[str] = []
        rest: list[str] = []
        takes_value = False
        for text in arguments:
            is_override = not takes_value and not text.startswith("-") and "=" in text and not os.path.exists(text)
            (overrides if is_override else rest).append(text)
            takes_value = text in with_value
        given = self.parse_args(rest)
        given.overrides = [*given.overrides, *map(tidy, overrides)]
        return given

    def add_model(self, what: str) -> None:
        """Accept a model as the first positional argument, or by the older options ``--checkpoint`` and ``--run``."""
        self.add_argument("model", nargs="?", metavar="MODEL", help=what)
        self.add_argument("--checkpoint", "--run", dest="checkpoint", metavar="MODEL", help="the same (older options)")

    def model_and_words(
        self, given: argparse.Namespace, words: Sequence[str], *, needs: str = ""
    ) -> tuple[str, list[str]]:
        """The model, and the other positional arguments.

        Args:
            words: positional arguments after the model, in order.
            needs: name of these arguments, if at least one is required.

        Raises:
            ConfigError: this user may not read the model's folder.
        """
        plain = [w for w in (given.model, *words) if w is not None]
        model = given.checkpoint if given.checkpoint is not None else plain.pop(0) if plain else None
        if model is None or (needs and not plain):
            self.error(f"the following arguments are required: {', '.join(x for x in ('MODEL', needs) if x)}")
        refuse_private(Path(model))
        return model, plain


def piped(main: Callable[[], int]) -> int:
    """Run `main` as an entry point, and return its exit status.

    A closed output pipe (``| head``), and characters that the output's encoding lacks, are not errors.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # a stdout without a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def answered(run: Callable[[], int], name: str = "error") -> int:
    """The exit status of `run`; what a user can mend by the text is one line on standard error, and status 2.

    Args:
        name: what the line starts with.
    """
    try:
        return run()
    except ConfigError as error:
        for line in getattr(error, "details", ()):
            print(line, file=sys.stderr)
        print(f"{name}: {shown(error, 2000)}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise  # for `piped`
    except OSError as error:
        print(f"{name}: {refused_by_system(error)}", file=sys.stderr, flush=True)
        return MISTAKE


def typed_words(words: Sequence[str]) -> list[str]:
    """The plain and ``key=value`` words of submit and sweep, without blanks around ``=``.

    Raises:
        ConfigError: one of them is a flag that there is not.
    """
    for word in words:
        if word.startswith("-"):
            hint = suggestion(word)
            remedy = f", e.g. {hint}" if hint else ", see --help"
            raise ConfigError(f"unknown flag {shown(word, 80)!r}; options are key=value{remedy}")
    return [tidy(word) for word in words]


def whole_number(text: str) -> int:
    """Parse an integer of at least 1, for `type=`."""
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def pair(text: str, option: str) -> tuple[str, str]:
    """Split ``DATASET=FILE``. Raises ConfigError: it has another form."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ConfigError(f"{option} {text!r}: write DATASET=FILE")
    return name, value
