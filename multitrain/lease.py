"""One writer per run: a lease in the run's folder, with a generation number that only grows.

``RUN/lease/00000003.json`` names the holder of generation 3. ``00000003.over`` is empty while the lease is held; after that it
says which start took the lease over, or that it was released. A start of the run claims the next generation by creating its file
exclusively, which works on NFS and Lustre without locks, and then writes the ``.over`` file of the previous one. The holder reads
its own ``.over`` file before each write, and opens it each time, so that NFS asks the server. A start that was suspended for hours
therefore finds that it was replaced before it writes another byte.

The holder increments a counter in its file as a heartbeat. Others watch the counter by their own clock, since the clocks of
machines differ. They take over at once when the holder has certainly ended: its process on this machine has ended, or SLURM
reports that its job has ended or was restarted.

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

FOLDER = "lease"
HEARTBEAT = 5.0
"""Seconds between two increments of the holder's counter."""
SILENT = 60.0
"""Seconds without an increment after which a holder of unknown state counts as dead."""
PATIENCE = 30.0
"""Seconds that a start waits for a live holder, which may be about to save and end."""
LOST = 4
"""Exit status of a process whose lease was taken over, and of a start that could not claim it."""
START = "MULTITRAIN_START"
"""Environment variable: the name of a start, which a launcher other than SLURM sets for all ranks."""

_NAME = re.compile(r"(\d{8})\.json$")
_COUNTER_DIGITS = 16
_KEPT_GENERATIONS = 3


class LeaseHeld(Exception):
    """Another start of the run holds its lease; the message names the start, its machine and the time."""


class LeaseUnusable(Exception):
    """A file or a link is where the folder of the run's leases should be; the message names it, and says what to do."""


class LeaseLost(BaseException):
    """Another start of the run has taken over, and this one must not write any more. A BaseException, so that no handler catches it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease. `start`: name of its start of the run. `restart`: number of the start of SLURM job `job`."""

    start: str
    job: str | None
    cluster: str | None
    restart: int
    host: str
    user: str
    pid: int
    machine: str
    """Boot id and process namespace, within which a process id is unique."""
    began: str
    """Start time of the process, in the kernel's ticks, since process ids are reused."""
    since: str
    folder: str | None = None
    """The run's folder on the holder's machine; other machines may mount it at another path."""
    inode: int | None = None
    """Inode of that folder's `lease`, which distinguishes the folder from a copy of it."""

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
"""Returns whether the job of a holder runs; None when unknown."""


def newest(run: Path) -> State | None:
    """The newest generation of the run's lease; None if the run never had a lease."""
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
    """The holder of the run's lease; None when the lease is free, or its holder has ended.

    Args:
        alive: whether the holder's job runs, according to SLURM.
        watch: seconds to watch the counter of a holder of unknown state.
    """
    state = newest(run)
    if state is None or state.over or state.holder is None:
        return None
    known = _is_alive(state.holder, alive)
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
        job, restart: the SLURM job of this process, and the number of its earlier starts.
        alive: whether another holder's job runs, according to SLURM.
        patience: seconds to wait for a live holder.
        silent: seconds without an increment of its counter after which a holder of unknown state counts as dead.
        pause: sleeps for a number of seconds; called repeatedly while another start holds the lease. An exception ends the wait.
        say: called with one line if this process has to wait for the lease.

    Raises:
        LeaseHeld: another start holds it.
        LeaseUnusable: the path of the folder of leases is a file or a link.
        OSError: the folder cannot be written.
    """
    me = _this_process(run, job, restart)
    began = time.monotonic()
    seen: tuple[int, str] | None = None
    changed, waiting = began, False
    while True:
        _refuse_file_or_link(run / FOLDER)
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
        known = True if moved else _is_alive(state.holder, alive) if state.holder else None
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
    """One line that names the holder of the run and, if the folder was copied while the run trained, says what to do with the copy."""
    if holder is None or not is_copy(run, holder):
        return f"run {run.name!r} is held by {holder}"
    return (
        f"{run} is a copy of {holder.folder}, made while {holder} trained it: that run continues; to train the copy, delete "
        f"{run / FOLDER}"
    )


def is_copy(run: Path, holder: Holder) -> bool:
    """Whether the run's folder is a copy of the one that the holder claimed: its path and its inode both differ."""
    if holder.folder is None or holder.inode is None:  # a start of an earlier version
        return False
    return holder.folder != str(run.resolve()) and holder.inode != _inode(run)


