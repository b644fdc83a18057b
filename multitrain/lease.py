"""One writer a run: a lease in the run's folder, with a generation number that only grows.

``RUN/lease/00000003.json`` names the holder of generation 3; ``00000003.over`` is empty while the lease is held, and says
who took it over, or that it was released, after that. A start of the run claims the next generation by creating its file
exclusively, which NFS and Lustre do without locks, and then marks the one before. The holder reads its own ``.over`` file
before each write; it opens the file anew, which makes NFS ask the server. So a start that stood still for hours learns that
it was replaced before it writes another byte.

A holder shows that it lives by a counter in its file. Others compare the counter over time by their own clock, since clocks
of machines differ. They take over at once when the holder is known to be gone: its process has ended on this machine, or
SLURM says that its job is over or was started again.

Standard library only.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

FOLDER = "lease"
HEARTBEAT = 5.0
"""Seconds between two steps of the holder's counter."""
SILENT = 60.0
"""Seconds without a step after which a holder of unknown state counts as gone."""
PATIENCE = 30.0
"""Seconds that a start waits for a holder that lives: it may be about to save and end."""
LOST = 4
"""Exit status of a process whose lease was taken over, and of a start that could not have it."""
START = "MULTITRAIN_START"
"""Environment variable: the name of a start, where a launcher other than SLURM gives it to all ranks."""

_NAME = re.compile(r"(\d{8})\.json$")
_COUNTER = 16
_KEPT = 3


class LeaseHeld(Exception):
    """Another start of the run holds its lease; the message says which, where and since when."""


class LeaseUnusable(Exception):
    """A file or a link lies where the folder of the run's leases belongs; the message says which, and what to do."""


class LeaseLost(BaseException):
    """Another start of the run has taken over. Nothing may be written any more; no handler of errors may go on."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `start`: the start of the run that it belongs to. `restart`: of the SLURM job `job` of `cluster`."""

    start: str
    job: str | None
    cluster: str | None
    restart: int
    host: str
    user: str
    pid: int
    machine: str
    """Boot and process namespace, within which a process id means something."""
    began: str
    """When the process began, in the kernel's ticks: process ids are used again."""
    since: str
    folder: str | None = None
    """The run's folder as the holder sees it; other machines may have it elsewhere."""
    inode: int | None = None
    """Of that folder's `lease`, by which a copy of the folder is told from the folder itself."""

    def __str__(self) -> str:
        job = f"job {self.job}{f' (restart {self.restart})' if self.restart else ''}, " if self.job else ""
        return f"{job}process {self.pid} of {self.user} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class State:
    """The newest generation of a run's lease. `holder`: None while its file is being written. `over`: empty while held."""

    generation: int
    holder: Holder | None
    counter: str
    over: str


Alive = Callable[[Holder], "bool | None"]
"""Whether the job of a holder runs; None when unknown."""


