"""A rank process for test_stopping and others: trains, and lingers in the phase that its second argument names.

``stall``: rank 0's videos of update 2 never come. ``collective``: rank 1 sits for three seconds before an agreement in update
2, in which rank 0 waits. ``save``, ``last-save``: writing takes two seconds. ``evaluation``: every video takes half a second.
``hang``: rank 1 stops dead in update 2. ``start``: joining takes two seconds. ``error``, ``memory``: rank 1 fails in update 2.
``slow-disk``: writing takes until somebody waits for it, and a bit. ``stale``: rank 1 sees an empty folder of checkpoints.
``slow``: rank 1 takes a tenth of a second longer for every forward pass of updates 2 to 7.
``beats``: the log tells of every sign of life to the watchdog, and of every wait for a save.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitrain import train

RANK = int(os.environ["RANK"])


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Run `action` before every call of ``owner.name``."""
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        action(*arguments)
        return real(*arguments, **named)

    setattr(owner, name, wrapped)


def say(phase: str) -> None:
    """Tell the test that the phase has come."""
    Path(sys.argv[1], f"in-{phase}-{RANK}").touch()


def log(what: str) -> None:
    """A line of its own in the log of both ranks, by one system call."""
    os.write(1, f"\n{what} {RANK}\n".encode())


def pause(phase: str, seconds: float) -> None:
    say(phase)
    time.sleep(seconds)


def linger(phase: str) -> None:
    from multitrain.data import loader
    from multitrain.engine import checkpoint, distributed
    from multitrain.engine.checkpoint_policy import CheckpointPolicy
    from multitrain.engine.saver import Saver
    from multitrain.engine.trainer import Trainer
    from multitrain.engine.watchdog import Watchdog
    from multitrain.model import MultiTrain

    now: dict[str, Any] = {"update": -1}
    before(Trainer, "_one_update", lambda trainer: now.update(update=trainer.completed, loader=trainer._loader))

    def third(action: Callable[[], None]) -> Callable[..., None]:
        return lambda *_: action() if now["update"] == 2 else None

    if phase == "stall" and RANK == 0:

        def stalled() -> None:
            say(phase)
            now["loader"].next_batch = lambda timeout: time.sleep(timeout)

        before(Trainer, "_micro_batches", third(stalled))
    elif phase == "collective":

        def late() -> None:
            say(phase)
            time.sleep(3.0 if RANK == 1 else 0.0)

        before(Trainer, "_micro_batches", third(late))
    elif phase in ("save", "last-save") and RANK == 0:
        before(checkpoint, "write", lambda *_: pause(phase, 2.0))
    elif phase == "slow-disk":
        waited = threading.Event()
        before(Saver, "start", lambda *_: waited.clear())
        before(Saver, "finish", lambda *_: waited.set())
        before(checkpoint, "write", lambda *_: time.sleep(0.2 if waited.wait(60) else 0))
    elif phase == "slow" and RANK == 1:
        before(MultiTrain, "outputs", lambda *_: time.sleep(0.1 if 2 <= now["update"] < 8 else 0))
    elif phase == "stale" and RANK == 1:
        checkpoint.listed = lambda folder: []
    elif phase == "beats":
        before(Watchdog, "heartbeat", lambda *_: log("beat"))
        before(CheckpointPolicy, "_end_save", lambda *_: log("end"))
        before(Saver, "finish", lambda *_: log("finish"))
    elif phase == "evaluation":
        before(loader.EvalLoader, "next_video", lambda *_: pause(phase, 0.5))
    elif phase == "start":
        before(distributed.dist, "init_process_group", lambda *_: pause(phase, 2.0))
    elif phase == "hang" and RANK == 1:
        before(Trainer, "_micro_batches", third(lambda: pause(phase, 600.0)))
    elif phase in ("error", "memory") and RANK == 1:

        def fail() -> None:
            say(phase)
            raise MemoryError("no memory left") if phase == "memory" else ValueError("a bug")

        before(Trainer, "_micro_batches", third(fail))


if __name__ == "__main__":
    linger(sys.argv[2])
    os._exit(train.main([sys.argv[1]]))
