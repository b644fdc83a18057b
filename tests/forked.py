"""Rank processes without the time that imports take: forked from one process that has imported what ranks import.

A rank is a process of its own: its number, signals, memory, descriptors and exit status are its own, and it ends as Python ends.
Only the imports of PyTorch, DeepSpeed and this project come before it, once a session. Tests of the start itself, and of a
process's name, start Python anew (`support.start_ranks(..., anew=True)`), and so do those on SLURM and of the launcher.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from multitrain.cluster.slurm import STOP_SIGNALS

IMPORTED = (
    *("multitrain.data.catalog", "multitrain.data.loader", "multitrain.engine.deepspeed"),
    *("multitrain.engine.distributed", "multitrain.engine.interruption", "multitrain.engine.leadtime"),
    *("multitrain.engine.saver", "multitrain.engine.trainer", "multitrain.engine.unreadable"),
    *("multitrain.engine.watchdog", "multitrain.evaluation.validation", "multitrain.model.multitrain"),
    *("multitrain.records.recorder", "multitrain.cluster.requeue", "multitrain.engine.build"),
)
"""Modules of this project that ranks import, and with them PyTorch and DeepSpeed."""
_SIZE = struct.Struct("!I")


class Forked:
    """A rank; used as `subprocess.Popen` is."""

    def __init__(self, pid: int, statuses: int, stdout: IO[bytes] | None) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._statuses = statuses

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; raises TimeoutExpired after `timeout` seconds."""
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._statuses], [], [], timeout)[0]:
            told = os.read(self._statuses, 20)
            os.close(self._statuses)
            assert told, f"nobody knows how {self.pid} ended"
            self.returncode = int(told)
        return self.returncode


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    out: int | None,
    folder: Path | None = None,
    imported: tuple[str, ...] = IMPORTED,
) -> Forked:
    """``python ARGUMENTS`` with this environment in `folder`; output to the descriptor `out`, or to a pipe of its own.

    It comes from the process, one for all that ask for the same, that has imported these modules.
    """
    reader, writer = os.pipe()
    pipe, end = (None, out) if out is not None else os.pipe()
    assert end is not None
    job = json.dumps(
        {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder or Path.cwd())}
    ).encode()
    server = _server(imported)
    socket.send_fds(server, [_SIZE.pack(len(job))], [end, writer])
    server.sendall(job)
    os.close(writer)
    if pipe is not None:
        os.close(end)
    told = os.read(reader, _SIZE.size)
    assert told, "no rank was forked: tests/forked.py could not import what ranks import; see above"
    return Forked(_SIZE.unpack(told)[0], reader, None if pipe is None else os.fdopen(pipe, "rb"))


@functools.cache
def _server(imported: tuple[str, ...]) -> socket.socket:
    """The process that ranks are forked from, started once; it ends with this one."""
    ours, theirs = socket.socketpair()
    paths = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-u", "-c", "import forked; forked.serve()", str(theirs.fileno()), *imported]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve() -> None:
    """In the server: returns never; in each rank: runs what was asked for, and ends as Python ends."""
    import importlib

    for name in sys.argv[2:]:
        module = importlib.import_module(name)
        if name == "multitrain.engine.deepspeed":
            module._import_deepspeed()
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        size, descriptors, _, _ = socket.recv_fds(connection, _SIZE.size, 2)
        if not size:
            os._exit(0)
        job = json.loads(connection.recv(_SIZE.unpack(size)[0], socket.MSG_WAITALL))
        if os.fork() == 0:
            connection.close()
            if _forked(*descriptors):
                _run(**job)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _forked(out: int, statuses: int) -> bool:
    """True in the rank; its parent stays until it ends, and says how."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        for number in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(number, signal.SIG_IGN)
        os.close(out)
        os.write(statuses, _SIZE.pack(pid))
        os.write(statuses, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    os.close(statuses)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    os.close(out)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(STOP_SIGNALS))
    return True


def _run(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """What ``python ARGUMENTS`` does."""
    import runpy

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    what, *rest = arguments
    if what in ("-m", "-c"):
        sys.argv = [what, *rest[1:]]
        sys.path[0] = "" if what == "-c" else folder
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(what))
    if what == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(what, run_name="__main__")
