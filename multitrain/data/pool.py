"""Worker processes that turn tasks into arrays, answered in the order of the tasks. No torch.

Workers are not forked from the training process, whose CUDA, NCCL and InfiniBand state does not survive a fork, nor do they
import torch. One fresh interpreter, the fork server, imports what a worker needs and forks the workers before it has any threads:
one start-up cost for any number of workers. Results lie in anonymous shared memory, so the size of /dev/shm does not matter.

Workers and fork server ignore SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, which SLURM sends to every process of a job, and die with the
training process, however it dies.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import numpy as np

from multitrain.config import ConfigError

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that mean something to the training process only."""

_BOOT = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from multitrain.data.pool import run_fork_server; run_fork_server(given)"
)
_SHUTDOWN_SECONDS = 1.0  # seconds that the fork server gets to end the workers and itself
_QUEUE = 64  # tasks that a worker holds at most; they fit into a socket's buffer, so sending never waits
_PR_SET_PDEATHSIG = 1
_MALLOPT = {-1: 256 << 20, -3: 32 << 20, -8: 1}
"""mallopt(3): bytes free at the top that are kept; size from which memory is mapped by itself, the largest allowed; arenas."""


class LoaderError(RuntimeError):
    """A worker has died, or met an error that is not a video's. One line, but for a traceback below it."""


class WorkerFn(Protocol):
    """What workers do. Must pickle, and must not need torch."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    answer_timeout: float
    """Seconds within which a worker has to answer a task."""

    def warm_up(self) -> None:
        """Import what `run` needs; called once, before workers are forked."""
        ...

    def run(self, task: Any, out: np.ndarray) -> Any:
        """Fill `out` (dtype, shape) and return the rest of the answer, small."""
        ...

    def describe(self, task: Any) -> str:
        """The file of a task, for error messages."""
        ...


class Result(NamedTuple):
    """The answer to one task. `array` may be overwritten after the next call of `Pool.next`."""

    task: Any
    result: Any
    array: np.ndarray


class Pool(Protocol):
    """Answers in the order of the tasks."""

    def next(self, timeout: float) -> Result | None:
        """The next answer, or None when there is none within `timeout` seconds.

        Raises:
            StopIteration: after the last.
            LoaderError, ConfigError: see there.
        """
        ...

    def close(self) -> None:
        """End all workers, at once whatever they are doing, and let go of the memory."""
        ...


def open_pool(job: WorkerFn, tasks: Iterable[Any], *, workers: int, ahead: int) -> Pool:
    """A pool that works on `tasks`, at most `ahead` (≥ 1) tasks before the one asked for; without workers in a thread."""
    return ProcessPool(job, tasks, workers, ahead) if workers else ThreadPool(job, tasks, ahead)


class ThreadPool:
    """One thread of this process does the work."""

    def __init__(self, job: WorkerFn, tasks: Iterable[Any], ahead: int) -> None:
        self._job = job
        self._answers: queue.Queue[Result | BaseException | None] = queue.Queue(maxsize=max(1, ahead))
        self._closed = threading.Event()
        self._ended: BaseException | None = None
        self._exhausted = False
        self._thread = threading.Thread(target=self._work, args=(iter(tasks),), name="loader", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Result | None:
        if self._ended is not None:
            raise self._ended
        if self._exhausted:
            raise StopIteration
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(answer, Result):
            return answer
        if answer is None:  # an exception that is kept would keep, by its traceback, all that its callers hold
            self._exhausted = True
            raise StopIteration
        self._ended = answer
        raise self._ended

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._answers.get_nowait()
        self._thread.join(timeout=_SHUTDOWN_SECONDS)  # longer only when stuck in a library; then it is left behind
        self._ended = self._ended or LoaderError("the loader is closed")

    def _work(self, tasks: Iterator[Any]) -> None:
        last: BaseException | None = None
        try:
            for task in tasks:
                array = np.empty(self._job.shape, self._job.dtype)
                if not self._put(Result(task, self._job.run(task, array), array)):
                    return
        except Exception as error:
            last = error if isinstance(error, ConfigError) else _failed(error)
        self._put(last)

    def _put(self, answer: Result | BaseException | None) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._answers.put(answer, timeout=0.1)
                return True
        return False


class _Worker:
    """The training process's end of one worker."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.tasks: deque[tuple[int, int, Any]] = deque()  # number, slot, task; the first is in work
        self.heard = time.monotonic()


