"""`dry_run=true` prints exactly what would be submitted, anywhere, and leaves no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit")

GOLDEN = Path(__file__).with_name("golden")

SHAPES = {
    "two_nodes": ["nodes=2", "gpus=8"],
    "container": [
        "nodes=4",
        "gpus=4",
        "cluster.python=apptainer exec --nv image.sif python",
        "cluster.partition=gpu",
        "cluster.account=lab",
        "cluster.gpu_type=a100",
        "cluster.memory_per_node=480G",
        "cluster.time_limit=720",
        "cluster.lead_time=300",
        "preflight=true",
    ],
    "apptainer": ["nodes=2", "gpus=8", "cluster=apptainer", "cluster.partition=gpu"],
    "pyxis": ["nodes=2", "gpus=8", "cluster=pyxis", "cluster.partition=gpu"],
    "cpu_partition": [
        "nodes=1",
        "gpus=2",
        "cluster.gpu_request=none",
        "cluster.cpus_per_gpu=4",
        "cluster.qos=low",
        "cluster.exclude=bad1",
        "cluster.constraint=avx512",
        "cluster.setup=[module load ffmpeg]",
        "cluster.srun_args=['--container-image=a b']",
        "cluster.sbatch={mail-user: me@lab.org, exclusive: ''}",
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_script_is_the_recorded_one(shape: str, root: Path, tmp_path: Path) -> None:
    done = submit(root, tmp_path, *SHAPES[shape], "name=golden", f"runs={tmp_path}/runs", "dry_run=true")
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace(str(tmp_path), "/shared").replace(sys.executable, "/venv/bin/python")
    golden = GOLDEN / f"{shape}.sh"
    if os.environ.get("MULTITRAIN_RECORD"):
        golden.write_text(text)
    assert text == golden.read_text(), "if that was meant: MULTITRAIN_RECORD=1 pytest, and read the difference"


def test_nothing_is_written(root: Path, tmp_path: Path) -> None:
    submit(root, tmp_path, "nodes=2", "gpus=8", "name=x", f"runs={tmp_path}/runs", "dry_run=true")
    assert list(tmp_path.iterdir()) == []


def test_output_in_an_encoding_without_our_characters(root: Path, tmp_path: Path) -> None:
    done = submit(root, tmp_path, "nodes=2", "gpus=8", "dry_run=true", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --nodes=2" in done.stdout


def test_without_slurm_on_the_machine(root: Path, tmp_path: Path) -> None:
    done = submit(root, tmp_path, "nodes=2", "dry_run=true", PATH="/nowhere")
    assert done.returncode == 0
    assert "#SBATCH --nodes=2" in done.stdout


def test_the_script_is_valid_shell(root: Path, tmp_path: Path) -> None:
    done = submit(root, tmp_path, *SHAPES["cpu_partition"], "dry_run=true", f"runs={tmp_path}/folder with blanks")
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def submit(root: Path, cwd: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A dry run without data, which these tests do not need."""
    command = [sys.executable, str(root / "launch" / "submit.py"), "cluster.check_data=false", *words]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