def original(run: Path) -> Path | None:
    """The folder of which `run` is a copy that was made while it trained, and that has not been started itself."""
    state = newest(run)
    if state is None or state.over or state.holder is None or not is_copy(run, state.holder):
        return None
    return Path(state.holder.folder or "")


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
    return f"process {os.getpid()} on {socket.gethostname()} {_start_ticks(os.getpid())}"


def is_later(start: str, other: str) -> bool:
    """Whether `start` is a later start of the same SLURM job as `other`.

    Then the lease of `other` is over, although it was not released, and rank 0 of `start` may not have claimed the next one yet.
    """
    names = [re.fullmatch(r"job (.+)\.(\d+)", name) for name in (start, other)]
    (job, number), (other_job, other_number) = ((m.group(1), int(m.group(2))) if m else ("", 0) for m in names)
    return job != "" and job == other_job and number > other_number


class Guard:
    """Checks whether a process of a start may still write to its run.

    Args:
        run: the run's folder.
        start: name of the start; a lease of any other start ends it.
        generation: generation of the lease that the start's rank 0 has claimed, once it is known.
    """

    def __init__(self, run: Path, start: str, generation: int | None = None) -> None:
        self.run = run
        self.start = start
        self.generation = generation
        self.pid: int | None = None  # set in the process that has claimed the lease

    def check(self) -> None:
        """Return if this start is the run's writer.

        Raises:
            LeaseLost: another start has claimed the lease.
            OSError: the folder cannot be read now.
        """
        if self.generation is not None:
            over = _read(self.run / FOLDER / f"{self.generation:08d}.over")
            if over is None:
                raise LeaseLost(
                    f"the lease of run {self.run.name!r} was removed ({self.run / FOLDER}): the folder was moved, or its lease deleted; "
                    "submit the run again"
                )
            if over:
                raise LeaseLost(f"run {self.run.name!r}: the lease of this start is over: {over}")
            holder = _state(self.run / FOLDER, self.generation).holder
            own = (self.start, self.pid or (holder and holder.pid))
            if (
                holder is not None and (holder.start, holder.pid) != own
            ):  # the folder was removed, and the generations restarted
                raise LeaseLost(held_by(self.run, holder))
            return
        state = newest(self.run)
        if state is None or state.over or state.holder is None:
            return
        if state.holder.start != self.start and not is_later(self.start, state.holder.start):
            raise LeaseLost(held_by(self.run, state.holder))

    def follow(self, generation: int | None, start: str) -> None:
        """From now on check this generation, which rank 0 has claimed for this start."""
        self.generation, self.start = generation, start


class Lease(Guard):
    """A claimed lease; a thread increments its counter until :meth:`release`.

    Args:
        file: descriptor of the holder's file.
        offset: position of the counter in the file, in bytes.
    """

    def __init__(self, run: Path, start: str, generation: int, file: int, offset: int) -> None:
        super().__init__(run, start, generation)
        self.pid = os.getpid()
        self._file = file
        self._offset = offset
        self._end = threading.Event()
        self.on_lost: Callable[[str], None] = _exit_process
        """Called by the thread when the lease was taken over; by default it ends the process."""
        threading.Thread(target=self._heartbeat, name="lease", daemon=True).start()

    def release(self) -> None:
        """Release the lease. Idempotent; a lease that was taken over stays with its new holder."""
        if self._end.is_set():
            return
        self._end.set()
        assert self.generation is not None
        with contextlib.suppress(OSError, LeaseLost):
            self.check()
            _record_end(self.run / FOLDER, self.generation, "released")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _heartbeat(self) -> None:
        count = 0
        while not self._end.wait(HEARTBEAT):
            count += 1
            try:
                os.pwrite(self._file, f"{count:0{_COUNTER_DIGITS}d}".encode(), self._offset)
                os.fsync(self._file)
                self.check()
            except LeaseLost as lost:
                if not self._end.is_set():
                    self.on_lost(str(lost))
                return
            except OSError:  # the disk does not answer now: try again at the next increment
                continue
        os.close(self._file)


