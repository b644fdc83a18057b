"""Authenticated messages between the processes of one run: supervisors, and the ranks of a preflight.

Other users share the nodes of a cluster. Both sides of a connection prove that they know the run's secret before anything
else is read of what they say; after that every message carries an authentication code over its content, its direction and
its number. A connection that does not prove it is closed: after :data:`HANDSHAKE` seconds, after :data:`HELLO` bytes, or when
too many others like it are open. Nothing is encrypted, and no message holds a secret.

A message is one line: 64 hexadecimal digits, a blank, one JSON object in ASCII. Standard library only.
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

FILE = ".secret"
SECRET = "MULTITRAIN_SECRET"
"""Environment variable: the secret in hexadecimal digits, where processes have no run's folder, or not the same."""
HANDSHAKE = 10.0
"""Seconds within which a connection must have proved itself."""
HELLO = 512
"""Bytes that are read of a connection that has not proved itself."""
LINE = 1 << 16
"""Bytes of a message at most."""
STRANGERS = 64
"""Connections that have not proved themselves, beside two for each rank that is awaited; the oldest is closed for the next."""
PORTS = 8
"""Ports that are tried: the given one, then others that follow from the secret."""
FIRST_PORT, LAST_PORT = 20000, 31999
TAKEN = "taken"
"""What a server tells a rank that has come already, before it closes the second connection."""

Message = dict[str, Any]


class ChannelError(Exception):
    """Processes of a run cannot meet; one line that says why."""


def secret(run: Path | None, environment: Mapping[str, str] = os.environ) -> bytes:
    """The secret of a run, 32 bytes: that of the environment, else of ``RUN/.secret``, which is made when it is not there.

    Raises:
        ChannelError: there is none, or the file is not ours alone.
    """
    given = environment.get(SECRET)
    if given is not None:
        return _parsed(given, f"the environment variable {SECRET}", "unset it")
    if run is None:
        raise ChannelError(f"{SECRET} is not set, and no folder of a run is given")
    return secret_of(run / FILE)


def secret_of(path: Path) -> bytes:
    """The secret in a file, which is made when it is not there. Raises ChannelError: the file is not ours alone."""
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
                raise ChannelError(f"{path} is no plain file; delete it")
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise ChannelError(
                    f"{path} belongs to user {found.st_uid} and has mode {found.st_mode & 0o777:04o}; it must be yours with mode "
                    f"0600. Delete it, or set {SECRET} to 64 hexadecimal digits where the file system has no owners"
                )
            text = opened.read(LINE).decode("ascii", "replace")
        if text.endswith("\n") or time.monotonic() >= deadline:
            return text
        time.sleep(0.05)


def _parsed(text: str, where: str, remedy: str = "delete it") -> bytes:
    if re.fullmatch(r"[0-9a-fA-F]{64}\s*", text) is None:
        raise ChannelError(f"{where} does not hold 64 hexadecimal digits; {remedy}")
    return bytes.fromhex(text.strip())


def derived(key: bytes, *purpose: str) -> bytes:
    """Another secret, for one purpose; from it the first cannot be told."""
    return hmac.new(key, json.dumps(purpose).encode(), hashlib.sha256).digest()


def ports(key: bytes, first: int) -> list[int]:
    """The ports that a server tries, and its clients after it."""
    found = [first]
    for number in range(PORTS - 1):
        value = int.from_bytes(derived(key, "port", str(number))[:4], "big")
        found.append(FIRST_PORT + value % (LAST_PORT - FIRST_PORT + 1))
    return list(dict.fromkeys(found))


# ----------------------------------------------------------------------------------------------------- what is received