def newest(run: Path) -> State | None:
    """The newest generation of the run's lease; None when it never had one."""
    folder = run / FOLDER
    try:
        found = [int(match.group(1)) for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not found:
        return None
    generation = max(found)
    while (folder / f"{generation + 1:08d}.json").exists():  # a listing may be older than the folder (NFS)
        generation += 1
    return _state(folder, generation)


def live(run: Path, alive: Alive | None = None, *, watch: float = 0.0) -> Holder | None:
    """Who holds the run's lease now; None when it is free, or its holder is gone.

    Args:
        alive: what SLURM says of the holder's job.
        watch: seconds to look at the counter of a holder of unknown state.
    """
    state = newest(run)
    if state is None or state.over or state.holder is None:
        return None
    known = _lives(state.holder, alive)
    deadline = time.monotonic() + watch
    while known is None and time.monotonic() < deadline:
        time.sleep(min(0.5, watch))
        later = newest(run)
        if later is None or later.over:
            return None
        known = True if later.counter != state.counter else None
    return None if known is False or (known is None and watch) else state.holder


def acquire(
    run: Path,
    *,
    job: str | None = None,
    restart: int = 0,
    alive: Alive | None = None,
    patience: float = PATIENCE,
    silent: float = SILENT,
    pause: Callable[[float], object] = time.sleep,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Lease:
    """Claim the run's lease for this process.

    Args:
        run: the run's folder.
        job, restart: the SLURM job of this process, and how often it was started before.
        alive: what SLURM says of another holder's job.
        patience: seconds to wait for a holder that lives.
        silent: seconds without a step of its counter after which a holder of unknown state is gone.
        pause: waits for so many seconds, several times while another start holds the lease; what it raises ends the wait.
        say: takes one line when the lease has to be waited for.

    Raises:
        LeaseHeld: another start holds it.
        LeaseUnusable: what lies in its place is no folder of leases.
        OSError: the folder cannot be written.
    """
    me = _myself(run, job, restart)
    began = time.monotonic()
    seen: tuple[int, str] | None = None
    changed, waiting = began, False
    while True:
        _refuse_foreign(run / FOLDER)
        state = newest(run)
        if state is None or _free(state, me, alive):
            if (claimed := _claim(run, state, me)) is not None:
                return claimed
            continue
        if seen != (state.generation, state.counter):
            moved = seen is not None and seen[0] == state.generation
            seen, changed = (state.generation, state.counter), time.monotonic()
        else:
            moved = False
        known = True if moved else _lives(state.holder, alive) if state.holder else None
        now = time.monotonic()
        if known is None and now - changed >= silent:
            if (claimed := _claim(run, state, me)) is not None:
                return claimed
            continue
        if known and now - began >= patience:
            raise LeaseHeld(held_by(run, state.holder))
        if not waiting:
            waiting = True
            say(f"waiting for the run's lease: held by {state.holder or 'a start that is just beginning'}")
        pause(min(0.5, patience or 0.5, silent or 0.5))


def held_by(run: Path, holder: Holder | None) -> str:
    """One line that says who holds the run, and, if the folder was copied while the run trained, what to do with the copy."""
    if holder is None or not is_copy(run, holder):
        return f"run {run.name!r} is held by {holder}"
    return (
        f"{run} is a copy of {holder.folder}, made while {holder} trained it: that run goes on; to train the copy, delete "
        f"{run / FOLDER}"
    )


def is_copy(run: Path, holder: Holder) -> bool:
    """Whether the run's folder is a copy of the one that the holder claimed: neither its path nor its inode are the same."""
    if holder.folder is None or holder.inode is None:  # a start of an earlier version
        return False
    return holder.folder != str(run.resolve()) and holder.inode != _inode(run)


def start_name(job: str | None, restart: int, environment: Mapping[str, str] = os.environ) -> str:
    """The name of this start of a run, the same in all its processes: batch script, supervisors, ranks."""
    if job is not None:
        return f"job {job}.{restart}"
    if START in environment:
        return environment[START]
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return "torchrun " + " ".join(environment.get(name, "") for name in names)
    if environment.get("WORLD_SIZE", "1") != "1":  # placed by hand, or by another launcher
        return f"ranks at {environment.get('MASTER_ADDR', '')}:{environment.get('MASTER_PORT', '')}"
    return f"process {os.getpid()} on {socket.gethostname()} {_began(os.getpid())}"


def is_later(start: str, other: str) -> bool:
    """Whether two names are of one SLURM job, and the first of a later start: what the other one held is over, though it
    could not say so, and rank 0 of the later one may not have claimed the lease yet.
    """
    names = [re.fullmatch(r"job (.+)\.(\d+)", name) for name in (start, other)]
    (job, number), (other_job, other_number) = ((m.group(1), int(m.group(2))) if m else ("", 0) for m in names)
    return job != "" and job == other_job and number > other_number


class Guard:
    """Whether a process of a start may still write to its run.

    Args:
        run: the run's folder.
        start: name of the start; other starts' leases end it.
        generation: of the lease that the start's rank 0 has claimed, once it is known.
    """

    def __init__(self, run: Path, start: str, generation: int | None = None) -> None:
        self.run = run
        self.start = start
        self.generation = generation
        self.pid: int | None = None  # of the process that has claimed the lease, in that process

    def check(self) -> None:
        """Return while this start is the run's writer.

        Raises:
            LeaseLost: another start has claimed the lease.
            OSError: the folder cannot be read now.
        """
        if self.generation is not None:
            over = _read(self.run / FOLDER / f"{self.generation:08d}.over")
            if over is None:
                raise LeaseLost(f"the lease of run {self.run.name!r} was removed ({self.run / FOLDER})")
            if over:
                raise LeaseLost(f"run {self.run.name!r}: the lease of this start is over: {over}")
            holder = _state(self.run / FOLDER, self.generation).holder
            own = (self.start, self.pid or (holder and holder.pid))
            if holder is not None and (holder.start, holder.pid) != own:  # the folder was removed, and counted anew
                raise LeaseLost(held_by(self.run, holder))
            return
        state = newest(self.run)
        if state is None or state.over or state.holder is None:
            return
        if state.holder.start != self.start and not is_later(self.start, state.holder.start):
            raise LeaseLost(held_by(self.run, state.holder))

    def follow(self, generation: int | None, start: str) -> None:
        """From now on it is this generation, which rank 0 has claimed for this start, that must not be over."""
        self.generation, self.start = generation, start


class Lease(Guard):
    """A claimed lease; its counter runs in a thread until :meth:`release`.

    Args:
        file: open file of the holder, whose counter is written in place.
    """

    def __init__(self, run: Path, start: str, generation: int, file: int, offset: int) -> None:
        super().__init__(run, start, generation)
        self.pid = os.getpid()
        self._file = file
        self._offset = offset
        self._end = threading.Event()
        self.on_lost: Callable[[str], None] = _leave
        """Called by the thread when it finds that the lease was taken over; ends the process."""
        threading.Thread(target=self._show_life, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give the lease back. Twice is fine; one that was taken over stays with its new holder."""
        if self._end.is_set():
            return
        self._end.set()
        assert self.generation is not None
        with contextlib.suppress(OSError, LeaseLost):
            self.check()
            _mark(self.run / FOLDER, self.generation, "released")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _show_life(self) -> None:
        count = 0
        while not self._end.wait(HEARTBEAT):
            count += 1
            try:
                os.pwrite(self._file, f"{count:0{_COUNTER}d}".encode(), self._offset)
                os.fsync(self._file)
                self.check()
            except LeaseLost as lost:
                if not self._end.is_set():
                    self.on_lost(str(lost))
                return
            except OSError:  # a disk that does not answer now: the next step says more
                continue
        os.close(self._file)


_guard: Guard | None = None


def guarded(guard: Guard | None) -> None:
    """From now on :func:`verify` asks this guard: the one run that this process writes to."""
    global _guard
    _guard = guard


def current() -> Guard | None:
    """The guard that :func:`guarded` set."""
    return _guard


def verify(path: Path) -> None:
    """Before a byte is written to `path`: whether this process may.

    Raises:
        LeaseLost: `path` lies in the run of this process, and another start has taken that over.
    """
    if _guard is not None and Path(os.path.abspath(path)).is_relative_to(_guard.run):
        _guard.check()


# ------------------------------------------------------------------------------------------------------------ on the disk


def _refuse_foreign(folder: Path) -> None:
    """Raises LeaseUnusable: a link, behind which files of other runs would be deleted, or a file."""
    if folder.is_symlink():
        raise LeaseUnusable(f"{folder} is a link, which is not followed; remove it")
    if folder.exists() and not folder.is_dir():
        raise LeaseUnusable(f"{folder} is no folder; move it away")


def _claim(run: Path, before: State | None, me: Holder) -> Lease | None:
    """The lease of the next generation, unless another start was faster."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    generation = before.generation + 1 if before else 1
    me = replace(me, inode=_inode(run))
    text = (json.dumps(asdict(me), ensure_ascii=False) + "\n").encode()
    try:
        file = os.open(folder / f"{generation:08d}.json", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    try:
        os.write(file, text + b"0" * _COUNTER + b"\n")
        os.fsync(file)
        os.close(os.open(folder / f"{generation:08d}.over", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    except OSError:  # a full disk: an empty claim would hold up the next start
        (folder / f"{generation:08d}.json").unlink(missing_ok=True)
        os.close(file)
        raise
    for earlier in range(max(1, generation - _KEPT), generation):
        if (folder / f"{earlier:08d}.json").exists() and not _read(folder / f"{earlier:08d}.over"):
            _mark(folder, earlier, f"taken over by {me}")
    _forget(folder, generation - _KEPT)
    return Lease(run, me.start, generation, file, len(text))


def _forget(folder: Path, newest_gone: int) -> None:
    """Delete the files of generations up to this one."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\d{8}\.(json|over)", name) and int(name[:8]) <= newest_gone:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _mark(folder: Path, generation: int, text: str) -> None:
    """Say that a generation is over, unless that was said before."""
    path = folder / f"{generation:08d}.over"
    if _read(path):
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        os.pwrite(file, text.encode() + b"\n", 0)
        os.fsync(file)
    finally:
        os.close(file)


def _state(folder: Path, generation: int) -> State:
    text = _read(folder / f"{generation:08d}.json") or ""
    first, _, counter = text.partition("\n")
    return State(generation, _holder(first), counter.strip(), _read(folder / f"{generation:08d}.over") or "")


def _holder(text: str) -> Holder | None:
    try:
        found = json.loads(text)
        return Holder(**{field.name: found.get(field.name) for field in fields(Holder)})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None


def _read(path: Path) -> str | None:
    """The text of a small file; None when it is not there."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 14).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------- who is who


def _myself(run: Path, job: str | None, restart: int) -> Holder:
    with contextlib.suppress(KeyError, OSError):
        return _described(run, job, restart, getpass.getuser())
    return _described(run, job, restart, str(os.getuid()))


def _described(run: Path, job: str | None, restart: int, user: str) -> Holder:
    pid = os.getpid()
    return Holder(
        start=start_name(job, restart),
        job=job,
        cluster=os.environ.get("SLURM_CLUSTER_NAME") if job else None,
        restart=restart,
        host=socket.gethostname(),
        user=user,
        pid=pid,
        machine=_machine(),
        began=_began(pid),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        folder=str(run.resolve()),
    )


def _free(state: State, me: Holder, alive: Alive | None) -> bool:
    """Whether the next generation may be claimed at once."""
    if state.over:
        return True
    if state.holder is None:
        return False
    same_job = me.job is not None and (me.job, me.cluster) == (state.holder.job, state.holder.cluster)
    if same_job and state.holder.restart < me.restart:
        return True  # SLURM starts a job again only where the start before is over, or lost
    return _lives(state.holder, alive) is False


def _lives(holder: Holder, alive: Alive | None) -> bool | None:
    """Whether the holder lives; None when nothing here can tell."""
    if holder.machine == _machine():
        return _began(holder.pid) == holder.began
    return alive(holder) if alive is not None and holder.job is not None else None


def _machine() -> str:
    parts = []
    for path, read in (("/proc/sys/kernel/random/boot_id", _boot), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(read(path))
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)


def _inode(run: Path) -> int:
    return os.stat(run / FOLDER).st_ino


def _boot(path: str) -> str:
    return Path(path).read_text().strip()


def _began(pid: int) -> str:
    """The tick at which a process began; empty when there is none, or only its remains."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if rest[0] in "ZX" else rest[19]


def _leave(reason: str) -> None:
    """End this process at once, without writing anything but one line to its log."""
    with contextlib.suppress(OSError):
        os.write(2, f"multitrain: {reason}; this process ends\n".encode())
    os._exit(LOST)


def as_json(state: State | None) -> dict[str, Any] | None:
    """For readers of a run: who holds it."""
    return None if state is None or state.holder is None else {**asdict(state.holder), "over": state.over}


__all__ = [
    "Alive",
    "Guard",
    "Holder",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "LeaseUnusable",
    "State",
    "acquire",
    "guarded",
    "held_by",
    "is_copy",
    "live",
    "newest",
    "verify",
]
