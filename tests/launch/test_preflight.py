"""Preflight finds what would spoil a run, and names the node. GPUs are mocked by an `nvidia-smi` of our own; the rest is real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import assess, channel, node
from multitrain.cluster.exit_status import Exit
from multitrain.cluster.slurm import block_stop_signals, free_port


def row(rank: int, where: str, **changes: Any) -> dict[str, Any]:
    """The row of a rank on a healthy node of two GPUs."""
    healthy = {"rank": rank, "node": where, "gpu": f"{rank % 2} (abc{rank})", "gpus": 2, "missing": [], "model": "H100"}
    healthy |= {"driver": "550", "used_GB": 0.0, "cpus": 8, "cores": 64, "affinity": f"{rank}", "shm_free_GB": 64.0}
    healthy |= {"versions": {"torch": "2.6", "python": "3.11"}, "read_MB_s": 900, "write_MB_s": 500, "rename_ms": 2.0}
    return healthy | {"skew_ms": 0.1, "problems": []} | changes


def cluster(**changes: Any) -> list[dict[str, Any]]:
    """Four nodes of two ranks; the changes are to both ranks of the third node."""
    rows = [row(r, f"node{r // 2 + 1}") for r in range(8)]
    return [r | changes if r["node"] == "node3" else r for r in rows]


def test_nothing_is_said_of_a_healthy_cluster() -> None:
    assert assess.find_problems(cluster(), gpus=2, cpus=8) == []
    assert assess.nodes_to_exclude([], cluster()) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"missing": ["1"], "gpus": 1}, "does not show GPU 1 that SLURM granted"),
        ({"gpu": "none", "gpus": 0}, "see no GPU while others do"),
        ({"shm_free_GB": 0.06}, "/dev/shm of node3 has 0.06 GB free"),
        ({"skew_ms": -45_000.0}, "the clock of node3 is -45.0 s"),
        ({"versions": {"torch": "2.5", "python": "3.11"}}, "another version of torch: 2.5 instead of 2.6"),
        ({"versions": {"python": "3.11"}}, "another version of torch: none instead of 2.6"),
        ({"model": "A100"}, "another GPU model: A100 instead of H100"),
        ({"problems": ["cannot write to /runs (Read-only file system)"]}, "cannot write to /runs"),
    ],
)
def test_the_bad_node_is_named_and_its_exclusion_advised(changes: dict[str, Any], said: str) -> None:
    findings = assess.find_problems(cluster(**changes), gpus=2, cpus=8)
    assert any(said in f.text for f in findings), findings
    assert {f.node for f in findings} == {"node3"}
    assert assess.nodes_to_exclude(findings, cluster(**changes)) == "node3"


def test_of_two_nodes_that_differ_none_is_to_blame_but_one_without_gpu_is() -> None:
    rows = [row(0, "node1", model="A100"), row(1, "node2")]
    findings = assess.find_problems(rows, gpus=1)
    assert [f.node for f in findings if "another GPU model" in f.text] == [None]
    assert assess.nodes_to_exclude(findings, rows) is None
    rows[0] |= {"missing": ["0"], "gpus": 0, "model": None, "driver": None}
    findings = assess.find_problems(rows, gpus=1)
    assert assess.nodes_to_exclude(findings, rows) == "node1", findings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"skew_ms": 2500.0}, "+2.5 s"),
        ({"shm_free_GB": 0.5}, "0.5 GB free"),
        ({"read_MB_s": 20}, "reads videos at 20 MB/s, others at 900 MB/s"),
        ({"write_MB_s": 5}, "writes at 5 MB/s"),
        ({"link_GB_s": 0.01}, ""),
        ({"cpus": 4}, "may use 4 of 8 cores"),
        ({"cpus": 1, "affinity": "0"}, "cores"),
        ({"used_GB": 30.0}, "other processes use 30.0 GB of GPU"),
    ],
)
def test_what_only_slows_a_run_is_a_warning(changes: dict[str, Any], said: str) -> None:
    rows = [r | {"link_GB_s": 10.0} | (changes if r["node"] == "node3" else {}) for r in cluster()]
    findings = assess.find_problems(rows, gpus=2, cpus=8)
    assert findings
    assert all(said in f.text and f.node == "node3" and not f.fatal for f in findings), findings
    assert assess.nodes_to_exclude(findings, rows) is None


def test_two_ranks_on_one_gpu_are_found() -> None:
    rows = cluster()
    rows[3]["gpu"] = rows[2]["gpu"]
    assert [f.text for f in assess.find_problems(rows)] == [
        "ranks 2 and 3 share GPU 0 (abc2) of node2; use one task per GPU"
    ]


def test_silent_ranks_are_named_with_their_node() -> None:
    rows = [r for r in cluster() if r["node"] != "node3"]
    (finding,) = assess.missing_ranks(8, rows, {4: "node3", 5: "node3"}, 10)
    assert finding.text.startswith("ranks 4-5 on node3 did not answer within 10 s")
    assert assess.nodes_to_exclude([finding], rows) == "node3"


def test_no_advice_to_leave_out_every_node() -> None:
    rows = [row(0, "node1", problems=["x"])]
    assert assess.nodes_to_exclude(assess.find_problems(rows), rows) is None


# ------------------------------------------------------------------------------------------------- real processes


def start(
    rank: int, world: int, port: int, *options: str, blocked: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """One rank; `blocked`: with the stop signals held back, as a batch script starts it."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.preflight", *options],
        env={**inherited, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=block_stop_signals if blocked else None,
    )


