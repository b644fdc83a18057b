"""What the batch script reads from srun's words. Its own functions in a real bash; scontrol is a mock of one answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from multitrain.cluster.slurm import command_environment
from multitrain.config import compose

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
    script = f". {root}/launch/job.sh; run={tmp_path} python=(none); requeue_without_this_node"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "none does not run on gpu1: the job is requeued without this node" in done.stderr
    assert foreign.read_text() == "of somebody else\n"
    assert nodes.read_text() == ("of somebody else\n" if link else "gpu1\n")


ELEMENT = {"SLURM_JOB_ID": "67", "SLURM_ARRAY_JOB_ID": "67", "SLURM_ARRAY_TASK_ID": "2", "SLURMD_NODENAME": "gpu1"}


def test_the_last_element_of_an_array_asks_of_itself_and_not_of_the_whole_array(tmp_path: Path, root: Path) -> None:
    """SLURM gives it the array's own id as its job's."""
    asked = tmp_path / "asked"
    for command in ("scontrol", "scancel"):
        (tmp_path / command).write_text(f'#!/bin/sh\necho "{command} $*" >>{asked}\n')
        (tmp_path / command).chmod(0o755)
    (tmp_path / "logs").mkdir()
    withdraws = tmp_path / "withdraws"
    withdraws.write_text("#!/bin/sh\nexit 70\n")
    withdraws.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ELEMENT
    calls = (
        f"run={tmp_path} python=(none); job_record; requeue_without_this_node; requeue_job node1; "
        f"python=({withdraws}); requeue_if_due 75"
    )
    subprocess.run(["bash", "-c", f". {root}/launch/job.sh; {calls}"], env=environment, check=True)
    told = asked.read_text().splitlines()
    assert {line.split()[0] for line in told} == {"scontrol", "scancel"}
    assert [line for line in told if "67" in line and "67_2" not in line] == []
    assert any("requeue 67_2" in line for line in told)


@pytest.mark.parametrize("lines", [["cluster=slurm"], ["cluster=slurm", "preflight=true"]])
@pytest.mark.parametrize("safe_path", [True, False])
def test_no_python_of_a_job_looks_for_modules_in_the_submit_directory(
    lines: list[str], safe_path: bool, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the checkout, and may be edited by then. Without a safe path, as Python 3.10; srun is a mock that runs its command."""
    run, checkout = tmp_path / "run", tmp_path / "checkout"
    for folder in (run / "code" / "launch", run / "logs", checkout / "launch", tmp_path / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(root / "launch" / "job.sh", run / "code" / "launch")
    commands = {
        "srun": 'while [ "${1#-}" != "$1" ]; do [ "$1" != --output ] || shift; shift; done; exec "$@"',
        "scontrol": "exit 1",
        "python": f'{"" if safe_path else "unset PYTHONSAFEPATH; "}exec {sys.executable} "$@"',
    }
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (checkout / "launch" / "__init__.py").write_text("raise SystemExit('the checkout was imported')\n")
    for module in ("__init__", "preflight", "requeue", "rank"):
        (run / "code" / "launch" / f"{module}.py").write_text(f"print('the run\\'s {module}')\n")
    (checkout / "image").touch()
    monkeypatch.chdir(checkout)
    config = compose(["experiment=k400", "cluster.setup=[ls image]", f"cluster.python={tmp_path}/bin/python", *lines])
    script = slurm.write_script(run, config).read_text()
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    names = ["preflight"] * (len(lines) - 1) + ["rank", "requeue"]
    assert done.stdout.splitlines() == ["image", *(f"the run's {n}" for name in names for n in ("__init__", name))], (
        done
    )


def test_relative_paths_in_the_python_command_are_those_of_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "venv").mkdir()
    for name in ("venv/python", "image.sif", "exec"):
        (tmp_path / name).touch()
    given = "apptainer exec --nv image.sif venv/python -X dev /usr/bin/python $HOME/python missing.sif"
    text = slurm._absolute(given)
    assert text.split()[3:] == [f"{tmp_path}/image.sif", f"{tmp_path}/venv/python", *given.split()[5:]]
    assert slurm._absolute("venv/python -u") == f"{tmp_path}/venv/python -u"
    assert slurm._absolute("python") == "python"


def test_a_shells_own_options_for_slurms_commands_are_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    for name in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SCONTROL_ALL", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    environment = command_environment()
    assert [k for k in environment if k.startswith(("SQUEUE", "SCONTROL", "SLURM_CL"))] == []
    assert (environment["SLURM_TIME_FORMAT"], environment["SLURM_CONF"]) == ("standard", "/etc/slurm.conf")
    script = f". {root}/launch/job.sh; env"
    said = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"SLURM_JOB_ID": "7"}, capture_output=True, text=True
    )
    assert not [line for line in said.stdout.splitlines() if line.startswith(("SQUEUE", "SCONTROL", "SLURM_CL"))]


def test_a_hangup_does_not_end_the_batch_script(tmp_path: Path, root: Path) -> None:
    """`scancel --signal=HUP --full` ends the ranks; the script has to ask for the job's return."""
    script = f'. {root}/launch/job.sh; run={tmp_path}; kill -HUP $$; echo "still here:$signals"'
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ | {"SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # under nohup it is ignored, and no shell can trap it
    )
    assert done.stdout == "still here: HUP\n"
    assert not (tmp_path / "SAVE").exists()
