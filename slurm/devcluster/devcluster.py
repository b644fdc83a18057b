"""A real SLURM on one machine: one controller, several virtual nodes with made-up CPUs, memory and GPUs.

Everything lives in one folder, with its own ports and its own munge socket, so that any number of clusters run side by
side and an installed SLURM is never touched. Python's standard library only; needs root and the packages of
`apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = Path("/tmp/multitrain-devcluster")
FIRST_PORT, LAST_PORT = 10000, 19999  # below the ephemeral ports and below the rendezvous ports of the ranks
READY_SECONDS = 60

SLURM_CONF = """\
ClusterName=devcluster
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true

StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log

# No cgroups, no accounting; sizes are made up, whatever the machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2

# Decisions in seconds.
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmctldTimeout=30
SlurmdTimeout=30

# Preemption: a job in `high` evicts one in `low`, which has 15 s of grace and then KillWait until SIGKILL.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10

{gres_types}NodeName={names} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=64 RealMemory=64000{gres} State=UNKNOWN
PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime=15 MaxTime=INFINITE State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class ClusterError(RuntimeError):
    """One line: what is missing or wrong, and what to do."""


def start(arguments: list[str] | None = None) -> int:
    """`start [--nodes N] [--gpus G] [--dir DIR]`: on stdout only the line to eval."""
    parser = argparse.ArgumentParser(
        prog="start", description="Start a real SLURM on this machine; eval what it prints."
    )
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="virtual nodes (default 4)")
    parser.add_argument("--gpus", type=int, default=8, metavar="G", help="made-up GPUs a node (default 8; 0 for none)")
    parser.add_argument(
        "--dir", type=Path, default=FOLDER, metavar="DIR", help=f"the cluster's folder (default {FOLDER})"
    )
    options = parser.parse_args(arguments)
    folder = options.dir.absolute()
    try:
        _check(folder, options.nodes, options.gpus)
        with _stopped_on_failure(folder):
            _say(f"starting {options.nodes} nodes of {options.gpus} GPUs in {folder} …")
            _start(folder, options.nodes, options.gpus)
    except ClusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    _say(f"ready; stop it with: {Path(__file__).with_name('stop')} --dir {folder}")
    print(f"export SLURM_CONF={folder}/slurm.conf")
    return 0


def stop(arguments: list[str] | None = None) -> int:
    """`stop [--dir DIR]`: ends every process of the cluster in DIR, its jobs included. The logs stay."""
    parser = argparse.ArgumentParser(prog="stop", description="Stop the SLURM that `start` started, jobs included.")
    parser.add_argument(
        "--dir", type=Path, default=FOLDER, metavar="DIR", help=f"the cluster's folder (default {FOLDER})"
    )
    folder = parser.parse_args(arguments).dir.absolute()
    if not (folder / "slurm.conf").is_file():
        print(f"devcluster: no cluster in {folder}; give the folder it was started with: --dir DIR", file=sys.stderr)
        return 1
    left = kill(folder)
    if left:
        print(
            f"devcluster: processes {', '.join(map(str, left))} of {folder} do not end; kill -9 them", file=sys.stderr
        )
        return 1
    _say(f"stopped the cluster in {folder}")
    return 0


def missing() -> str | None:
    """Why no cluster can run on this machine, in one line; None when one can."""
    if os.geteuid() != 0:
        return "needs root, since slurmd starts tasks for other users; run it with sudo"
    for program in ("slurmctld", "slurmd", "munged", "sinfo"):
        if shutil.which(program, path=_PATH) is None:
            return f"{program} is not installed; apt-get install slurm-wlm munge"
    return None


def _check(folder: Path, nodes: int, gpus: int) -> None:
    reason = missing()
    if reason:
        raise ClusterError(reason)
    if not 1 <= nodes <= 512 or not 0 <= gpus <= 64:
        raise ClusterError(f"--nodes {nodes} --gpus {gpus}: take 1 to 512 nodes of 0 to 64 GPUs")
    if any(c.isspace() or c in "#=," for c in str(folder)) or len(str(folder)) > 70:
        raise ClusterError(
            f"--dir {folder}: SLURM takes no blanks, '#', '=' or ',' and at most 70 characters here; choose another folder"
        )
    if processes(folder):
        raise ClusterError(f"a cluster is running in {folder}; stop it first, or give another folder: --dir DIR")
    if folder.exists() and any(folder.iterdir()) and not (folder / "slurm.conf").is_file():
        raise ClusterError(f"--dir {folder} holds other files; give an empty or new folder")


def _start(folder: Path, nodes: int, gpus: int) -> None:
    _clear(folder)
    _start_munge(folder / "munge")
    names = [f"node{i}" for i in range(1, nodes + 1)]
    for attempt in range(3):
        _write_configuration(folder, nodes, gpus, _free_ports(nodes + 1))
        _run(["slurmctld", "-c", "-f", str(folder / "slurm.conf")], folder)
        for name in names:
            _run(["slurmd", "-f", str(folder / "slurm.conf"), "-N", name], folder)
        if _ready(folder, nodes):
            return
        _say(f"not ready; once more with other ports (attempt {attempt + 2})")
        kill(folder, keep_munge=True)
    raise ClusterError(
        f"the nodes did not become idle within {READY_SECONDS} s; read {folder}/slurmctld.log and slurmd.node1.log"
    )


