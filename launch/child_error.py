"""The error message for a child process that failed."""

from __future__ import annotations

import platform

from multitrain.cluster.exit_status import Exit, describe_exit
from multitrain.text import printable


def child_error(what: str, code: int, stderr: str, remedy: str) -> str:
    """One line about a child process that failed.

    If it refused its input (exit status 2), its own last line; else what died, on which node, by which signal or exit status,
    with the last line of its standard error and the remedy.

    Args:
        what: the process, as the subject of a sentence.
        code: its exit status; negative for a signal, as in `subprocess`.
        stderr: its standard error.
        remedy: what to do when it died.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if code == Exit.MISTAKE and lines:
        return lines[-1].removeprefix("error: ")
    last = f"; its last line is '{printable(lines[-1])[:300]}'" if lines else ""
    return f"{what} {describe_exit(code)} on {platform.node()}{last}; {remedy}"


__all__ = ["child_error"]
