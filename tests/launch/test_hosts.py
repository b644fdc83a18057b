"""Several machines without SLURM: two network namespaces joined by a cable, and `ssh` to a real sshd on the loopback."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import free_port, settings, train, write_run

from multitrain.engine import checkpoint as ck

PROGRAM = """
import sys
from pathlib import Path
from launch import hosts
from multitrain.config import load
run = Path(sys.argv[1])
config = load(run)
node = {"node": int(sys.argv[2])} if len(sys.argv) > 2 else {}
if (run / "rank.py").exists():  # in the place of training
    hosts.training = lambda run: (str(run / "rank.py"), str(run))
sys.exit(hosts.run(run, config.model_copy(update={"cluster": config.cluster.model_copy(update=node)})))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from multitrain.cluster.slurm import STOP_SIGNALS, unblock_stop_signals
run, rank = Path(sys.argv[1]), os.environ["RANK"]
for number in STOP_SIGNALS:
    signal.signal(number, lambda *_: (run / "stop").touch())  # as ranks do by an agreement
unblock_stop_signals()
with open(run / f"started{rank}", "a") as file:
    file.write(os.environ["MULTITRAIN_START"] + " at " + os.environ["GLOO_SOCKET_IFNAME"] + chr(10))
print("rank", rank, "runs", flush=True)
while not (run / "done").exists() and not (run / "stop").exists():
    time.sleep(0.05)
os._exit(0 if (run / "done").exists() else 75)  # as ranks end: at the end of Python, handlers of signals are gone
"""
"""A rank that waits for a file, or a stop."""
UPDATES = 8

pytestmark = pytest.mark.timeout(1200)  # starts of training, one after the other, beside other work


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of the same two ranks, on one machine."""
    run, _ = write_run(tmp_path_factory.mktemp("one"), mapping(tiny_data))
    train(run, 2, timeout=600)
    return run


def mapping(data: Path, **cluster: Any) -> dict[str, Any]:
    changes = {f"cluster__{name}": value for name, value in cluster.items()}
    return settings(data, nodes=2, updates=UPDATES, checkpoint__every=2, cluster__kind="slurm", **changes)


def run_of(root: Path, folder: Path, data: Path, **cluster: Any) -> Path:
    whole = mapping(data)
    whole["cluster"] = {"kind": "hosts", "cpus_per_gpu": 1, **cluster}
    run, _ = write_run(folder, whole)
    (run / "code").mkdir()
    for name in ("multitrain", "launch"):
        (run / "code" / name).symlink_to(root / name)
    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def until(condition: Callable[[], object], processes: list[subprocess.Popen[str]], run: Path) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        logs = "\n".join(f"{log}\n{log.read_text()[-3000:]}" for log in sorted(run.glob("logs/*")))
        assert time.monotonic() < deadline, logs
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended, f"{ended}\n{logs}"
        time.sleep(0.02)


def assert_same_bits(run: Path, reference: Path) -> None:
    ours, theirs = (ck.read(ck.folder_of(r / "checkpoints", UPDATES)) for r in (run, reference))
    for name, tensor in {**theirs.weights, **theirs.moments}.items():
        assert tensor.equal({**ours.weights, **ours.moments}[name]), f"{name} differs"
    for key in ("update", "loss", "grad_norm", "tickets"):
        assert [m[key] for m in metrics(run)] == [m[key] for m in metrics(reference)]


# ------------------------------------------------------------------------------------------------------- two machines


