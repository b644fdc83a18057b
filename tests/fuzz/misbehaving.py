"""Readers that misbehave, in a module of its own: a worker that starts anew imports it, and no torch with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.fuzzing.judge import Serve, judged, taking


def misbehaving(folder: Path, captures: tuple[Path, Path]) -> Serve:
    """What judges cases of such readers, for a worker's process."""
    said = taking(captures)
    return lambda case: judged(lambda *_: misbehave(case.reader), folder, b"", (), said)


def misbehave(how: str) -> object:
    """What a reader of this name does; its exit status."""
    if how == "raises":
        raise KeyError("x")
    if how == "grows":
        return len(bytearray(b"\1") * (1_200 << 20)) and None
    if how == "too much":
        return len(bytes(1 << 40)) and None
    if how == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    while how == "hangs":
        pass
    if how == "child hangs":
        subprocess.run([sys.executable, "-c", "import os; os.setpgid(0, 0)\nwhile True: pass"], check=False)
    if how == "speaks":
        print("\x1b[31m")
    return 3 if how == "says nothing" else None
