"""Authenticated messages between the processes of one run: supervisors, and the ranks of a preflight.

Other users share the nodes of a cluster. Both sides of a connection first prove that they know the run's secret. After that
every message carries an authentication code (HMAC-SHA256) over its content, its direction and its sequence number. The server
closes a connection that is not authenticated after :data:`HANDSHAKE_SECONDS`, after :data:`HELLO_BYTES`, or when too many such
connections are open. Nothing is encrypted, and no message holds a secret.

A message is one line: 64 hexadecimal digits, a space, one JSON object in ASCII. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import selectors
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from multitrain.cluster.supervised import listen

SECRET_FILE = ".secret"
SECRET_VARIABLE = "MULTITRAIN_SECRET"
"""Environment variable: the secret in hexadecimal digits, for processes that share no run's folder."""
HANDSHAKE_SECONDS = 10.0
"""Seconds within which a connection must authenticate."""
HELLO_BYTES = 512
"""Bytes that are read from a connection before it is authenticated."""
MESSAGE_BYTES = 1 << 16
"""Largest message, in bytes."""
MAX_PENDING = 64
"""Connections that may be open without authentication, besides two for each expected rank; then the oldest one is closed."""
MAX_PORTS = 8
"""Ports to try: the given one, then others derived from the secret."""
FIRST_PORT, LAST_PORT = 20000, 31999
RANK_TAKEN = "taken"
"""Message of the server to a second connection that claims the same rank, which the server then closes."""

Message = dict[str, Any]


class ChannelError(Exception):
    """The processes of a run cannot connect; the message is one line with the reason."""


def secret(run: Path | None, environment: Mapping[str, str] = os.environ) -> bytes:
    """The secret of a run (32 bytes) from the environment, else from ``RUN/.secret``, which is created when it is missing.

    Raises:
        ChannelError: there is none, or other users can read or replace the file.
    """
    given = environment.get(SECRET_VARIABLE)
    if given is not None:
        return _parsed(given, f"the environment variable {SECRET_VARIABLE}", "unset it")
    if run is None:
        raise ChannelError(f"{SECRET_VARIABLE} is not set, and no folder of a run is given")
    return secret_of(run / SECRET_FILE)


def secret_of(path: Path) -> bytes:
    """The secret in a file, which is created when it is missing.

    Raises:
        ChannelError: other users can read or replace the file.
    """
    try:
        with contextlib.suppress(FileExistsError):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(file, "w") as opened:
                opened.write(secrets.token_hex(32) + "\n")
                opened.flush()
                os.fsync(file)
        return _parsed(_read(path), str(path))
    except OSError as error:
        raise ChannelError(f"{path}: {error.strerror or error}") from None


def _read(path: Path) -> str:
    """The file's text, once its creator has written it."""
    deadline = time.monotonic() + 5.0
    while True:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as opened:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise ChannelError(f"{path} is not a regular file; delete it")
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise ChannelError(
                    f"{path} belongs to user {found.st_uid} and has mode {found.st_mode & 0o777:04o}; it must be yours with mode "
                    f"0600. Delete it, or set {SECRET_VARIABLE} to 64 hexadecimal digits where the file system has no owners"
                )
            text = opened.read(MESSAGE_BYTES).decode("ascii", "replace")
        if text.endswith("\n") or time.monotonic() >= deadline:
            return text
        time.sleep(0.05)


def _parsed(text: str, where: str, remedy: str = "delete it") -> bytes:
    if re.fullmatch(r"[0-9a-fA-F]{64}\s*", text) is None:
        raise ChannelError(f"{where} does not hold 64 hexadecimal digits; {remedy}")
    return bytes.fromhex(text.strip())


def derived(key: bytes, *purpose: str) -> bytes:
    """A key for one purpose, derived from `key` (HMAC-SHA256, 32 bytes); it does not reveal `key`."""
    return hmac.new(key, json.dumps(purpose).encode(), hashlib.sha256).digest()


def ports(key: bytes, first: int) -> list[int]:
    """The ports that the server tries, and its clients in the same order."""
    found = [first]
    for number in range(MAX_PORTS - 1):
        value = int.from_bytes(derived(key, "port", str(number))[:4], "big")
        found.append(FIRST_PORT + value % (LAST_PORT - FIRST_PORT + 1))
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------- what is received