class Machines:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = [f"mt{os.getpid() % 10000}{end}" for end in "ab"]

    def start(self, run: Path, node: int) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        command = ["ip", "netns", "exec", self.names[node], sys.executable, "-c", PROGRAM, str(run), str(node)]
        return subprocess.Popen(
            command,
            env={**clean, "PYTHONPATH": str(self._root), "OMP_NUM_THREADS": "1"},
            stdout=-1,
            stderr=-1,
            text=True,
        )

    def kill(self, node: int) -> None:
        """The machine is gone, with all that ran on it."""
        while pids := ip("netns", "pids", self.names[node]).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def machines(root: Path) -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 to make two machines")
    found = Machines(root)
    a, b = found.names
    try:
        try:
            for name in (a, b):
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        for name, address in ((a, "10.77.0.1/24"), (b, "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield found
    finally:
        for node, name in enumerate(found.names):
            with contextlib.suppress(subprocess.CalledProcessError):
                found.kill(node)
                ip("netns", "del", name)


def started(run: Path, rank: int) -> list[str]:
    file = run / f"started{rank}"
    return file.read_text().splitlines() if file.exists() else []


def ended(processes: list[subprocess.Popen[str]], status: int) -> list[tuple[str, str]]:
    said = [process.communicate(timeout=500) for process in processes]
    assert [p.returncode for p in processes] == [status] * len(processes), said
    return said


@pytest.fixture
def waiting(root: Path, tmp_path: Path, tiny_data: Path) -> Path:
    """A run whose ranks only wait."""
    run = run_of(root, tmp_path, tiny_data, rendezvous="10.77.0.1:23456", node=0)
    (run / "rank.py").write_text(RANK)
    return run


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_was_killed_joins_again(machines: Machines, waiting: Path, lost: int) -> None:
    processes = [machines.start(waiting, node) for node in (0, 1)]
    until(lambda: all(len(started(waiting, rank)) == 1 for rank in (0, 1)), processes, waiting)
    machines.kill(lost)
    processes[lost].wait(20)
    processes[lost] = machines.start(waiting, lost)
    until(lambda: all(len(started(waiting, rank)) == 2 for rank in (0, 1)), processes, waiting)
    assert started(waiting, 0) == started(waiting, 1), (
        "one name of the start on both machines, and the cable's interface"
    )
    assert all(line.endswith(" at cable") for line in started(waiting, 0))
    (waiting / "done").touch()
    said = ended(processes, 0)
    assert said[1 - lost][1].count("waiting for all ranks to connect") == 2


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_on_either_machine_ends_both(
    machines: Machines, waiting: Path, stopped: int, number: signal.Signals
) -> None:
    processes = [machines.start(waiting, node) for node in (0, 1)]
    until(lambda: all(started(waiting, rank) for rank in (0, 1)), processes, waiting)
    processes[stopped].send_signal(number)
    ended(processes, 75)


def test_the_weights_are_the_same_bits_when_a_machine_was_killed(
    machines: Machines, root: Path, tmp_path: Path, tiny_data: Path, reference: Path
) -> None:
    run = run_of(root, tmp_path, tiny_data, rendezvous="10.77.0.1:23456", node=0)
    processes = [machines.start(run, node) for node in (0, 1)]
    until(lambda: len(metrics(run)) >= 3, processes, run)
    machines.kill(1)
    processes[1].wait(20)
    processes[1] = machines.start(run, 1)
    ended(processes, 0)
    assert_same_bits(run, reference)


def test_the_same_command_typed_twice_says_so_and_harms_nothing(machines: Machines, waiting: Path) -> None:
    config = waiting / "config.yaml"
    config.write_text(config.read_text().replace("nodes: 2", "nodes: 3"))  # so that all wait for a third
    first, twin = (machines.start(waiting, 1) for _ in range(2))
    second = machines.start(waiting, 0)
    log = waiting / "logs" / "hosts-rank1.log"
    said = "rank 1: another process already is rank 1 of this start: was the same command typed twice?"
    try:
        until(lambda: log.exists() and said in log.read_text(), [first, twin, second], waiting)
        assert not started(waiting, 0)
    finally:
        for process in (first, twin, second):
            process.send_signal(signal.SIGINT)
            process.wait(timeout=300)


def test_a_stop_while_a_machine_waits_for_the_other_ends_it(
    machines: Machines, root: Path, tmp_path: Path, tiny_data: Path
) -> None:
    run = run_of(root, tmp_path, tiny_data, rendezvous="10.77.0.1:23456", node=0)
    for node in (0, 1):
        process = machines.start(run, node)
        assert process.stderr is not None
        assert "waiting for all ranks to connect" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 75, errors


# ---------------------------------------------------------------------------------------------------------------- ssh


@pytest.fixture
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an `ssh` that reaches a real sshd on the loopback, by a key of its own."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    if os.geteuid() != 0 or not os.path.exists(sshd) or shutil.which("ssh-keygen") is None:
        pytest.skip("needs root and OpenSSH's sshd")
    folder = Path("/tmp") / f"mt-ssh-{os.getpid()}"
    folder.mkdir(mode=0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "sshd").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile {folder}/pid\n"
    )
    (folder / "ssh").write_text(
        f"#!/bin/sh\nexec /usr/bin/ssh -F none -p {port} -i {folder}/user -o User={getpass.getuser()} "
        f'-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (folder / "ssh").chmod(0o755)
    daemon = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while subprocess.run([folder / "ssh", "127.0.0.1", "true"], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield folder
    finally:
        daemon.terminate()
        daemon.wait()
        shutil.rmtree(folder)


def terminal(root: Path, ssh: Path, run: Path) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment = {**clean, "PYTHONPATH": str(root), "PATH": f"{ssh}:{os.environ['PATH']}"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(run)], env=environment, stdout=-1, stderr=-1, text=True)


def test_one_terminal_starts_all_machines_shows_both_and_ends_both(
    ssh: Path, root: Path, tmp_path: Path, tiny_data: Path
) -> None:
    hosts = ["127.0.0.1", "localhost"]
    run = run_of(root, tmp_path, tiny_data, hosts=hosts, rendezvous=f"127.0.0.1:{free_port()}")
    (run / "code" / "sitecustomize.py").write_text(
        "from launch import rank\nrank.training = lambda run: (str(run / 'rank.py'), str(run))\n"
    )
    (run / "rank.py").write_text(RANK)
    for status, act in ((75, None), (0, run / "done")):
        (run / "stop").unlink(missing_ok=True)
        before = len(started(run, 1))
        process = terminal(root, ssh, run)
        until(lambda: all(len(started(run, rank)) > before for rank in (0, 1)), [process], run)  # noqa: B023
        if act is None:
            process.send_signal(signal.SIGINT)
        else:
            act.touch()
        out, errors = process.communicate(timeout=300)
        assert process.returncode == status, out + errors
        for rank, host in enumerate(hosts):
            assert f"[{host}] machine {rank} of 2" in out
            assert f"[{host}] rank {rank} runs" in out


def test_a_machine_that_does_not_see_the_run_is_named(ssh: Path, root: Path, tmp_path: Path, tiny_data: Path) -> None:
    run = run_of(root, tmp_path, tiny_data, hosts=["127.0.0.1", "localhost"])
    shutil.rmtree(run / "code")
    process = terminal(root, ssh, run)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 2, out + errors
    assert f"there is no {run}/code on localhost" in out
