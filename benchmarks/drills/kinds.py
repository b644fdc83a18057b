"""The kinds of interruption: for each one the fault on each backend, and the number of updates that it may lose there."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.drills import run as local_run
from benchmarks.drills import strikes_controller as far
from benchmarks.drills import strikes_local as here
from benchmarks.drills.inside.sitecustomize import EXCEPTION
from benchmarks.drills.strikes_controller import JobUnderTest
from benchmarks.drills.strikes_local import Fault

BACKENDS = ("local", "controller")
"""Local processes (`cluster=local`), and jobs of a real SLURM controller."""


@dataclass(frozen=True)
class Local:
    """A fault of local processes.

    `inject`: injects the fault. `may_lose`: completed updates that it may lose. `after`: called when the run has ended, before it is
    submitted again. `passes`: whether the run may continue without ending. `undo`: reverts lasting effects of the fault. `moment`:
    the first update from `at` on at which the fault applies. `last`: whether it is injected at the end of a run.
    """

    inject: Fault
    may_lose: int = 0
    passes: bool = False
    after: Fault | None = None
    undo: Fault | None = None
    moment: Callable[[int], int] = lambda at: at
    last: bool = False


@dataclass(frozen=True)
class Controlled:
    """A fault of a SLURM job.

    `may_lose`: completed updates that it may lose, plus `EVERY` if it was injected while a checkpoint was being written. `ways`: how
    the job may be restarted or, for a fault that ends it, how it may end. `options`: options of the submission. `undo`: reverts
    lasting effects of the fault, once the run has made progress.
    """

    inject: Callable[[JobUnderTest, random.Random], None]
    may_lose: int = 0
    ways: tuple[str, ...] = ("requeued",)
    options: tuple[str, ...] = ()
    undo: Callable[[JobUnderTest], None] = lambda target: None


@dataclass(frozen=True)
class Kind:
    """One kind of interruption. `weight`: how often it is drawn in a local campaign."""

    name: str
    local: Local | None = None
    controller: Controlled | None = None
    weight: int = 4

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends on which it can be tried."""
        return tuple(b for b in BACKENDS if getattr(self, b) is not None)


