"""Launching on a real controller: placement, preemption, time limits, cancelling, and 128 ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder, slurm
from launch.submit import main
from tests.slurm.drill import DEVCLUSTER, Cluster

pytestmark = pytest.mark.slurm

RANK = """
    import json, os, signal, sys, time
    from pathlib import Path
    place = {n: os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    place |= {n: os.environ.get(n) for n in ("SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES", "SLURM_CPU_BIND", "SLURM_RESTART_COUNT")}
    out = Path(sys.argv[1])
    rank, restart = int(place["RANK"]), int(place["SLURM_RESTART_COUNT"] or 0)
    held = sorted(signal.Signals(s).name for s in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    def report(**fields):
        line = json.dumps({**place, "cwd": os.getcwd(), "held": held, **fields}) + "\\n"
        with open(out / f"{restart}-{rank}.jsonl", "a") as file:
            file.write(line)
"""

WAITS = """
    from multitrain.cluster import slurm
    signals = []
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, lambda number, _: signals.append(number))
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    slurm.unblock_stop_signals()
    report()
    if restart:
        sys.exit(0)
    while not signals:
        time.sleep(0.05)
    time.sleep(0.3)
    reason = slurm.stop_reason(slurm.show_job(slurm.job_id()), signals) if rank == 0 else None
    reason = None if reason in (slurm.CANCELLED, slurm.OPERATOR) else reason
    report(signals=[signal.Signals(s).name for s in signals], reason=reason)
    if reason:
        slurm.requeue(slurm.job_id())
    elif rank == 0:
        sys.exit(75)
    seen = len(signals)
    while len(signals) == seen:
        time.sleep(0.05)
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ranks write what they saw; also the folder that everything is submitted from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "board").mkdir()
    return tmp_path / "board"


def submit(board: Path, body: str, *overrides: str, arguments: tuple[str, ...] = ()) -> str:
    """Submit a job whose ranks run a few light lines; returns its id."""
    program = board.parent / "rank.py"
    program.write_text(textwrap.dedent(RANK) + textwrap.dedent(body))
    run = run_folder.compose_run(["name=drill", "cluster=devcluster", "experiment=k400", *overrides])
    run_folder.write(run)
    return slurm.submit(run.path, run.config, (str(program), str(board), *arguments))


def reports(board: Path, restart: int = 0) -> list[dict[str, Any]]:
    """All that the ranks of a start reported, by rank."""
    files = sorted(board.glob(f"{restart}-*.jsonl"), key=lambda f: int(f.stem.split("-")[1]))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


def last_reports(cluster: Cluster, job: str, board: Path) -> list[dict[str, Any]]:
    """Of the start that ended the job; slurmd can refuse the one before, where it has not forgotten the job yet."""
    return reports(board, restart=int(cluster.job(job)["Restarts"]))


# ------------------------------------------------------------------------------------------------------ the cluster


