"""The kinds of interruption: what each does to a run, and what it may cost."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.drills.inside.sitecustomize import EXCEPTION
from benchmarks.drills.run import EVERY, UPDATES, VALIDATED, Hung, TinyRun
from multitrain.engine import checkpoint as ck
from tests.slurm.drill import send

Hit = Callable[[TinyRun, random.Random], None]


@dataclass(frozen=True)
class Kind:
    """One kind of interruption.

    `hit` strikes. `may_lose`: completed updates that it may cost. `after`, when the run has ended, before it is submitted
    again. `passes`: whether the run may go on without ending. `undo` takes back what would outlast the strike. `weight`:
    how often it is drawn. `moment` is the first update from `at` on at which it makes sense.
    """

    name: str
    hit: Hit
    may_lose: int
    passes: bool = False
    weight: int = 4
    after: Hit | None = None
    undo: Hit | None = None
    moment: Callable[[int], int] = lambda at: at


def _all(run: TinyRun) -> list[int]:
    return list(run.ranks().values())


def _one(run: TinyRun, chance: random.Random) -> int:
    pids = _all(run)
    if not pids:
        raise Hung("no rank lives that could be struck")
    return chance.choice(pids)


def _to_all(number: int) -> Hit:
    return lambda run, chance: send(_all(run), number)


def _to_one(number: int) -> Hit:
    return lambda run, chance: send([_one(run, chance)], number)


def _to_the_launcher(number: int) -> Hit:
    def hit(run: TinyRun, chance: random.Random) -> None:
        assert run.launcher is not None
        run.launcher.send_signal(number)

    return hit


def _to_the_whole_step(run: TinyRun, chance: random.Random) -> None:
    """As SLURM does it: SIGCONT and SIGTERM to every process, loader workers included."""
    pids = [p for rank in _all(run) for p in (rank, *run.workers(rank))]
    send(pids, signal.SIGCONT)
    send(pids, signal.SIGTERM)


def _one_after_another(run: TinyRun, chance: random.Random) -> None:
    """Three to six signals of all three kinds, to ranks by chance, within half a second."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    for _ in range(chance.randint(3, 6)):
        if pids := _all(run):
            send([chance.choice(pids)], chance.choice(numbers))
        time.sleep(chance.uniform(0, 0.1))


def _no_longer_waited_for(run: TinyRun, chance: random.Random) -> None:
    """As SLURM does it: SIGTERM to every process, and SIGKILL when KillWait is over, wherever the stop is by then."""
    _to_the_whole_step(run, chance)
    time.sleep(chance.uniform(0, 2))
    send(_all(run), signal.SIGKILL)


def _touch(name: str) -> Hit:
    return lambda run, chance: (run.folder / name).touch()


def _carried_out(run: TinyRun) -> bool:
    return not (run.folder / "SAVE").exists()


def _save_and_go_on(run: TinyRun, chance: random.Random) -> None:
    before = run.count("checkpoint")
    (run.folder / "SAVE").touch()
    run.until(lambda: (_carried_out(run) and run.count("checkpoint") > before) or not run.running, "the save", 60)


def _in_a_save(hit: Hit) -> Hit:
    def wait_and_hit(run: TinyRun, chance: random.Random) -> None:
        run.until(lambda: run.saving() or not run.running, "a save", pause=0.0005)
        time.sleep(chance.uniform(0, 0.03))
        hit(run, chance)

    return wait_and_hit


def _in_an_evaluation(hit: Hit) -> Hit:
    def wait_and_hit(run: TinyRun, chance: random.Random) -> None:
        run.until(lambda: run.phase() == "evaluating" or not run.running, "an evaluation", pause=0.002)
        time.sleep(chance.uniform(0, 0.8))
        hit(run, chance)

    return wait_and_hit


def _in_a_data_stall(run: TinyRun, chance: random.Random) -> None:
    """The loader of one rank is frozen, so that all wait for it; then comes the signal."""
    rank = _one(run, chance)
    send(run.workers(rank), signal.SIGSTOP)
    time.sleep(chance.uniform(0.3, 1.5))
    send(_all(run), signal.SIGTERM)


def _while_starting(run: TinyRun, chance: random.Random) -> None:
    """Before the first update of a start, in imports, rendezvous, resuming or the first batch."""
    send(_all(run), signal.SIGTERM)
    run.until(lambda: not run.running and not run.ranks(), "the end of a stopped start")
    run.start(run.world)
    run.until(lambda: len(run.ranks()) == run.world, "the ranks of the next start")
    time.sleep(chance.uniform(0, 4))
    send(_all(run), chance.choice((signal.SIGTERM, signal.SIGUSR2)))


def _kill_a_worker(run: TinyRun, chance: random.Random) -> None:
    for rank in chance.sample(pids := _all(run), len(pids)):
        if workers := run.workers(rank)[1:]:  # the first is the keeper, which only forks
            send([chance.choice(workers)], signal.SIGKILL)
            return


def _hang(run: TinyRun, chance: random.Random) -> None:
    """One rank is frozen for good: the others hang in their next collective. A rank alone is killed; nobody waits for it."""
    send([_one(run, chance)], signal.SIGSTOP if run.world > 1 else signal.SIGKILL)