_guard: Guard | None = None


def guarded(guard: Guard | None) -> None:
    """Set the guard that :func:`verify` checks: that of the one run to which this process writes."""
    global _guard
    _guard = guard


def current() -> Guard | None:
    """The guard that :func:`guarded` set."""
    return _guard


def verify(path: Path) -> None:
    """Check that this process may write to `path`. Call it before each write.

    Raises:
        LeaseLost: `path` lies in the run of this process, and another start has taken that over.
    """
    if _guard is not None and Path(os.path.abspath(path)).is_relative_to(_guard.run):
        _guard.check()


# ------------------------------------------------------------------------------------------------------------ on the disk


def _refuse_file_or_link(folder: Path) -> None:
    """Refuse a file, and a link, through which files of other runs would be deleted. Raises LeaseUnusable."""
    if folder.is_symlink():
        raise LeaseUnusable(f"{folder} is a link, which is not followed; remove it")
    if folder.exists() and not folder.is_dir():
        raise LeaseUnusable(f"{folder} is not a folder; move it away")


def _claim(run: Path, before: State | None, me: Holder) -> Lease | None:
    """Claim the next generation; None if another start was faster."""
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
        os.write(file, text + b"0" * _COUNTER_DIGITS + b"\n")
        os.fsync(file)
        os.close(os.open(folder / f"{generation:08d}.over", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
    except OSError:  # a full disk: an empty claim would delay the next start
        (folder / f"{generation:08d}.json").unlink(missing_ok=True)
        os.close(file)
        raise
    for earlier in range(max(1, generation - _KEPT_GENERATIONS), generation):
        if (folder / f"{earlier:08d}.json").exists() and not _read(folder / f"{earlier:08d}.over"):
            _record_end(folder, earlier, f"taken over by {me}")
    _delete_up_to(folder, generation - _KEPT_GENERATIONS)
    return Lease(run, me.start, generation, file, len(text))


def _delete_up_to(folder: Path, newest_gone: int) -> None:
    """Delete the files of generations up to this one."""
    for name in os.listdir(folder):
        if re.fullmatch(r"\d{8}\.(json|over)", name) and int(name[:8]) <= newest_gone:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _record_end(folder: Path, generation: int, text: str) -> None:
    """Record in its ``.over`` file why a generation is over, unless a reason is already recorded."""
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


# --------------------------------------------------------------------------------------------------------- identity


def _this_process(run: Path, job: str | None, restart: int) -> Holder:
    with contextlib.suppress(KeyError, OSError):
        return _holder_of(run, job, restart, getpass.getuser())
    return _holder_of(run, job, restart, str(os.getuid()))


def _holder_of(run: Path, job: str | None, restart: int, user: str) -> Holder:
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
        began=_start_ticks(pid),
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
        return True  # SLURM restarts a job only after its previous start has ended, or its node is lost
    return _is_alive(state.holder, alive) is False


def _is_alive(holder: Holder, alive: Alive | None) -> bool | None:
    """Whether the holder's process runs; None when it cannot be determined here."""
    if holder.machine == _machine():
        return _start_ticks(holder.pid) == holder.began
    return alive(holder) if alive is not None and holder.job is not None else None


def _machine() -> str:
    parts = []
    for path, read in (("/proc/sys/kernel/random/boot_id", _boot_id), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(read(path))
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)


def _inode(run: Path) -> int:
    return os.stat(run / FOLDER).st_ino


def _boot_id(path: str) -> str:
    return Path(path).read_text().strip()


def _start_ticks(pid: int) -> str:
    """Start time of a process, in ticks; empty if there is none, or only a zombie."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if rest[0] in "ZX" else rest[19]


def _exit_process(reason: str) -> None:
    """End this process at once; write nothing but one line to its log."""
    with contextlib.suppress(OSError):
        os.write(2, f"multitrain: {reason}; this process ends\n".encode())
    os._exit(LOST)


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