def integer(message: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """An integer field of a message. Raises ValueError: it is no integer in [low, high]."""
    value = message.get(name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is not an integer from {low} to {high}")
    return value


def text(message: Mapping[str, Any], name: str, limit: int = 500) -> str:
    """A text field of a message, cut to `limit` characters, without control characters. Raises ValueError: it is no text."""
    value = message.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return printable(value, limit)


def printable(value: str, limit: int = 500) -> str:
    """The first `limit` characters, with a question mark for each unprintable one, so that no text controls the terminal."""
    return "".join(c if c.isprintable() else "?" for c in value[:limit])


# ------------------------------------------------------------------------------------------------------- one connection


class Channel:
    """An authenticated connection; never blocks, except in :meth:`wait` and :meth:`read`."""

    def __init__(self, connection: socket.socket, key: bytes, *, server: bool, received: bytes = b"") -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # keep-alive detects a machine without power after five minutes
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 8)):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.connection = connection
        self._keys = [derived(key, "to client"), derived(key, "to server")]
        if server:
            self._keys.reverse()
        self._counts = [0, 0]  # received, sent
        self._buffer = received

    def send(self, **message: Any) -> None:
        """Send a message. A closed connection, or a full buffer, shows in the next :meth:`receive`."""
        body = json.dumps(message, separators=(",", ":")).encode("ascii")
        line = self._code(1, body) + b" " + body + b"\n"
        self._counts[1] += 1
        try:
            sent = self.connection.send(line)
        except OSError:
            return
        if sent < len(line):
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message] | None:
        """The messages that have arrived; None when the connection is closed, or a message is not authentic."""
        try:
            data = self.connection.recv(MESSAGE_BYTES)
        except (BlockingIOError, InterruptedError):
            return self._messages(b"")
        except OSError:
            return None
        return self._messages(data) if data else None

    def read(self, seconds: float) -> list[Message] | None:
        """The messages that arrive within `seconds`; None when the connection is closed."""
        return self.receive() if b"\n" in self._buffer or _readable(self.connection, seconds) else []

    def wait(self, deadline: float) -> Message | None:
        """The next message; None when none arrives before `deadline` (``time.monotonic()``), or the connection is closed."""
        found: list[Message] | None = self._messages(b"", limit=1)
        while not found:
            left = deadline - time.monotonic()
            if found is None or left <= 0 or not _readable(self.connection, left):
                return None
            try:
                data = self.connection.recv(MESSAGE_BYTES)
            except OSError:
                return None
            found = self._messages(data, limit=1) if data else None
        return found[0]

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def _messages(self, data: bytes, limit: int = 1 << 20) -> list[Message] | None:
        self._buffer += data
        found: list[Message] = []
        while len(found) < limit and b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            code, _, body = line.partition(b" ")
            if not hmac.compare_digest(code, self._code(0, body)):
                return None
            self._counts[0] += 1
            try:
                message = json.loads(body)
            except (ValueError, RecursionError):
                return None
            if not isinstance(message, dict):
                return None
            found.append(message)
        return None if len(self._buffer) > MESSAGE_BYTES else found

    def _code(self, direction: int, body: bytes) -> bytes:
        counted = str(self._counts[direction]).encode() + b" " + body
        return hmac.new(self._keys[direction], counted, hashlib.sha256).hexdigest().encode()


