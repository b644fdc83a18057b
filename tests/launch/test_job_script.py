"""What the batch script reads from srun's words. Its own functions in a real bash; scontrol is a mock of one answer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ENDED = "srun: error: node1: task 0: Exited with exit code 75\n"
EARLIER = "srun: error: node7: task 3: Exited with exit code 1\n"
SAID = {
    "": "",
    ENDED: "",
    "srun: error: node2: tasks 8-15: Exited with exit code 127\n" + ENDED: "node2",
    ENDED + "srun: error: gpu-a01: task 9: Exited with exit code 1\n": "gpu-a01",
    "srun: error: node2: task 1: Terminated\nsrun: error: node3: task 2: Exited with exit code 2\n": "node3",
    "srun: error: task 17 launch failed: Slurmd could not connect IO\nsrun: error: node1: task 0: Exited with exit code 1\n": "node3",
    "srun: error: tasks 8-15 launch failed: Unspecified error\n": "node2",
    "srun: error: Task launch for StepId=7.0 failed on node node3: Job credential revoked\n"
    "srun: error: Application launch failed: Job credential revoked\n": "node3",
}


@pytest.mark.parametrize("said", SAID)
def test_the_node_that_failed_first_is_read_from_the_words_of_this_start(said: str, tmp_path: Path, root: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\nnode3\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    log = tmp_path / "7.log"
    log.write_text(EARLIER)
    script = f". {root}/launch/job.sh; cat {tmp_path}/said >&2; failed_on"
    (tmp_path / "said").write_text(said)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-3]"}
    with open(log, "a") as output:
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment | {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "7"},
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == SAID[said]


@pytest.mark.parametrize("link", [True, False])
def test_the_list_of_nodes_without_python_is_appended_to_through_no_link(
    link: bool, tmp_path: Path, root: Path
) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" != "show hostnames gpu1" ] || echo gpu1\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "logs").mkdir()
    nodes, foreign = tmp_path / "logs" / "7.nodes", tmp_path / "foreign"
    foreign.write_text("of somebody else\n")
    if link:
        nodes.symlink_to(foreign)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "gpu1",
    }
    script = f". {root}/launch/job.sh; run={tmp_path} python=(none); elsewhere"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "none does not run on gpu1: the job comes back without this node" in done.stderr
    assert foreign.read_text() == "of somebody else\n"
    assert nodes.read_text() == ("of somebody else\n" if link else "gpu1\n")