TERM, KILL = signal.SIGTERM, signal.SIGKILL
FEW, MANY = local_run.EVERY, far.EVERY
_HERE = "went on"
_KINDS = (
    Kind("SIGTERM to all ranks", Local(here.to_all(TERM))),
    Kind("SIGTERM to every process", Local(here.to_the_whole_step)),
    Kind("SIGUSR1 to one rank", Local(here.to_one(signal.SIGUSR1))),
    Kind("SIGUSR2 to all ranks", Local(here.to_all(signal.SIGUSR2))),
    Kind("signals, several", Local(here.one_after_another)),
    Kind("Ctrl-C", Local(here.to_the_launcher(signal.SIGINT))),
    Kind("file STOP", Local(here.touch("STOP"))),
    Kind("file SAVE", Local(here.save_and_go_on, passes=True), weight=3),
    Kind("SIGTERM in a save", Local(here.in_a_save(here.to_all(TERM)))),
    Kind("signals in a save, several", Local(here.in_a_save(here.one_after_another)), weight=2),
    Kind("SIGTERM in the last save", Local(here.in_the_last_save(here.to_all(TERM)), moment=here.last, last=True), weight=2),
    Kind(
        "SIGTERM in an evaluation",
        Local(here.in_an_evaluation(here.to_all(TERM)), moment=here.next_evaluation),
        weight=3,
    ),
    Kind("SIGTERM in a data stall", Local(here.in_a_data_stall)),
    Kind("a signal while starting", Local(here.while_starting), weight=3),
    Kind(
        "SIGKILL of a rank",
        Local(here.to_one(KILL), FEW),
        Controlled(far.kill_a_rank, MANY, ("in place",)),
        weight=6,
    ),
    Kind(
        "SIGKILL of a rank, no restarts in place",
        controller=Controlled(far.kill_a_rank, MANY, options=("cluster.restarts_in_place=0",)),
    ),
    Kind("SIGKILL of all ranks", Local(here.to_all(KILL), FEW)),
    Kind("SIGKILL of the launcher", Local(here.to_the_launcher(KILL), FEW)),
    Kind("SIGKILL in a save", Local(here.in_a_save(here.to_all(KILL)), 2 * FEW), weight=6),
    Kind("SIGTERM, then SIGKILL", Local(here.no_longer_waited_for, 2 * FEW), weight=2),
    Kind("SIGKILL of a worker", Local(here.kill_a_worker, FEW, passes=True)),
    Kind("SIGSEGV in a rank", Local(here.to_one(signal.SIGSEGV), FEW), weight=2),
    Kind("exception in a rank", Local(here.to_one(EXCEPTION), FEW, passes=True)),
    Kind("out of memory in a rank", Local(here.out_of_memory, FEW, passes=True, undo=here.memory_again)),
    Kind("hung rank", Local(here.hang, FEW), weight=2),
    Kind("quota (EFBIG)", Local(here.file_size_limit, 2 * FEW, passes=True), weight=3),
    Kind("disk full (ENOSPC)", Local(here.fill_the_disk, 2 * FEW, passes=True, undo=here.empty_the_disk), weight=3),
    Kind("damaged checkpoint", Local(here.to_the_launcher(KILL), 2 * FEW, after=here.damage), weight=6),
    Kind(
        "twin start",
        Local(here.start_a_twin, passes=True),
        Controlled(far.start_a_twin, ways=(_HERE,)),
        weight=2,
    ),
    Kind("suspended", Local(here.suspend, passes=True), Controlled(far.suspend, ways=(_HERE,)), weight=1),
    Kind("checkpoints away at one start", Local(here.to_all(TERM), after=here.purge), Controlled(far.purge), weight=2),
    Kind("videos away at one start", Local(here.to_all(TERM), after=here.lose_the_mount), Controlled(far.lose_the_mount), weight=2),
    Kind("time limit", controller=Controlled(far.limit)),
    Kind("time limit that is past", controller=Controlled(far.limit_that_is_past)),
    Kind(
        "time limit while a rank stands still",
        controller=Controlled(far.freeze_until_the_limit, MANY, undo=far.end_what_stands_still),
    ),
    Kind("step ended from outside", controller=Controlled(far.end_the_step)),
    Kind("node lost", controller=Controlled(far.lose_a_node, MANY, undo=far.start_slurmd)),
    Kind("node silent", controller=Controlled(far.silence_a_node, MANY, undo=far.thaw)),
    Kind("controller away", controller=Controlled(far.take_the_controller_away, MANY)),
    Kind("evicted by a higher priority", controller=Controlled(far.evict)),
    Kind("evicted without grace", controller=Controlled(far.evict_without_grace, MANY, undo=far.grace_again)),
    Kind(
        "evicted during preflight",
        controller=Controlled(far.preempt_preflight, options=("preflight=true",)),
    ),
    Kind("checkout edited", controller=Controlled(far.edit_the_checkout, undo=far.restore_the_checkout)),
    Kind("warned (SIGUSR2)", controller=Controlled(far.warn)),
    Kind("scancel", controller=Controlled(far.cancel, ways=("CANCELLED",))),
    Kind("scancel --full", controller=Controlled(far.signal_job("--full"), ways=("CANCELLED",))),
    Kind("scancel --signal=INT", controller=Controlled(far.signal_job("--signal=INT"))),
    Kind("scancel --signal=USR1", controller=Controlled(far.signal_job("--signal=USR1"))),
    Kind("scancel --signal=TERM --full", controller=Controlled(far.signal_job("--signal=TERM", "--full"), MANY)),
    Kind(
        "scancel --signal=TERM --batch",
        controller=Controlled(far.signal_job("--signal=TERM", "--batch"), ways=(_HERE,)),
    ),
    Kind("scancel JOB.STEP", controller=Controlled(far.cancel_the_step, MANY)),
    Kind("batch script killed", controller=Controlled(far.kill_the_batch_script)),
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
"""All kinds by name. Saving is asynchronous: if it is killed, the run resumes from the checkpoint before. `may_lose` of "quota", "disk
full" and "damaged checkpoint" includes one checkpoint that could not be written, or was damaged."""


def matching(backend: str, words: str = "") -> list[Kind]:
    """The kinds of a backend whose names contain one of the comma-separated `words`; all without words."""
    wanted = [w.strip().lower() for w in words.split(",")]
    return [k for k in KINDS.values() if backend in k.backends and any(w in k.name.lower() for w in wanted)]
