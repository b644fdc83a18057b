"""Other users of the node: what they send to the sockets of a run is not believed, and costs nothing."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stranger import as_another_user, attack

from launch import channel
from launch.channel import ChannelError, Server
from multitrain.cluster.slurm import free_port

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server(KEY, 4, free_port(), loopback=True)
    yield found
    found.close()


def poll(server: Server, until: int) -> list[tuple[int, object]]:
    """What comes, until there are so many messages."""
    found: list[tuple[int, object]] = []
    deadline = time.monotonic() + 600
    while len(found) < until and time.monotonic() < deadline:
        found += server.poll(0.1)
    return found


def joined(server: Server, rank: int, key: bytes = KEY) -> channel.Channel:
    result: list[channel.Channel] = []

    def connect() -> None:
        result.append(channel.connect(key, "127.0.0.1", server.port, time.monotonic() + 600, {"rank": rank}))

    thread = threading.Thread(target=connect)
    thread.start()
    assert poll(server, 1) == [(rank, {"rank": rank})]
    thread.join()
    return result[0]


def test_messages_go_both_ways_in_order(server: Server) -> None:
    client = joined(server, 2)
    for number in range(100):
        client.send(number=number)
        server.channels[2].send(back=number)
    assert poll(server, 100) == [(2, {"number": n}) for n in range(100)]
    assert [client.wait(time.monotonic() + 600) for _ in range(100)] == [{"back": n} for n in range(100)]
    client.close()
    assert poll(server, 1) == [(2, None)]


def test_a_rank_obeys_nobody_who_does_not_know_the_secret() -> None:
    """A stranger has bound the port before: another one is taken, and found."""
    taken = socket.create_server(("127.0.0.1", 0))
    first = taken.getsockname()[1]

    def pretend() -> None:
        while True:
            try:
                connection, _ = taken.accept()
                connection.sendall(b"0" * 32 + b" " + b"0" * 64 + b'\n{"action":"start","port":1}\n')
            except OSError:
                return

    threading.Thread(target=pretend, daemon=True).start()
    server = Server(KEY, 4, first, loopback=True)
    assert server.port in channel.ports(KEY, first)[1:]
    result: list[channel.Channel] = []
    thread = threading.Thread(
        target=lambda: result.append(channel.connect(KEY, "127.0.0.1", first, time.monotonic() + 600, {"rank": 1}))
    )
    thread.start()
    assert poll(server, 1) == [(1, {"rank": 1})]
    thread.join()
    with pytest.raises(ChannelError, match="does not know the run's secret"):
        channel.connect(OTHER, "127.0.0.1", first, time.monotonic(), {"rank": 1})
    taken.close()
    server.close()


def test_no_port_to_be_had_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        monkeypatch.setattr(channel, "MAX_PORTS", 1)
        with pytest.raises(ChannelError, match=f"no free port for the connections between ranks on .*: {first} "):
            Server(KEY, 2, first, loopback=True)


@pytest.mark.parametrize("rank", [0, 4, -1, True, "1", None, 2.0, 2])
def test_a_rank_that_there_is_not_or_that_is_there_already_does_not_join(server: Server, rank: object) -> None:
    there = joined(server, 2)
    result: list[channel.Channel] = []
    thread = threading.Thread(
        target=lambda: result.append(
            channel.connect(KEY, "127.0.0.1", server.port, time.monotonic() + 600, {"rank": rank})
        )
    )
    thread.start()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        assert list(server.poll(0.05)) == []
    thread.join()
    if rank == 2 and type(rank) is int:
        assert result[0].receive() == [{"action": channel.RANK_TAKEN, "rank": 2}]
    assert result[0].receive() is None
    assert list(server.channels) == [2]
    there.close()


def test_a_message_that_was_changed_repeated_or_is_too_long_ends_its_connection(server: Server) -> None:
    for rank, change in ((1, lambda line: line.replace(b"5", b"6")), (2, lambda line: line + line)):
        client = joined(server, rank)
        sent: list[bytes] = []
        real, client.connection = client.connection, _Recorder(sent)  # type: ignore[assignment]
        client.send(code=5)
        real.sendall(change(sent[0]))
        assert poll(server, 1)[0] == (rank, None)
    client = joined(server, 3)
    client.connection.setblocking(True)
    client.connection.sendall(b"x" * (channel.MESSAGE_BYTES + 100))
    assert poll(server, 1) == [(3, None)]


class _Recorder:
    def __init__(self, sent: list[bytes]) -> None:
        self._sent = sent

    def send(self, data: bytes) -> int:
        self._sent.append(data)
        return len(data)


def test_the_secret_is_made_once_and_is_the_users_alone(tmp_path: Path) -> None:
    first = channel.secret(tmp_path, {})
    assert len(first) == 32
    assert channel.secret(tmp_path, {}) == first
    assert stat.S_IMODE((tmp_path / ".secret").stat().st_mode) == 0o600
    assert channel.secret(None, {channel.SECRET_VARIABLE: "ab" * 32}) == b"\xab" * 32
    (tmp_path / ".secret").chmod(0o640)
    with pytest.raises(ChannelError, match="must be yours with mode 0600"):
        channel.secret(tmp_path, {})
    (tmp_path / ".secret").chmod(0o600)
    (tmp_path / ".secret").write_text("short\n")
    with pytest.raises(ChannelError, match="does not hold 64 hexadecimal digits"):
        channel.secret(tmp_path, {})
    (tmp_path / ".secret").unlink()
    (tmp_path / ".secret").symlink_to("/etc/passwd")
    with pytest.raises(ChannelError, match=r"\.secret: "):
        channel.secret(tmp_path, {})
    with pytest.raises(ChannelError):
        channel.secret(tmp_path / "absent", {})
    with pytest.raises(ChannelError, match="MULTITRAIN_SECRET is not set"):
        channel.secret(None, {})


def test_a_secret_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    channel.secret(tmp_path, {})
    os.chown(tmp_path / ".secret", 65534, 65534)
    with pytest.raises(ChannelError, match="belongs to user 65534"):
        channel.secret(tmp_path, {})


def test_texts_cannot_steer_a_terminal() -> None:
    assert channel.text({"why": "a\x1b[2J\nb" + "x" * 900}, "why", 8) == "a?[2J?bx"
    with pytest.raises(ValueError, match="not a text"):
        channel.text({"why": 5}, "why")


# --------------------------------------------------------------------------------------------------- a real run's sockets

MESSAGES = 10_000
RANK = """
import os, sys, time
from pathlib import Path
(Path(sys.argv[1]) / f"started{os.environ['RANK']}").write_text("x")
time.sleep(0.5)
"""


def process(root: Path, rank: int, port: int, *command: str, **environment: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(root), **environment}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env={**clean, **place}, stdout=-1, stderr=-1, text=True, cwd=root
    )


def listening(port: int) -> None:
    deadline = time.monotonic() + 600
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_what_strangers_send_to_a_supervisor_changes_nothing(root: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    port = free_port()
    command = ("launch.supervisor", str(tmp_path), "0", str(tmp_path / "rank.py"), str(tmp_path))
    first = process(root, 0, port, *command)
    listening(port)
    as_another_user(lambda: attack([port], MESSAGES))
    assert first.poll() is None
    assert not list(tmp_path.glob("started*")), "nobody was taken for a rank"
    second = process(root, 1, port, *command)
    for found in (first, second):
        _, errors = found.communicate(timeout=300)
        assert (found.returncode, errors) == (0, "")
    assert len(list(tmp_path.glob("started*"))) == 2


def test_what_strangers_send_to_a_preflight_changes_nothing(root: Path, tmp_path: Path) -> None:
    port = free_port()
    command = ("launch.preflight", "--dir", str(tmp_path))
    first = process(root, 0, port, *command, **{channel.SECRET_VARIABLE: "ab" * 32})
    listening(port)
    as_another_user(lambda: attack([port], MESSAGES, seed=7))
    assert first.poll() is None
    second = process(root, 1, port, *command, **{channel.SECRET_VARIABLE: "ab" * 32})
    out, errors = first.communicate(timeout=300)
    second.communicate(timeout=300)
    said = [line for line in errors.splitlines() if "inodes free" not in line]
    assert (first.returncode, second.returncode, said) == (0, 0, [])
    assert [line.split()[0] for line in out.splitlines()] == ["rank", "0", "1"]