def run(world: int, *options: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of rank 0; the others must agree that all went its course."""
    port = free_port()
    ranks = [start(r, world, port, *options, **environment) for r in range(world)]
    (out, errors), *_ = [process.communicate(timeout=120) for process in ranks]
    return ranks[0].returncode, out, errors


def test_a_table_with_a_row_a_rank(tmp_path: Path) -> None:
    code, out, errors = run(3, "--dir", str(tmp_path), CUDA_VISIBLE_DEVICES="4,5,6")
    assert code == 0, errors
    head, *rows = out.splitlines()
    assert head.split()[:5] == ["rank", "node", "gpu", "cpus", "affinity"]
    assert [r.split()[0] for r in rows] == ["0", "1", "2"]
    assert [r.split()[2] for r in rows] == ["4", "5", "6"]
    assert f"preflight: {tmp_path}: " in errors, "inodes and quota"
    assert list(tmp_path.iterdir()) == []


def test_json_speeds_and_the_collective(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(os.urandom(3 << 20))
    code, out, errors = run(2, "--dir", str(tmp_path), "--videos", str(tmp_path), "--json", "--collective")
    assert code == 0, errors
    said = json.loads(out)
    assert said["ok"]
    first, second = said["rows"]
    assert first["write_MB_s"] > 0
    assert second["write_MB_s"] is None, "one write a node is enough"
    assert all(r["read_MB_s"] > 0 and r["allreduce_GB_s"] > 0 and abs(r["skew_ms"]) < 1000 for r in said["rows"])
    assert first["versions"]["torch"]


def test_no_torch_without_the_collective() -> None:
    program = "import sys, launch.preflight; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start(r, 3, port, "--dir", str(tmp_path), "--patience", "10") for r in (0, 1)]
    out, errors = ranks[0].communicate(timeout=300)
    ranks[1].communicate(timeout=300)
    assert ranks[0].returncode == 1
    assert "rank 2 did not answer within 10 s" in errors
    assert len(out.splitlines()) == 3


def test_a_rank_that_freezes_is_named_and_does_not_hold_the_others(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start(r, 3, port, "--dir", str(tmp_path), "--patience", "10", MULTITRAIN_SECRET="ab" * 32) for r in (0, 1)]
    key = channel.derived(b"\xab" * 32, "preflight", "", "0", "")
    hello = {"rank": 2, "node": "node9"}  # and not a word after that
    mute = channel.connect(key, "127.0.0.1", port, time.monotonic() + 600, hello)
    _, errors = ranks[0].communicate(timeout=300)
    ranks[1].communicate(timeout=300)
    assert ranks[0].returncode == Exit.BAD_NODE
    assert "rank 2 on node9" in errors
    mute.close()


def test_a_folder_that_cannot_be_written_or_read_is_a_problem_of_that_node(tmp_path: Path) -> None:
    code, _, errors = run(1, "--dir", str(tmp_path / "absent"), "--videos", str(tmp_path / "nothing"))
    assert code == 1
    assert f"cannot write to {tmp_path}/absent (No such file or directory)" in errors
    assert f"cannot read videos in {tmp_path}/nothing" in errors


FAKE = """#!/bin/sh
# A node of four GPUs of which number 2 has fallen off the bus. A mock: there are no GPUs here.
for i in 0 1 3; do echo "$i, GPU-0000000$i-aaaa, H100, , 0"; done
"""


def test_a_gpu_that_is_granted_but_gone_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    code, out, errors = run(4, "--dir", str(tmp_path), CUDA_VISIBLE_DEVICES="0,1,2,3", PATH=path)
    assert code == 1
    assert f"{node.name({})} does not show GPU 2 that SLURM granted; it shows 3" in errors
    assert [r.split()[2:4] for r in out.splitlines()[1:]] == [
        ["0", "(00000000)"], ["1", "(00000001)"], ["2", "(missing)"], ["3", "(00000003)"]
    ]  # fmt: skip
    code, _, errors = run(2, "--dir", str(tmp_path), CUDA_VISIBLE_DEVICES="0,1", PATH=path)
    assert code == 0, errors


def test_a_run_says_what_it_needs(tmp_path: Path) -> None:
    from support import settings, write_run

    (tmp_path / "videos").mkdir()
    folder, _ = write_run(tmp_path, settings(tmp_path / "videos", gpus=2, cluster__cpus_per_gpu=1))
    code, _, errors = run(2, "--dir", str(folder))
    assert code == 1
    assert f"cannot read videos in {tmp_path}/videos/segment" in errors


def test_outside_a_job_one_process_a_gpu(tmp_path: Path) -> None:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "0,1"}
    command = [sys.executable, "-m", "multitrain", "preflight", "--dir", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["rank", "0", "1"]


def test_a_bad_node_is_in_the_runs_events_and_the_exit_status_says_so(tmp_path: Path) -> None:
    """The batch script leaves it out and comes back; where every node is bad, that would not help."""
    from support import settings, write_run

    folder, _ = write_run(tmp_path, settings(tmp_path, gpus=2))
    (tmp_path / "file").write_text("")
    for name in ("stride", "segment", "with.dot"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "v.mp4").write_bytes(os.urandom(100))
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$SLURMD_NODENAME" = bad ] || echo "0, GPU-1, H100, , 0"\n')
    fake.chmod(0o755)
    names = {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    for bad, status, nodes in (("bad", Exit.BAD_NODE, ["bad"]), ("good", Exit.FINISHED, None)):
        (folder / "events.jsonl").unlink(missing_ok=True)
        port = free_port()
        options = ("--dir", str(folder), "--collective", "never")
        ranks = [start(r, 2, port, *options, SLURMD_NODENAME=where, **names) for r, where in ((0, "fine"), (1, bad))]
        _, errors = ranks[0].communicate(timeout=300)
        ranks[1].communicate(timeout=300)
        assert ranks[0].returncode == status, errors
        file = folder / "events.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        assert [e["nodes"] for e in events if e["event"] == "preflight"] == ([] if nodes is None else [nodes])
        assert all(isinstance(reason, str) and "bad" in reason for e in events for reason in e["reasons"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_ends_it_at_once_on_every_rank_whatever_it_does(tmp_path: Path, number: signal.Signals) -> None:
    """Before it can react, while rank 0 waits for a rank, while that waits for rank 0, and from outside a job."""
    port, secret = free_port(), "ab" * 32
    places = [(0, 3, port), (1, 3, port), (1, 2, free_port()), (0, 2, free_port())]
    ranks = [start(*place, "--dir", str(tmp_path), blocked=True, MULTITRAIN_SECRET=secret) for place in places[:3]]
    time.sleep(4.0)
    ranks.append(start(*places[3], "--dir", str(tmp_path), blocked=True, MULTITRAIN_SECRET=secret))
    for rank in ranks:
        rank.send_signal(number)
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == Exit.INTERRUPTED, errors
        assert f"stopped by {number.name}" in errors
    assert not list(tmp_path.glob(".preflight*"))