def _readable(connection: socket.socket, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _proof(key: bytes, mine: str, theirs: str) -> str:
    return derived(key, "server", mine, theirs).hex()


def _session(key: bytes, mine: str, theirs: str) -> bytes:
    return derived(key, "session", mine, theirs)


# --------------------------------------------------------------------------------------------------------------- client


def connect(
    key: bytes,
    address: str,
    first: int,
    deadline: float,
    hello: Message,
    *,
    pause: Callable[[], None] = lambda: time.sleep(0.05),
) -> Channel:
    """An authenticated connection to the server of the run.

    Args:
        first: port that the server tries first.
        deadline: ``time.monotonic()`` at which to give up.
        hello: first message to send.
        pause: called after each failed attempt; an exception that it raises ends the attempts.

    Raises:
        ChannelError: no process that knows the secret answers at `address`.
    """
    tried = ports(key, first)
    reasons: dict[int, str] = {}
    while True:
        for port in tried:
            try:
                channel = _greet(key, address, port)
            except (OSError, ValueError) as error:
                reasons[port] = printable(str(error), 200)
                pause()
                continue
            channel.send(**hello)
            return channel
        if time.monotonic() >= deadline:
            listed = "; ".join(f"port {port}: {reason}" for port, reason in list(reasons.items())[:3])
            raise ChannelError(f"rank 0 at {address} did not answer ({listed})")


def _greet(key: bytes, address: str, port: int) -> Channel:
    """Connect and authenticate. Raises OSError: no connection; ValueError: the other side does not know the secret."""
    connection = socket.create_connection((address, port), timeout=3.0)
    try:
        mine = secrets.token_hex(16)
        connection.sendall(f"multitrain {mine}\n".encode())
        line, rest = _first_line(connection)
        theirs, _, proof = line.partition(" ")
        if not hmac.compare_digest(proof.encode(), _proof(key, mine, theirs).encode()):
            raise ValueError("a process that does not know the run's secret answers there")
        return Channel(connection, _session(key, mine, theirs), server=False, received=rest)
    except BaseException:
        connection.close()
        raise


def _first_line(connection: socket.socket) -> tuple[str, bytes]:
    buffer, deadline = b"", time.monotonic() + 3.0
    while b"\n" not in buffer:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        data = connection.recv(HELLO_BYTES)
        if not data:
            raise ValueError("the connection was closed")
        buffer += data
        if len(buffer) > HELLO_BYTES or time.monotonic() > deadline:
            raise ValueError("the process that answers there does not belong to this run")
    line, _, rest = buffer.partition(b"\n")
    return line.decode("ascii", "replace"), rest


# --------------------------------------------------------------------------------------------------------------- server


class _Pending:
    """A connection that is not authenticated yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.buffer = b""
        self.channel: Channel | None = None


class Server:
    """Accepts connections from the ranks of a run; the field ``rank`` of the first message identifies the rank.

    Args:
        size: number of ranks; ranks 1 to `size` - 1 may connect, each once.
        first: port to try first.
        loopback: whether all ranks are on this machine.

    Raises:
        ChannelError: no port is free.
    """

    def __init__(self, key: bytes, size: int, first: int, *, loopback: bool) -> None:
        self._key = key
        self._size = size
        self.channels: dict[int, Channel] = {}
        """Connections of the ranks that are connected now."""
        self._selector = selectors.DefaultSelector()
        self._pending: dict[int, _Pending] = {}  # by file descriptor
        self._listener: socket.socket | None = _listening_socket(loopback, ports(key, first))
        self.port = int(self._listener.getsockname()[1])
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def poll(self, seconds: float) -> Iterator[tuple[int, Message | None]]:
        """Messages that have arrived: (rank, message), first the hello of each rank; (rank, None): its connection is closed."""
        self._close_expired()
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._accept()
            elif isinstance(key.data, _Pending):
                yield from self._from_pending(key.data)
            else:
                yield from self._received(key.data)

    def drop(self, rank: int) -> None:
        """Close the connection of a rank."""
        channel = self.channels.pop(rank, None)
        if channel is not None:
            self._selector.unregister(channel.connection)
            channel.close()

    def stop_listening(self) -> None:
        """Refuse further connections."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for pending in list(self._pending.values()):
            self._close(pending)

    def close(self) -> None:
        """Close everything."""
        self.stop_listening()
        for rank in list(self.channels):
            self.drop(rank)
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # closed again, or too many open files
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if len(self._pending) >= MAX_PENDING + 2 * self._size:
                self._close(next(iter(self._pending.values())))
            pending = _Pending(connection)
            self._pending[connection.fileno()] = pending
            self._selector.register(connection, selectors.EVENT_READ, pending)

    def _close_expired(self) -> None:
        now = time.monotonic()
        for pending in list(self._pending.values()):
            if now - pending.since < HANDSHAKE_SECONDS:
                break  # they are in the order of arrival
            self._close(pending)

    def _close(self, pending: _Pending) -> None:
        self._release(pending)
        pending.connection.close()

    def _release(self, pending: _Pending) -> None:
        if self._pending.pop(pending.connection.fileno(), None) is not None:
            self._selector.unregister(pending.connection)

    def _from_pending(self, pending: _Pending) -> Iterator[tuple[int, Message | None]]:
        if pending.connection.fileno() not in self._pending:
            return  # closed meanwhile
        if pending.channel is None:
            self._answer(pending)
            return
        messages = pending.channel.receive()
        if messages == []:
            if len(pending.channel._buffer) > 4 * HELLO_BYTES:
                self._close(pending)
            return
        rank = messages[0].get("rank") if messages else None
        if type(rank) is int and rank in self.channels:
            pending.channel.send(action=RANK_TAKEN, rank=rank)
        if type(rank) is not int or not 0 < rank < self._size or rank in self.channels:
            self._close(pending)
            return
        assert messages
        self._release(pending)
        self.channels[rank] = pending.channel
        self._selector.register(pending.connection, selectors.EVENT_READ, rank)
        yield from ((rank, message) for message in messages)

    def _answer(self, pending: _Pending) -> None:
        """Answer the hello of a peer with the proof; only a process that knows the secret can send a message after that."""
        try:
            data = pending.connection.recv(HELLO_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        pending.buffer += data
        line, newline, rest = pending.buffer.partition(b"\n")
        match = re.fullmatch(rb"multitrain ([0-9a-f]{32})", line)
        if not data or len(line) > HELLO_BYTES or (newline and not match):
            self._close(pending)
        if not match or not newline:
            return
        mine, theirs = secrets.token_hex(16), match.group(1).decode()
        try:
            pending.connection.send(f"{mine} {_proof(self._key, theirs, mine)}\n".encode())
        except OSError:
            self._close(pending)
            return
        pending.channel = Channel(pending.connection, _session(self._key, theirs, mine), server=True, received=rest)

    def _received(self, rank: int) -> Iterator[tuple[int, Message | None]]:
        channel = self.channels.get(rank)
        messages = channel.receive() if channel is not None else []
        if messages is None:
            self.drop(rank)
            yield rank, None
            return
        yield from ((rank, message) for message in messages)


def _listening_socket(loopback: bool, candidates: list[int]) -> socket.socket:
    reason = ""
    for port in candidates:
        try:
            listener = listen(loopback, port)
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        listener.setblocking(False)
        return listener
    tried = ", ".join(map(str, candidates))
    raise ChannelError(f"no free port for the connections between ranks on {socket.gethostname()}: {tried} ({reason})")
