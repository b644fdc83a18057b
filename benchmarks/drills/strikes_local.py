"""Faults that are injected into a run of local processes, for the kinds of :mod:`benchmarks.drills.kinds`."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.drills.run import HANG_LIMIT, UPDATES, VALIDATED, RunHung, TinyRun
from multitrain.engine import checkpoint as ck
from multitrain.records.checkpoints import FILES
from tests.slurm.drill import send

Fault = Callable[[TinyRun, random.Random], None]


def living(run: TinyRun) -> list[int]:
    return list(run.ranks().values())


def any_rank(run: TinyRun, chance: random.Random) -> int:
    pids = living(run)
    if not pids:
        raise RunHung("no rank lives that could be struck")
    return chance.choice(pids)


def to_all(number: int) -> Fault:
    return lambda run, chance: send(living(run), number)


def to_one(number: int) -> Fault:
    return lambda run, chance: send([any_rank(run, chance)], number)


def to_the_launcher(number: int) -> Fault:
    def inject(run: TinyRun, chance: random.Random) -> None:
        assert run.launcher is not None
        run.launcher.send_signal(number)

    return inject


def to_the_whole_step(run: TinyRun, chance: random.Random) -> None:
    """Like SLURM: send SIGCONT and SIGTERM to every process, including loader workers."""
    pids = [p for rank in living(run) for p in (rank, *run.workers(rank))]
    send(pids, signal.SIGCONT)
    send(pids, signal.SIGTERM)


def one_after_another(run: TinyRun, chance: random.Random) -> None:
    """Send three to six stop signals of all three kinds to random ranks, within half a second."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    for _ in range(chance.randint(3, 6)):
        if pids := living(run):
            send([chance.choice(pids)], chance.choice(numbers))
        time.sleep(chance.uniform(0, 0.1))


def no_longer_waited_for(run: TinyRun, chance: random.Random) -> None:
    """Like SLURM: send SIGTERM to every process, and SIGKILL after KillWait, in whatever state the stop is by then."""
    to_the_whole_step(run, chance)
    time.sleep(chance.uniform(0, 2))
    send(living(run), signal.SIGKILL)


def touch(name: str) -> Fault:
    return lambda run, chance: (run.folder / name).touch()


def carried_out(run: TinyRun) -> bool:
    return not (run.folder / "SAVE").exists()


def save_and_go_on(run: TinyRun, chance: random.Random) -> None:
    before = run.count("checkpoint")
    (run.folder / "SAVE").touch()
    run.until(lambda: (carried_out(run) and run.count("checkpoint") > before) or not run.running, "the save", 60)


def in_a_save(inject: Fault) -> Fault:
    def wait_and_hit(run: TinyRun, chance: random.Random) -> None:
        run.until(lambda: run.saving() or not run.running, "a save", pause=0.0005)
        time.sleep(chance.uniform(0, 0.03))
        inject(run, chance)

    return wait_and_hit


def in_an_evaluation(inject: Fault) -> Fault:
    def wait_and_hit(run: TinyRun, chance: random.Random) -> None:
        run.until(lambda: run.phase() == "evaluating" or not run.running, "an evaluation", pause=0.002)
        time.sleep(chance.uniform(0, 0.8))
        inject(run, chance)

    return wait_and_hit


def in_a_data_stall(run: TinyRun, chance: random.Random) -> None:
    """Freeze the loader of one rank, so that all ranks wait for it; then send the signal."""
    rank = any_rank(run, chance)
    send(run.workers(rank), signal.SIGSTOP)
    time.sleep(chance.uniform(0.3, 1.5))
    send(living(run), signal.SIGTERM)


def while_starting(run: TinyRun, chance: random.Random) -> None:
    """Interrupt before the first update of a start: during imports, rendezvous, resuming or the first batch."""
    send(living(run), signal.SIGTERM)
    run.until(lambda: not run.running and not run.ranks(), "the end of a stopped start")
    run.start(run.world)
    run.until(lambda: len(run.ranks()) == run.world, "the ranks of the next start")
    time.sleep(chance.uniform(0, 4))
    send(living(run), chance.choice((signal.SIGTERM, signal.SIGUSR2)))


