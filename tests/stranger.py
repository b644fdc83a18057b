"""What another user of the node may send to a port: random and structured messages, none of them with a run's secret."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import traceback
from collections.abc import Callable, Iterator

import pytest

NOBODY = 65534
KEYS = ("default_pg/0//cpu//0/0", "0//cpu//0/0", "worker_count", "init/", "store_based_barrier_key:0", "")


def messages(seed: int) -> Iterator[bytes]:
    """Without an end."""
    random_ = random.Random(seed)
    fields = ("rank", "code", "stopping", "text", "fate", "do", "port", "attempt", "job", "node", "why", "salt")
    values = (0, 1, 2, 99, -1, 2**70, 1.5, True, None, "start", "end", "\x1b[2J", "x" * 300, [1], {"rank": 1})
    while True:
        kind = random_.randrange(8)
        if kind == 0:
            yield random_.randbytes(random_.choice((1, 7, 64, 700, 9000)))
        elif kind == 1:
            yield json.dumps(random_.choice(([1, 2], {"rank": "zz"}, {"rank": 99}, {"rank": 1}, 5))).encode() + b"\n"
        elif kind == 2:
            found = {f: random_.choice(values) for f in random_.sample(fields, 4)}
            yield json.dumps(found).encode() + b"\n"
        elif kind == 3:
            yield b"multitrain " + random_.randbytes(16).hex().encode() + b"\n"
        elif kind == 4:
            body = json.dumps({"rank": 1, "node": "x"}).encode()
            yield random_.randbytes(32).hex().encode() + b" " + body + b"\n"
        elif kind == 5:
            yield b"[" * random_.choice((10, 60000)) + b"\n"
        elif (
            kind == 6
        ):  # torch's store: its greeting, then a call with a key that is not there, or much too long a text
            yield struct.pack("<BI", 0, 0x3C85F7CE)
            yield struct.pack("<B", random_.randrange(14)) + b"".join(
                struct.pack("<Q", len(k)) + k.encode() for k in random_.sample(KEYS, 2)
            )
        else:
            yield struct.pack("<BIBQ", 0, 0x3C85F7CE, 1, random_.choice((2**63, 2**31, 10**7))) + b"x" * 100


def attack(ports: list[int], count: int, seed: int = 0) -> int:
    """Send so many messages, a few a connection, some of which stay open; the number that were sent."""
    source, sent, kept = messages(seed), 0, []
    random_ = random.Random(seed + 1)
    while sent < count:
        with contextlib.suppress(OSError):
            connection = socket.socket()  # create_connection() would read Python's files, which others may not see
            connection.settimeout(2.0)
            connection.connect(("127.0.0.1", random_.choice(ports)))
            connection.setblocking(False)
            if random_.random() < 0.1:
                kept.append(connection)
            for _ in range(random_.randrange(1, 20)):
                sent += 1
                connection.send(next(source))
            if len(kept) > 150:
                kept.pop(0).close()
            if connection not in kept:
                connection.close()
    return sent


def as_another_user(action: Callable[[], object]) -> None:
    """Call `action` in a process of another user; skipped without the rights for that."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
