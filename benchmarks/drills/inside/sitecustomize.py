"""Imported by every Python that a drill starts: lets a signal from outside raise an exception inside a training rank.

The exception rises at whatever bytecode the rank's main thread is, so a drill can fail a rank anywhere, and nothing of
MultiTrain is replaced.
"""

import os
import signal
import sys

EXCEPTION = signal.SIGRTMIN + 1


def _fail(number: int, frame: object) -> None:
    raise RuntimeError("a drill made this rank fail")


if "RANK" in os.environ and "multitrain.train" in sys.orig_argv:
    signal.signal(EXCEPTION, _fail)