def _clear(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / "state").mkdir()
        (folder / "munge").mkdir(mode=0o755)
    except OSError as error:
        raise ClusterError(f"cannot write to {folder} ({error.strerror}); choose another folder: --dir DIR") from error


def _start_munge(folder: Path) -> None:
    """A munged of our own, beside any that the machine runs: own key, own socket."""
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    # --force: the folder may lie below one that others may write to, like /tmp.
    said = _run(
        ["munged", "--force", *(f"--{option}={folder / name}" for option, name in files.items())], folder.parent
    )
    if not _wait(lambda: (folder / "socket").exists(), 10):
        raise ClusterError(f"munged does not start: {' '.join(said.split()) or f'read {folder}/log'}")


def _write_configuration(folder: Path, nodes: int, gpus: int, ports: list[int]) -> None:
    names = "node1" if nodes == 1 else f"node[1-{nodes}]"
    text = SLURM_CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        controller_port=ports[0],
        ports=str(ports[1]) if nodes == 1 else "[" + ",".join(map(str, ports[1:])) + "]",
        names=names,
        gres_types="GresTypes=gpu\n" if gpus else "",
        gres=f" Gres=gpu:{gpus}" if gpus else "",
    )
    (folder / "slurm.conf").write_text(text)
    devices = folder / "devices"
    devices.mkdir(exist_ok=True)
    for i in range(gpus):
        _make_device(devices / f"nvidia{i}")
    files = "nvidia0" if gpus == 1 else f"nvidia[0-{gpus - 1}]"
    (folder / "gres.conf").write_text(f"NodeName={names} Name=gpu File={devices}/{files}\n" if gpus else "")


def _make_device(path: Path) -> None:
    """A harmless character device (a second /dev/null): SLURM takes a GPU for real only with a device file."""
    if path.exists():
        return
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError as error:
        raise ClusterError(
            f"mknod {path}: {error.strerror}; GPUs are made of device files, so allow mknod here or take --gpus 0"
        ) from error


def _free_ports(count: int) -> list[int]:
    """Free ports, from a random start, so that clusters started together rarely collide."""
    first = random.randint(FIRST_PORT, LAST_PORT)
    span = LAST_PORT - FIRST_PORT + 1
    free: list[int] = []
    for i in range(span):
        port = FIRST_PORT + (first - FIRST_PORT + i) % span
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            free.append(port)
        if len(free) == count:
            return free
    raise ClusterError(f"fewer than {count} free ports between {FIRST_PORT} and {LAST_PORT}; stop other clusters")


def _ready(folder: Path, nodes: int) -> bool:
    """Whether all nodes become idle in time; False at once when a daemon ended, e.g. over a port."""

    def idle() -> bool:
        listed = _run(["sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T"], folder)
        return [line.split()[1] for line in listed.splitlines()] == ["idle"] * nodes

    def daemons() -> int:
        return sum(name in ("slurmctld", "slurmd") for name in processes(folder).values())

    started = time.monotonic()
    while time.monotonic() - started < READY_SECONDS:
        if idle():
            return True
        if time.monotonic() - started > 5 and daemons() < nodes + 1:
            return False
        time.sleep(0.2)
    return False


def processes(folder: Path) -> dict[int, str]:
    """Process ids and names of the cluster in `folder`: its daemons, job steps, and what those started."""
    table = {}  # process id → parent, name, whether it is a daemon or a step of this cluster
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if state != "Z":
                table[int(entry.name)] = (int(parent), name, _belongs(entry, name, folder))
    ours = {pid for pid, (_, _, belongs) in table.items() if belongs}
    while children := {pid for pid, (parent, _, _) in table.items() if parent in ours} - ours:
        ours |= children
    return {pid: table[pid][1] for pid in ours if pid != os.getpid()}


def _belongs(entry: Path, name: str, folder: Path) -> bool:
    if name == "munged":
        return f"--socket={folder}/munge/socket".encode() in (entry / "cmdline").read_bytes().split(b"\0")
    if name.startswith("slurm"):  # slurmctld, slurmd, slurmstepd, slurmscriptd
        return f"SLURM_CONF={folder}/slurm.conf".encode() in (entry / "environ").read_bytes().split(b"\0")
    return False


def kill(folder: Path, *, keep_munge: bool = False) -> list[int]:
    """End all processes of the cluster; returns those that would not. Repeated, since daemons start new ones until they are gone."""
    deadline = time.monotonic() + 20
    while True:
        left = {pid for pid, name in processes(folder).items() if not (keep_munge and name == "munged")}
        if not left or time.monotonic() > deadline:
            return sorted(left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@contextlib.contextmanager
def _stopped_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        kill(folder)
        raise


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"])


def _run(command: list[str], folder: Path) -> str:
    """The output of a program of SLURM or munge, run for the cluster in `folder` and free of an inherited job's variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
    # To a file, not a pipe: a daemon keeps inherited descriptors open, and the reader of our output would wait forever.
    with open(folder / "start.log", "a+") as log:
        begin = log.tell()
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=30, cwd="/", check=False
        )
        log.seek(begin)
        return log.read()


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit("run slurm/devcluster/start or slurm/devcluster/stop")