def kill_a_worker(run: TinyRun, chance: random.Random) -> None:
    for rank in chance.sample(pids := living(run), len(pids)):
        if workers := run.workers(rank)[1:]:  # the first is the fork server
            send([chance.choice(workers)], signal.SIGKILL)
            return


def hang(run: TinyRun, chance: random.Random) -> None:
    """Freeze one rank, so that the others hang in their next collective. A single rank is killed, since no other waits for it."""
    send([any_rank(run, chance)], signal.SIGSTOP if run.world > 1 else signal.SIGKILL)


def out_of_memory(run: TinyRun, chance: random.Random) -> None:
    """Limit the address space of one rank to its current size."""
    pid = any_rank(run, chance)
    with open(f"/proc/{pid}/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def memory_again(run: TinyRun, chance: random.Random) -> None:
    for pid in living(run):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def file_size_limit(run: TinyRun, chance: random.Random) -> None:
    """Limit files to 100 kB, like a quota, until one save has failed; the limit also applies to shared memory."""
    before = run.count("checkpoint_failed")
    for pid in living(run):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    run.until(lambda: run.count("checkpoint_failed") > before or not run.running, "a save that fails")
    for pid in living(run):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fill_the_disk(run: TinyRun, chance: random.Random) -> None:
    """Fill the run's file system completely for four seconds, for all its files including the log."""
    with contextlib.suppress(OSError), open(run.runs / ".ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    deadline = time.monotonic() + 4.0
    while run.running and time.monotonic() < deadline:
        time.sleep(0.05)


def empty_the_disk(run: TinyRun, chance: random.Random) -> None:
    (run.runs / ".ballast").unlink(missing_ok=True)


def damage(run: TinyRun, chance: random.Random) -> None:
    """Damage the newest checkpoint: truncate it, change a byte, or remove a file or its manifest. A single checkpoint is left alone."""
    whole = [f for f in ck.listed(run.folder / "checkpoints") if ck.verify(f) is None]
    if len(whole) < 2:
        return
    file = whole[0] / chance.choice((*FILES, "manifest.json"))
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


def next_evaluation(at: int) -> int:
    return min(-(-at // VALIDATED) * VALIDATED, UPDATES - UPDATES % VALIDATED)


def last(at: int) -> int:
    """The last update but one."""
    return UPDATES - 1


def in_the_last_save(inject: Fault) -> Fault:
    """Interrupt after all updates, while the last checkpoint is being written."""

    def wait_and_hit(run: TinyRun, chance: random.Random) -> None:
        run.until(
            lambda: (run.position() >= UPDATES and run.saving()) or not run.running, "the last save", pause=0.0005
        )
        inject(run, chance)

    return wait_and_hit


def start_a_twin(run: TinyRun, chance: random.Random) -> None:
    """Submit the run once more while it runs, which must be refused."""
    done = run.submit_again(gpus=1)
    if run.running and done.returncode != 2:
        raise RunHung(f"a second start ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")


def suspend(run: TinyRun, chance: random.Random) -> None:
    """Suspend every process for longer than the hang limit, like a closed laptop."""
    assert run.launcher is not None
    pids = [run.launcher.pid, *(p for rank in living(run) for p in (rank, *run.workers(rank)))]
    send(pids, signal.SIGSTOP)
    time.sleep(HANG_LIMIT + 5.0)
    send(pids, signal.SIGCONT)


def _refused_without(path: Callable[[TinyRun], Path]) -> Fault:
    def after(run: TinyRun, chance: random.Random) -> None:
        away = path(run).rename(path(run).with_name("away"))
        try:
            before = run.position()
            done = run.submit_again(gpus=1)
            if done.returncode in (0, 75) or run.position() != before:
                raise RunHung(f"without {path(run)} it ended with {done.returncode} at update {run.position()}")
        finally:
            away.rename(path(run))

    return after


purge = _refused_without(lambda run: run.folder / "checkpoints")
"""Remove the checkpoints for one start, which must be refused and write nothing."""
lose_the_mount = _refused_without(lambda run: run.data)
"""Remove the videos for one start."""