def integer(message: Mapping[str, Any], name: str, low: int, high: int) -> int:
    """A whole number of a message. Raises ValueError: it is none, or not in [low, high]."""
    value = message.get(name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is no whole number from {low} to {high}")
    return value


def text(message: Mapping[str, Any], name: str, most: int = 500) -> str:
    """A text of a message, cut to `most` characters and without control characters. Raises ValueError: it is none."""
    value = message.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return printable(value, most)


def printable(value: str, most: int = 500) -> str:
    """Text that cannot steer a terminal: what is not printable becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in value[:most])


# ------------------------------------------------------------------------------------------------------- one connection


class Channel:
    """A connection whose other side has proved itself; never blocks."""

    def __init__(self, connection: socket.socket, key: bytes, *, server: bool, received: bytes = b"") -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a machine that has lost its power is noticed after five minutes
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
        """Send, unless the other side is gone, or has read nothing for long: that is found when receiving."""
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
        """What has arrived; None when the other side is gone, or is no longer who it was."""
        try:
            data = self.connection.recv(LINE)
        except (BlockingIOError, InterruptedError):
            return self._messages(b"")
        except OSError:
            return None
        return self._messages(data) if data else None

    def read(self, seconds: float) -> list[Message] | None:
        """What arrives within so many seconds; None when the other side is gone."""
        return self.receive() if b"\n" in self._buffer or _readable(self.connection, seconds) else []

    def wait(self, deadline: float) -> Message | None:
        """The next message; None when none came before `deadline` (``time.monotonic()``), or the other side is gone."""
        found: list[Message] | None = self._messages(b"", most=1)
        while not found:
            left = deadline - time.monotonic()
            if found is None or left <= 0 or not _readable(self.connection, left):
                return None
            try:
                data = self.connection.recv(LINE)
            except OSError:
                return None
            found = self._messages(data, most=1) if data else None
        return found[0]

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def _messages(self, data: bytes, most: int = 1 << 20) -> list[Message] | None:
        self._buffer += data
        found: list[Message] = []
        while len(found) < most and b"\n" in self._buffer:
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
        return None if len(self._buffer) > LINE else found

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
    """A connection to the server of the run, which has proved itself; `hello` is its first message.

    Args:
        first: port that the server tries first.
        deadline: ``time.monotonic()`` at which to give up.
        pause: called after each that fails; may raise to end it.

    Raises:
        ChannelError: no process that knows the secret answers there.
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
            said = "; ".join(f"port {port}: {reason}" for port, reason in list(reasons.items())[:3])
            raise ChannelError(f"rank 0 at {address} did not answer ({said})")


def _greet(key: bytes, address: str, port: int) -> Channel:
    """Raises OSError: no connection; ValueError: the other side does not know the secret."""
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
        data = connection.recv(HELLO)
        if not data:
            raise ValueError("the connection was closed")
        buffer += data
        if len(buffer) > HELLO or time.monotonic() > deadline:
            raise ValueError("what answers there is no process of this run")
    line, _, rest = buffer.partition(b"\n")
    return line.decode("ascii", "replace"), rest


# --------------------------------------------------------------------------------------------------------------- server


class _Stranger:
    """A connection that has not proved itself yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.buffer = b""
        self.channel: Channel | None = None


class Server:
    """Takes connections of the ranks of a run, which are told apart by the field ``rank`` of their first message.

    Args:
        size: ranks of the run; 1 to `size` - 1 may come, each once.
        first: port that is tried first.
        loopback: whether all ranks are on this machine.

    Raises:
        ChannelError: no port can be had.
    """

    def __init__(self, key: bytes, size: int, first: int, *, loopback: bool) -> None:
        self._key = key
        self._size = size
        self.channels: dict[int, Channel] = {}
        """Of the ranks that have come and are not gone."""
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[int, _Stranger] = {}  # by file descriptor
        self._listener: socket.socket | None = _bound(loopback, ports(key, first))
        self.port = int(self._listener.getsockname()[1])
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    def poll(self, seconds: float) -> Iterator[tuple[int, Message | None]]:
        """What ranks have sent meanwhile: (rank, message), the first of each being its hello; (rank, None): it is gone."""
        self._forget_old()
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._accept()
            elif isinstance(key.data, _Stranger):
                yield from self._heard_of(key.data)
            else:
                yield from self._received(key.data)

    def drop(self, rank: int) -> None:
        """Close the connection of a rank."""
        channel = self.channels.pop(rank, None)
        if channel is not None:
            self._selector.unregister(channel.connection)
            channel.close()

    def stop_listening(self) -> None:
        """All are there: further connections are refused."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        for stranger in list(self._strangers.values()):
            self._close(stranger)

    def close(self) -> None:
        """Close everything."""
        self.stop_listening()
        for rank in list(self.channels):
            self.drop(rank)
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # gone again, or too many open files
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if len(self._strangers) >= STRANGERS + 2 * self._size:
                self._close(next(iter(self._strangers.values())))
            stranger = _Stranger(connection)
            self._strangers[connection.fileno()] = stranger
            self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _forget_old(self) -> None:
        now = time.monotonic()
        for stranger in list(self._strangers.values()):
            if now - stranger.since < HANDSHAKE:
                break  # in the order in which they came
            self._close(stranger)

    def _close(self, stranger: _Stranger) -> None:
        self._release(stranger)
        stranger.connection.close()

    def _release(self, stranger: _Stranger) -> None:
        if self._strangers.pop(stranger.connection.fileno(), None) is not None:
            self._selector.unregister(stranger.connection)

    def _heard_of(self, stranger: _Stranger) -> Iterator[tuple[int, Message | None]]:
        if stranger.connection.fileno() not in self._strangers:
            return  # closed meanwhile
        if stranger.channel is None:
            self._answer(stranger)
            return
        messages = stranger.channel.receive()
        if messages == []:
            if len(stranger.channel._buffer) > 4 * HELLO:
                self._close(stranger)
            return
        rank = messages[0].get("rank") if messages else None
        if type(rank) is int and rank in self.channels:
            stranger.channel.send(do=TAKEN, rank=rank)
        if type(rank) is not int or not 0 < rank < self._size or rank in self.channels:
            self._close(stranger)
            return
        assert messages
        self._release(stranger)
        self.channels[rank] = stranger.channel
        self._selector.register(stranger.connection, selectors.EVENT_READ, rank)
        yield from ((rank, message) for message in messages)

    def _answer(self, stranger: _Stranger) -> None:
        """Authenticate to the peer that says hello; messages after that come from a process that knows the secret."""
        try:
            data = stranger.connection.recv(HELLO)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        stranger.buffer += data
        line, newline, rest = stranger.buffer.partition(b"\n")
        match = re.fullmatch(rb"multitrain ([0-9a-f]{32})", line)
        if not data or len(line) > HELLO or (newline and not match):
            self._close(stranger)
        if not match or not newline:
            return
        mine, theirs = secrets.token_hex(16), match.group(1).decode()
        try:
            stranger.connection.send(f"{mine} {_proof(self._key, theirs, mine)}\n".encode())
        except OSError:
            self._close(stranger)
            return
        stranger.channel = Channel(stranger.connection, _session(self._key, theirs, mine), server=True, received=rest)

    def _received(self, rank: int) -> Iterator[tuple[int, Message | None]]:
        channel = self.channels.get(rank)
        messages = channel.receive() if channel is not None else []
        if messages is None:
            self.drop(rank)
            yield rank, None
            return
        yield from ((rank, message) for message in messages)


def _bound(loopback: bool, candidates: list[int]) -> socket.socket:
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
    raise ChannelError(f"no port to meet at could be had on {socket.gethostname()}: {tried} ({reason})")