def test_clusters_start_beside_each_other_and_stop_without_a_trace(cluster: Cluster, tmp_path: Path) -> None:
    folder = Path("/tmp") / f"mtdc-{os.getpid()}"
    try:
        for _ in range(2):
            done = subprocess.run(
                [DEVCLUSTER / "start", "--nodes", "2", "--gpus", "1", "--dir", folder],
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
            environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
            nodes = subprocess.run(
                ["sinfo", "-h", "-o", "%D %T"], env=environment, capture_output=True, text=True, check=True
            )
            assert nodes.stdout.split("\n")[0] == "2 idle"
            again = subprocess.run([DEVCLUSTER / "start", "--dir", folder], capture_output=True, text=True, check=False)
            assert again.returncode == 1
            assert again.stderr.count("\n") == 1
            command = ["sbatch", "--output=/dev/null", "--gres=gpu:1", "--wrap=srun sleep 987"]
            subprocess.run(command, env=environment, capture_output=True, check=True)
            cluster.until(lambda: "sleep\x00987" in commands(), "the job's process")
            subprocess.run([DEVCLUSTER / "stop", "--dir", folder], capture_output=True, check=True)
            assert str(folder) not in commands()
            assert "sleep\x00987" not in commands()
        assert cluster.run("sinfo", "-h", "-p", "low", "-o", "%D %T").strip() == "16 idle"
    finally:
        subprocess.run([DEVCLUSTER / "stop", "--dir", folder], capture_output=True, check=False)
        subprocess.run(["rm", "-rf", folder], check=True)


def commands() -> str:
    """The command lines of all processes of this machine."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((entry / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


def test_what_cannot_start_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("not a cluster")
    for options in (["--dir", str(tmp_path)], ["--nodes", "0"], ["--dir", "/tmp/with blank"]):
        done = subprocess.run([DEVCLUSTER / "start", *options], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
    assert (tmp_path / "mine").read_text() == "not a cluster"
    done = subprocess.run([DEVCLUSTER / "stop", "--dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1


# ---------------------------------------------------------------------------------------------------------- placing


def test_two_nodes_of_eight_ranks(cluster: Cluster, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "999")  # as if submitted from inside a job
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    (board.parent / "videos").mkdir()
    (board.parent / "videos" / "a.mp4").write_bytes(b"video")
    videos = f"data.datasets.kinetics.videos={board.parent}/videos"
    job = submit(board, "report()", "nodes=2", "gpus=8", "preflight=true", videos)
    monkeypatch.delenv("SLURM_JOB_ID")
    cluster.wait(job, "COMPLETED")
    ranks = reports(board)
    assert [r["RANK"] for r in ranks] == [str(i) for i in range(16)]
    assert [r["SLURMD_NODENAME"] for r in ranks] == ["node1"] * 8 + ["node2"] * 8
    assert [r["LOCAL_RANK"] for r in ranks] == [str(i) for i in range(8)] * 2
    assert [r["CUDA_VISIBLE_DEVICES"].split(",")[int(r["LOCAL_RANK"])] for r in ranks] == [str(i) for i in range(8)] * 2
    assert {(r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["MASTER_ADDR"]) for r in ranks} == {("16", "8", "127.0.0.1")}
    assert len({r["MASTER_PORT"] for r in ranks}) == 1
    assert {tuple(r["held"]) for r in ranks} == {("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")}
    assert "quiet,mask_cpu:0x1" not in {r["SLURM_CPU_BIND"] for r in ranks}
    run = board.parent / "runs" / "drill"
    assert {r["cwd"] for r in ranks} == {str(run / "code")}
    logs = {p.name for p in (run / "logs").glob("*.log")}
    assert logs == {f"{job}.log"} | {f"{job}-rank{i}.log" for i in range(16)}
    lines = (run / "logs" / f"{job}.log").read_text().splitlines()
    table = [line for line in lines if "inodes free" not in line]
    assert [line.split()[:3] for line in table[1:]] == [
        [str(8 * n + i), f"node{n + 1}", str(i)] for n in range(2) for i in range(8)
    ]


def test_one_gpu_bound_to_each_task_has_index_0(cluster: Cluster, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stale in {"RANK": "77", "WORLD_SIZE": "99", "LOCAL_RANK": "7", "MASTER_ADDR": "gone"}.items():
        monkeypatch.setenv(name, stale)  # as in a shell where torchrun was tried
    overrides = ("nodes=1", "gpus=4", "cluster.srun_args=['--gpus-per-task=1','--gpu-bind=single:1']")
    cluster.wait(submit(board, "report()", *overrides), "COMPLETED")
    ranks = reports(board)
    assert sorted(r["CUDA_VISIBLE_DEVICES"] for r in ranks) == ["0", "1", "2", "3"]
    assert [(r["RANK"], r["WORLD_SIZE"], r["LOCAL_RANK"]) for r in ranks] == [(str(i), "4", "0") for i in range(4)]


def test_128_ranks(cluster: Cluster, board: Path) -> None:
    begin = time.monotonic()
    job = submit(board, "report()", "nodes=16", "gpus=8")
    cluster.wait(job, "COMPLETED")
    ranks = reports(board)
    assert [int(r["RANK"]) for r in ranks] == list(range(128))
    assert len({(r["SLURMD_NODENAME"], r["LOCAL_RANK"]) for r in ranks}) == 128
    print(f"128 ranks were placed, ran and ended in {time.monotonic() - begin:.0f} s")


# ------------------------------------------------------------------------------------------------ being taken away


def test_a_preempted_job_is_told_knows_why_and_comes_back(cluster: Cluster, board: Path) -> None:
    job = submit(board, WAITS, "nodes=2", "gpus=2")
    cluster.until(lambda: len(reports(board)) == 4, "the ranks")
    evictor = cluster.evict()
    cluster.until(lambda: len(reports(board)) == 8, "the signals")
    told = [r for r in reports(board) if "signals" in r]
    assert all("SIGTERM" in r["signals"] for r in told)
    assert told[0]["reason"] == "preempted"
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"
    cluster.wait(evictor, "COMPLETED")
    cluster.start_now(job)
    cluster.wait(job, "COMPLETED")
    last = last_reports(cluster, job, board)
    assert len(last) == 4
    assert last[0]["MASTER_PORT"] != reports(board)[0]["MASTER_PORT"]
    log = (board.parent / "runs" / "drill" / "logs" / f"{job}-rank0.log").read_text()
    assert log.count("Starting with JobEnvironment") >= 2, "the second start was appended to the log of the first"


def test_preempted_while_importing_it_comes_back_too(cluster: Cluster, board: Path) -> None:
    job = submit(board, WAITS, "nodes=2", "gpus=1", arguments=("3",))
    cluster.wait(job, "RUNNING")
    evictor = cluster.evict()
    cluster.until(lambda: len(reports(board)) == 4, "the signals, after the import")
    assert all("SIGTERM" in r["signals"] for r in reports(board) if "signals" in r)
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"
    cluster.wait(evictor, "COMPLETED")


def test_ranks_that_end_in_the_grace_period_without_requeueing_come_back(cluster: Cluster, board: Path) -> None:
    ends = "from multitrain.cluster import slurm\nslurm.unblock_stop_signals()\nreport()\ntime.sleep(60)"  # dies of SIGTERM
    job = submit(board, ends, "nodes=1", "gpus=2")
    cluster.until(lambda: len(reports(board)) == 2, "the ranks")
    cluster.evict()
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"


def test_the_warning_of_the_time_limit_reaches_every_rank(cluster: Cluster, board: Path) -> None:
    job = submit(board, WAITS, "nodes=2", "gpus=2", "cluster.time_limit=1", "cluster.lead_time=50")
    cluster.until(lambda: len(reports(board)) == 8, "the signals")
    told = [r for r in reports(board) if "signals" in r]
    assert all(r["signals"][0] == "SIGUSR2" for r in told)
    assert told[0]["reason"] == "time limit"
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"


def test_a_step_that_is_ended_while_its_job_goes_on_brings_the_job_back(cluster: Cluster, board: Path) -> None:
    job = submit(board, WAITS, "nodes=2", "gpus=1")
    cluster.until(lambda: len(reports(board)) == 2, "the ranks")
    cluster.run("scancel", "--signal=TERM", f"{job}.0")
    cluster.until(lambda: len(reports(board)) == 4, "the signals")
    assert next(r["reason"] for r in reports(board) if "signals" in r) == "ended from outside"
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, board: Path) -> None:
    job = submit(board, WAITS, "nodes=2", "gpus=1")
    cluster.until(lambda: len(reports(board)) == 2, "the ranks")
    cluster.run("scancel", job)
    cluster.until(lambda: len(reports(board)) == 4, "the signals")
    assert [r["reason"] for r in reports(board) if "signals" in r] == [None, None]
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"


# --------------------------------------------------------------------------------------------------- the command line

LATER = ["cluster=devcluster", "experiment=k400", "cluster.check_data=false", "cluster.sbatch.begin=now+1hour"]


def test_submitting_returns_at_once_and_says_where_everything_is(cluster: Cluster, board: Path, root: Path) -> None:
    command = [sys.executable, str(root / "launch" / "submit.py"), "name=first", "nodes=2", "gpus=8", *LATER]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begin
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    job = said["job"]
    assert cluster.job(job)["JobName"] == "first"
    assert cluster.job(job)["Requeue"] == "1"
    assert said["run"] == str(board.parent / "runs" / "first")
    assert said["log"] == str(board.parent / "runs" / "first" / "logs" / f"{job}-rank0.log")
    assert said["cancel"] == f"scancel {job}"
    assert said["resume"] == f"python {said['run']}/code/launch/submit.py {said['run']}"
    print(f"submitted in {seconds:.1f} s")


def test_a_run_in_the_queue_is_not_submitted_twice(
    cluster: Cluster, board: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["name=twice", "gpus=8", *LATER]) == 0
    job = capfd.readouterr().out.split()[1]
    for words in (["twice", "nodes=2"], ["name=twice", "cluster=local", "gpus=1"]):
        assert main(words) == 2
        error = capfd.readouterr().err
        assert f"job {job} (pending)" in error
        assert f"scancel {job}" in error
        assert error.count("\n") == 1
    cluster.run("scancel", job)
    cluster.until(lambda: not slurm.active(board.parent / "runs" / "twice", [job]), "the end of the job")
    assert main(["twice", "nodes=2"]) == 0
    second = capfd.readouterr().out.split()[1]
    assert cluster.job(second)["NumNodes"].startswith("2")
    assert run_folder.jobs(board.parent / "runs" / "twice") == [job, second]


def test_what_slurm_refuses_leaves_no_run_behind(
    cluster: Cluster, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["name=x", "gpus=8", *LATER, "cluster.partition=nowhere"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert error.count("\n") == 1
    assert not (board.parent / "runs" / "x").exists()


def test_train_sh_finds_its_run_again_after_a_requeue(
    cluster: Cluster, board: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (board.parent / "rank.py").write_text(textwrap.dedent(RANK) + textwrap.dedent(WAITS))
    python = board.parent / "python"
    python.write_text(  # in place of a training, a rank that waits
        f"#!/bin/sh\nexport PYTHONPATH=$PYTHONPATH:{root}\n"
        f'case "$*" in *multitrain.train*) eval "$({sys.executable} -c "from multitrain.cluster.slurm import '
        "rank_environment as e; print(chr(10).join(f'export {k}={v}' for k, v in e().items()))\")\"; "
        f'exec {sys.executable} {board.parent}/rank.py {board};; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("MULTITRAIN_HOME", str(root))
    monkeypatch.setenv("MULTITRAIN_PYTHON", str(python))
    runs = board.parent / "runs"
    options = [
        "--exclude=node3",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gres=gpu:2",
        "--cpus-per-task=1",
        f"--output={board.parent}/out",
    ]
    overrides = ["cluster.check_data=false", "experiment=k400", f"runs={runs}"]
    job = cluster.run("sbatch", "--parsable", *options, str(root / "slurm" / "train.sh"), *overrides).strip()
    cluster.until(lambda: len(reports(board)) == 4, "the ranks")
    run = runs / f"k400-job{job}"
    assert [p for p in runs.iterdir() if not p.name.startswith(".")] == [run]
    assert cluster.job(job)["JobName"] == run.name
    assert {r["held"][0] for r in reports(board)} == {"SIGINT"}
    assert slurm.active(run, run_folder.jobs(run)) == {job: "RUNNING"}
    (run / "code" / "marker").write_text("a requeued job keeps its code")
    cluster.run("scontrol", "requeue", job)
    script = (run / "job.sh").rename(board.parent / "away")  # as on a node without the runs' file system
    cluster.start_now(job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "2", "the requeue by the script itself")
    cluster.until(lambda: "," in cluster.job(job)["ExcNodeList"], "a node left out beside the user's own")
    cluster.wait(job, "PENDING")  # COMPLETING until its processes are gone
    left_out = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["ExcNodeList"]).split()
    (away,) = {*left_out} - {"node3"}
    assert f"{run}/job.sh cannot be read on {away}" in (board.parent / "out").read_text()
    script.rename(run / "job.sh")
    cluster.start_now(job)
    cluster.wait(job, "COMPLETED")
    last = last_reports(cluster, job, board)
    assert len(last) == 4, (board.parent / "out").read_text()
    assert not {*left_out} & {r["SLURMD_NODENAME"] for r in last}
    assert (run / "code" / "marker").exists()
    assert [p for p in runs.iterdir() if not p.name.startswith(".")] == [run]
    assert {p.name for p in (run / "logs").iterdir()} == {f"{job}-rank{i}.log" for i in range(4)}
