"""Worker processes that compute one array per task; results come in task order. No torch.

Workers are not forked from the training process, whose CUDA, NCCL and InfiniBand state does not survive a fork, and they do not
import torch. A new interpreter, the fork server, imports the modules of a worker and forks the workers before it starts any thread, so
that the imports run once for all workers. Results are in anonymous shared memory, so the size of /dev/shm does not matter.

Workers and fork server ignore SIGTERM, SIGINT, SIGUSR1 and SIGUSR2, which SLURM sends to every process of a job, and end with the
training process, however it ends.
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
"""Signals that only the training process handles."""

_BOOT = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given['path']; "
    "from multitrain.data.pool import run_fork_server; run_fork_server(given)"
)
_SHUTDOWN_SECONDS = 1.0  # seconds for the fork server to end the workers and itself
_QUEUE = 64  # maximum tasks queued per worker; they fit into a socket's buffer, so sending does not block
_PR_SET_PDEATHSIG = 1
_MALLOPT = {-1: 256 << 20, -3: 32 << 20, -8: 1}
"""mallopt(3): M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (at its maximum) and M_ARENA_MAX."""


class LoaderError(RuntimeError):
    """A worker died, or raised an error that is not about a video. The message is one line, followed by a traceback if there is one."""


class WorkerFn(Protocol):
    """The function that workers run. Must be picklable and must not import torch."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    answer_timeout: float
    """Maximum seconds per task."""

    def warm_up(self) -> None:
        """Import the modules that `run` needs, and set up the process; called once, before workers are forked."""
        ...

    def run(self, task: Any, out: np.ndarray) -> Any:
        """Fill `out` (of `shape` and `dtype`) and return the rest of the result, which must be small."""
        ...

    def describe(self, task: Any) -> str:
        """The file of a task, for error messages."""
        ...


class Result(NamedTuple):
    """The result of one task. `array` may be overwritten after the next call of `Pool.next`."""

    task: Any
    result: Any
    array: np.ndarray


class Pool(Protocol):
    """Results in task order."""

    def next(self, timeout: float) -> Result | None:
        """The next result, or None if there is none within `timeout` seconds.

        Raises:
            StopIteration: after the last one.
            LoaderError: a worker died or failed.
            ConfigError: raised by the worker's function.
        """
        ...

    def close(self) -> None:
        """Kill all workers immediately and release the memory."""
        ...


def open_pool(job: WorkerFn, tasks: Iterable[Any], *, workers: int, ahead: int) -> Pool:
    """A pool that processes `tasks`, at most `ahead` (≥ 1) tasks in advance; with `workers=0`, in a thread of this process."""
    return ProcessPool(job, tasks, workers, ahead) if workers else ThreadPool(job, tasks, ahead)


class ThreadPool:
    """A pool with one thread of this process."""

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
        if answer is None:  # a stored exception would, through its traceback, keep all objects of its callers alive
            self._exhausted = True
            raise StopIteration
        self._ended = answer
        raise self._ended

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._answers.get_nowait()
        self._thread.join(timeout=_SHUTDOWN_SECONDS)  # a thread that hangs in a library is abandoned
        self._ended = self._ended or LoaderError("the loader is closed")

    def _work(self, tasks: Iterator[Any]) -> None:
        last: BaseException | None = None
        try:
            self._job.warm_up()
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
    """The training process's state of one worker."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.tasks: deque[tuple[int, int, Any]] = deque()  # (number, slot, task); the first is being processed
        self.heard = time.monotonic()


class ProcessPool:
    """A pool of worker processes, forked by a fork server."""

    def __init__(self, job: WorkerFn, tasks: Iterable[Any], workers: int, ahead: int) -> None:
        self._job, self._tasks = job, enumerate(tasks)
        self._exhausted = False
        self._next = 0
        self._ready: dict[int, tuple[Result, int]] = {}
        self._used: int | None = None  # slot of the last result returned
        self._error: BaseException | None = None
        slots = max(workers, ahead) + 1
        self._free = list(range(slots))[::-1]
        self._size = int(np.prod(job.shape)) * job.dtype.itemsize
        self._start(workers, slots)

    def _start(self, workers: int, slots: int) -> None:
        memory = shared_memory(slots * self._size)
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
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # inherited until the fork server ignores them
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
        with contextlib.suppress(OSError):  # next() reports a fork server that died at once
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
        """Assign tasks while there are free result slots, each to the worker with the fewest tasks."""
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
        """Receive results for up to `timeout` seconds; False if none arrives."""
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
        """The error for a dead worker, with its exit status as the fork server reports it."""
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


def shared_memory(size: int) -> int:
    """The descriptor of `size` bytes of anonymous shared memory, which the kernel frees after the last process closes it."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("multitrain-loader")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, size)
    return memory


# --- in the fork server and its workers -----------------------------------------------------------------------------


def run_fork_server(given: dict[str, Any]) -> None:
    """Run the fork server: fork the workers, report dead ones, and kill them when the training process closes the pool or dies."""
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
    """Report dead workers as (number, pid, wait status) until the training process ends."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            while pids and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                control.send((pids.pop(ended[0]), *ended))
            if control.poll(0.1):
                control.recv_bytes()


def _work(job: WorkerFn, given: dict[str, Any], number: int) -> None:
    """Run a worker, which processes one task after another. Never returns."""
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
        os._exit(0)  # the training process closed the connection
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
    if os.getppid() != parent:  # the parent died before the call
        os._exit(0)


def configure_worker() -> None:
    """Set single-threaded OpenCV, and keep freed buffers mapped for the next video (mallopt).

    By default, glibc returns a large freed buffer to the kernel, and the next buffer causes a page fault for every
    page: a fifth of the decoding time.
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
    "shared_memory",
]