def _out_of_memory(run: TinyRun, chance: random.Random) -> None:
    """One rank may not have another byte of address space."""
    pid = _one(run, chance)
    with open(f"/proc/{pid}/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def _memory_again(run: TinyRun, chance: random.Random) -> None:
    for pid in _all(run):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _file_size_limit(run: TinyRun, chance: random.Random) -> None:
    """Files of at most 100 kB (as a quota has it) until one save has failed; the limit holds for shared memory as well."""
    before = run.count("checkpoint_failed")
    for pid in _all(run):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    run.until(lambda: run.count("checkpoint_failed") > before or not run.running, "a save that fails")
    for pid in _all(run):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _fill_the_disk(run: TinyRun, chance: random.Random) -> None:
    """For four seconds the file system of the run is full to the last byte, for all that it writes, its log included."""
    with contextlib.suppress(OSError), open(run.runs / ".ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    deadline = time.monotonic() + 4.0
    while run.running and time.monotonic() < deadline:
        time.sleep(0.05)


def _empty_the_disk(run: TinyRun, chance: random.Random) -> None:
    (run.runs / ".ballast").unlink(missing_ok=True)


def damage(run: TinyRun, chance: random.Random) -> None:
    """The newest checkpoint loses its end, a byte, a file, or its manifest; nothing happens to the only one."""
    whole = [f for f in ck.listed(run.folder / "checkpoints") if ck.verify(f) is None]
    if len(whole) < 2:
        return
    file = whole[0] / chance.choice((*ck.FILES, "manifest.json"))
    way = chance.choice(("cut", "flip", "remove", "empty"))
    size = file.stat().st_size
    if way == "remove":
        file.unlink()
    elif way == "flip":
        with open(file, "r+b") as content:
            content.seek(at := chance.randrange(size))
            byte = content.read(1)[0]
            content.seek(at)
            content.write(bytes([byte ^ (1 << chance.randrange(8))]))
    else:
        os.truncate(file, 0 if way == "empty" else chance.randrange(size))


def _next_evaluation(at: int) -> int:
    return min(-(-at // VALIDATED) * VALIDATED, UPDATES - UPDATES % VALIDATED)


TERM, KILL = signal.SIGTERM, signal.SIGKILL
KINDS = {
    kind.name: kind
    for kind in (
        Kind("SIGTERM to all ranks", _to_all(TERM), 0),
        Kind("SIGTERM to every process", _to_the_whole_step, 0),
        Kind("SIGUSR1 to one rank", _to_one(signal.SIGUSR1), 0),
        Kind("SIGUSR2 to all ranks", _to_all(signal.SIGUSR2), 0),
        Kind("signals, several", _one_after_another, 0),
        Kind("Ctrl-C", _to_the_launcher(signal.SIGINT), 0),
        Kind("file STOP", _touch("STOP"), 0),
        Kind("file SAVE", _save_and_go_on, 0, passes=True, weight=3),
        Kind("SIGTERM in a save", _in_a_save(_to_all(TERM)), 0),
        Kind("signals in a save, several", _in_a_save(_one_after_another), 0, weight=2),
        Kind("SIGTERM in an evaluation", _in_an_evaluation(_to_all(TERM)), 0, weight=3, moment=_next_evaluation),
        Kind("SIGTERM in a data stall", _in_a_data_stall, 0),
        Kind("a signal while starting", _while_starting, 0, weight=3),
        Kind("SIGKILL of a rank", _to_one(KILL), EVERY, weight=6),
        Kind("SIGKILL of all ranks", _to_all(KILL), EVERY),
        Kind("SIGKILL of the launcher", _to_the_launcher(KILL), EVERY),
        Kind("SIGKILL in a save", _in_a_save(_to_all(KILL)), 2 * EVERY, weight=6),
        Kind("SIGTERM, then SIGKILL", _no_longer_waited_for, 2 * EVERY, weight=2),
        Kind("SIGKILL of a worker", _kill_a_worker, EVERY, passes=True),
        Kind("SIGSEGV in a rank", _to_one(signal.SIGSEGV), EVERY, weight=2),
        Kind("exception in a rank", _to_one(EXCEPTION), EVERY, passes=True),
        Kind("out of memory in a rank", _out_of_memory, EVERY, passes=True, undo=_memory_again),
        Kind("hung rank", _hang, EVERY, weight=2),
        Kind("quota (EFBIG)", _file_size_limit, 2 * EVERY, passes=True, weight=3),
        Kind("disk full (ENOSPC)", _fill_the_disk, 2 * EVERY, passes=True, undo=_empty_the_disk, weight=3),
        Kind("damaged checkpoint", _to_the_launcher(KILL), 2 * EVERY, after=damage, weight=6),
    )
}
"""All kinds by name. A save goes on beside the training: killed in it, the checkpoint before counts. `may_lose` of the
last three counts one checkpoint that could not be written, or was damaged."""


def deal(chance: random.Random, count: int, *, only: str | None = None, can_fill: bool = True) -> list[Kind]:
    """`count` kinds in a random order, each as often as its weight says, as far as that goes."""
    kinds = [k for k in KINDS.values() if (only is None or only.lower() in k.name.lower())]
    kinds = [k for k in kinds if can_fill or k.hit is not _fill_the_disk]
    deck = [k for k in kinds for _ in range(k.weight)]
    total = len(deck)
    exact = {k.name: count * k.weight / total for k in kinds}
    dealt = [k for k in kinds for _ in range(int(exact[k.name]))]
    rest = sorted(kinds, key=lambda k: exact[k.name] % 1, reverse=True)
    dealt += (rest * count)[: count - len(dealt)]
    chance.shuffle(dealt)
    return dealt
