"""Why a program that was asked something gave no answer."""

from __future__ import annotations

import platform

from multitrain.cluster.exit_status import Exit, explained
from multitrain.text import printable


def complaint(what: str, code: int, stderr: str, remedy: str) -> str:
    """Why a program failed, in one line.

    One that refuses something in words of its own (exit status 2) is quoted; of one that died it is said what died, where
    and how, with the last line of its standard error, if there is one, and the remedy.

    Args:
        what: the program, as the subject of a sentence.
        code: its exit status; negative for a signal, as `subprocess` has it.
        stderr: all that it wrote there.
        remedy: what to do when it died.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code == Exit.MISTAKE and lines:
        return lines[-1].removeprefix("error: ")
    last = f"; its last line is '{printable(lines[-1])[:300]}'" if lines else ""
    return f"{what} {explained(code)} on {platform.node()}{last}; {remedy}"


__all__ = ["complaint"]