class ProcessPool:
    """Worker processes of a fork server."""

    def __init__(self, job: WorkerFn, tasks: Iterable[Any], workers: int, ahead: int) -> None:
        self._job, self._tasks = job, enumerate(tasks)
        self._exhausted = False
        self._next = 0
        self._ready: dict[int, tuple[Result, int]] = {}
        self._used: int | None = None  # slot of the answer given last
        self._error: BaseException | None = None
        slots = max(workers, ahead) + 1
        self._free = list(range(slots))[::-1]
        self._size = int(np.prod(job.shape)) * job.dtype.itemsize
        self._start(workers, slots)

    def _start(self, workers: int, slots: int) -> None:
        memory = _shared_memory(slots * self._size)
        ours, theirs = zip(*(socket.socketpair() for _ in range(workers + 1)))
        fds = [s.fileno() for s in theirs]
        given = {
            "path": [p or os.getcwd() for p in sys.path],
            "control": fds[0],
            "workers": fds[1:],
            "memory": memory,
            "slots": slots,
        }
        environment = os.environ | {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # inherited, until the fork server ignores them
        try:
            self._fork_server = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(given | {"parent": os.getpid()})],
                pass_fds=[*fds, memory],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for end in theirs:
                end.close()
        self._memory = np.frombuffer(mmap.mmap(memory, slots * self._size), np.uint8).reshape(slots, self._size)
        os.close(memory)
        control, *connections = (Connection(s.detach()) for s in ours)
        self._control, self._workers = control, [_Worker(c) for c in connections]
        with contextlib.suppress(OSError):  # a fork server that died at once is found in next()
            control.send_bytes(pickle.dumps(self._job))

    def next(self, timeout: float) -> Result | None:
        if self._error is not None:
            raise self._error
        deadline = time.monotonic() + timeout
        self._release()
        try:
            while True:
                self._dispatch()
                if self._next in self._ready:
                    answer, self._used = self._ready.pop(self._next)
                    self._next += 1
                    return answer
                if self._exhausted and not any(w.tasks for w in self._workers):
                    raise StopIteration
                left = deadline - time.monotonic()
                if not self._collect(max(left, 0.0)) and left <= 0:
                    self._check_answer_timeout()
                    return None
        except (LoaderError, ConfigError) as error:
            self._error = error
            raise

    def close(self) -> None:
        if self._error is None:
            self._error = LoaderError("the loader is closed")
        self._control.close()  # the fork server kills the workers and ends
        for worker in self._workers:
            worker.connection.close()
        try:
            self._fork_server.wait(timeout=_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._fork_server.kill()  # which kills its workers
            self._fork_server.wait()
        self._ready.clear()

    def _release(self) -> None:
        if self._used is not None:
            self._free.append(self._used)
            self._used = None

    def _dispatch(self) -> None:
        """Assign tasks while there are free answer slots, each to the worker with the fewest."""
        while self._free and not self._exhausted:
            worker = min(self._workers, key=lambda w: len(w.tasks))
            if len(worker.tasks) >= _QUEUE:
                return
            try:
                number, task = next(self._tasks)
            except StopIteration:
                self._exhausted = True
                return
            slot = self._free.pop()
            if not worker.tasks:
                worker.heard = time.monotonic()
            worker.tasks.append((number, slot, task))
            try:
                worker.connection.send((slot, task))
            except OSError:
                raise self._died(worker) from None

    def _collect(self, timeout: float) -> bool:
        """Take the answers that arrive within `timeout`; False when none does."""
        by_connection = {w.connection: w for w in self._workers}
        arrived = wait(list(by_connection), timeout)
        for connection in arrived:
            worker = by_connection[connection]  # type: ignore[index]
            try:
                result, error = worker.connection.recv()
            except (EOFError, OSError):
                raise self._died(worker) from None
            number, slot, task = worker.tasks.popleft()
            worker.heard = time.monotonic()
            if error is not None:
                raise error
            array = self._memory[slot].view(self._job.dtype).reshape(self._job.shape)
            self._ready[number] = Result(task, result, array), slot
        return bool(arrived)

    def _check_answer_timeout(self) -> None:
        for number, worker in enumerate(self._workers):
            if worker.tasks and time.monotonic() - worker.heard > self._job.answer_timeout:
                path, seconds = self._job.describe(worker.tasks[0][2]), self._job.answer_timeout
                raise LoaderError(
                    f"loader worker {number} has not answered for {seconds:.0f} s, at {path}; look at the file and its server"
                )

    def _died(self, worker: _Worker) -> LoaderError:
        """Why a worker is gone, from what its fork server reports."""
        number = self._workers.index(worker)
        doing = f" while it worked on {self._job.describe(worker.tasks[0][2])}" if worker.tasks else ""
        end = "is gone"
        with contextlib.suppress(EOFError, OSError):
            while self._control.poll(_SHUTDOWN_SECONDS):
                reported, pid, status = self._control.recv()
                if reported == number:
                    end = f"(pid {pid}) {_describe_exit(status)}"
                    break
        with contextlib.suppress(subprocess.TimeoutExpired):
            end = f"could not start or was ended from outside (status {self._fork_server.wait(timeout=0.1)})"
        return LoaderError(
            f"loader worker {number} {end}{doing}; when memory ran out, lower data.workers, data.prefetch or micro_batch; "
            "when it is always the same file, take it out of the annotations"
        )


def _describe_exit(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def _failed(error: BaseException) -> LoaderError:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return LoaderError(f"{' '.join(str(error).split()) or type(error).__name__}\n{text}")


def _shared_memory(size: int) -> int:
    """A descriptor of `size` bytes that processes can share and nothing has to clean up."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("multitrain-loader")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, size)
    return memory


# --- in the fork server and its workers -----------------------------------------------------------------------------


def run_fork_server(given: dict[str, Any]) -> None:
    """The fork server: starts the workers, reports their deaths, ends them when the training process closes or dies."""
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    control = Connection(given["control"])
    try:
        job: WorkerFn = pickle.loads(control.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)
    job.warm_up()
    pids: dict[int, int] = {}
    for number in range(len(given["workers"])):
        pid = os.fork()
        if pid == 0:
            _work(job, given, number)
        pids[pid] = number
    for end in given["workers"]:
        os.close(end)
    try:
        _watch(control, pids, given["parent"])
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        os._exit(0)


def _watch(control: Connection, pids: dict[int, int], parent: int) -> None:
    """Report dead workers as (number, pid, wait status) until the training process is gone."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            while pids and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                control.send((pids.pop(ended[0]), *ended))
            if control.poll(0.1):
                control.recv_bytes()


def _work(job: WorkerFn, given: dict[str, Any], number: int) -> None:
    """A worker: answers tasks one after the other. Never returns."""
    try:
        _die_with_parent(os.getppid())
        for other, end in enumerate(given["workers"]):
            if other != number:
                os.close(end)
        os.close(given["control"])
        configure_worker()
        connection = Connection(given["workers"][number])
        size = int(np.prod(job.shape)) * job.dtype.itemsize
        memory = np.frombuffer(mmap.mmap(given["memory"], given["slots"] * size), np.uint8).reshape(-1, size)
        while True:
            slot, task = connection.recv()
            connection.send(_answer(job, task, memory[slot].view(job.dtype).reshape(job.shape)))
    except (EOFError, OSError):
        os._exit(0)  # the training process has closed its end
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(job: WorkerFn, task: Any, out: np.ndarray) -> tuple[Any, BaseException | None]:
    try:
        return job.run(task, out), None
    except ConfigError as error:
        return None, ConfigError(str(error))
    except Exception as error:
        return None, _failed(error)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os._exit(0)


def configure_worker() -> None:
    """Worker settings: single-threaded OpenCV, and freed buffers stay mapped for the next video (mallopt).

    By default glibc gives a large buffer back to the kernel when it is freed, and every page of the next one is faulted in
    anew: a fifth of the time of decoding.
    """
    import cv2

    cv2.setNumThreads(0)
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
        if mallopt is not None:
            for option, value in _MALLOPT.items():
                mallopt(option, value)


__all__ = [
    "IGNORED",
    "LoaderError",
    "Pool",
    "ProcessPool",
    "Result",
    "ThreadPool",
    "WorkerFn",
    "configure_worker",
    "open_pool",
    "run_fork_server",
]
