"""Small real runs for tests: video files written with PyAV, configurations, and rank processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multitrain.cluster.slurm import block_stop_signals
from multitrain.config import RunConfig, dump, validate
from tests import forked

ROOT = Path(__file__).resolve().parents[1]

Rank = subprocess.Popen[bytes] | forked.Forked
MODEL = {
    "frames": 4,
    "crop": 64,
    "depth": 3,
    "width": 16,
    "heads": 1,
    "stages": [1],
    "kv_stride": 4,
    "drop_path": 0.2,
    "head_hidden": 24,
    "head_dropout": 0.5,
    "expander_hidden": 32,
}
"""A network of the real structure that runs in milliseconds; dropout and stochastic depth are on."""


def write_video(path: Path, seed: int, frames: int = 12, size: tuple[int, int] = (80, 64)) -> None:
    """An H.264 file of moving coloured noise, `size` = (width, height)."""
    import av

    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 2 * t, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_dataset(folder: Path, videos: int, classes: int, seed: int) -> None:
    """`folder`/{train,val,test}.csv and video files, labels going round."""
    folder.mkdir(parents=True)
    names = []
    for i in range(videos):
        write_video(folder / f"v {i}.mp4", seed * 1000 + i)
        names.append(f"v {i}.mp4 {i % classes}\n")
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_text("".join(names))


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    """Nested settings of a tiny three-dataset run on the files that `tiny_data` wrote; `a__b=c` changes setting a.b."""
    datasets = {
        "stride": {"classes": 5, "sampling": "stride"},
        "segment": {"classes": 3, "sampling": "segment", "flip": False},
        "with.dot": {"classes": 4},
    }
    for name, d in datasets.items():
        d |= {"annotations": str(data / name), "videos": str(data / name)}
    mapping: dict[str, Any] = {
        "name": "tiny",
        "nodes": 1,
        "gpus": 1,
        "updates": 6,
        "effective_batch": 16,
        "micro_batch": 2,
        "precision": "fp32",
        "cluster": {"kind": "local"},
        "data": {"datasets": datasets, "workers": 0, "sampling_rate": 1},
        "model": dict(MODEL),
        "loss": {},
        "optim": {"lr": 1e-3, "warmup_updates": 2},
        "engine": {},
        "augment": {},
        "eval": {},
        "checkpoint": {"every": 100, "keep": 2},
        "monitor": {"tensorboard": False},
    }
    for key, value in changes.items():
        at = mapping
        *path, last = key.split("__")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return mapping


def write_run(runs: Path, mapping: dict[str, Any]) -> tuple[Path, RunConfig]:
    """A run's folder as `launch/submit.py` leaves it, as far as ranks need it."""
    config = validate(mapping)
    run = runs / str(config.name)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(config))
    return run, config


TINY_CLASSES = {"stride": 5, "segment": 3, "with.dot": 4}
"""Classes of the datasets of `tiny_data`."""


def write_random_run(folder: Path) -> Path:
    """``FOLDER/runs/tiny`` on ``FOLDER/data``, with one checkpoint of random weights, as if it had trained an update."""
    import torch

    from multitrain.engine import checkpoint as checkpoints
    from multitrain.model import MultiTrain

    run, config = write_run(folder / "runs", settings(folder / "data") | {"runs": str(folder / "runs")})
    torch.manual_seed(0)
    weights = {k: v.detach() for k, v in MultiTrain(config.model, TINY_CLASSES).state_dict().items()}
    state = {"update": 1, "datasets": TINY_CLASSES, "multi_label": [], "model": config.model.model_dump(mode="json")}
    checkpoints.write(run / "checkpoints", checkpoints.Checkpoint(weights, {}, state), dump(config))
    (run / "events.jsonl").write_text('{"event": "start", "time": "2026-01-01T00:00:00+00:00"}\n')
    (run / "metrics.jsonl").write_text('{"update": 0, "loss": 1.0}\n')
    return run


def write_joint_pyth(path: Path) -> Path:
    """A joint model in the published layout: random weights, small hidden layers, the solver's options of a training run."""
    import torch
    import yaml

    from multitrain.config import ModelConfig
    from multitrain.interop.pyslowfast import write_pyth
    from multitrain.interop.pyslowfast_config import make_cfg
    from multitrain.model import MultiTrain

    config = ModelConfig(
        frames=8, crop=64, depth=4, width=32, stages=(1, 3), kv_stride=8, head_hidden=24, expander_hidden=40
    )
    datasets = {"kinetics": 400, "mit": 305, "ssv2": 174}
    torch.manual_seed(0)
    model = MultiTrain(config, datasets)
    excite(model)
    solver = {"BASE_LR": 2e-4, "MAX_EPOCH": 200, "WEIGHT_DECAY": 0.05}
    cfg = yaml.safe_dump(yaml.safe_load(make_cfg(config, datasets)) | {"SOLVER": solver})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small widths are not the published ones
        write_pyth(path, config, datasets, {n: t.clone() for n, t in model.state_dict().items()}, cfg=cfg)
    return path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    log: Path | None,
    environment: dict[str, str] | None = None,
    anew: bool = False,
) -> list[Rank]:
    """One real process a rank: ``python ARGUMENTS``, output of all appended to `log`, or each to a pipe of its own.

    Unless they are to be started `anew`, they come from a process that has imported what ranks import: see `tests/forked.py`.
    """
    port = str(free_port())
    processes: list[Rank] = []
    for rank in range(world_size):
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        env |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        }
        env |= environment or {}
        command = [sys.executable, "-u", *arguments]
        with contextlib.nullcontext(None) if log is None else open(log, "ab") as out:
            if anew:
                where = subprocess.PIPE if out is None else out
                processes.append(
                    subprocess.Popen(
                        command, env=env, stdout=where, stderr=subprocess.STDOUT, preexec_fn=block_stop_signals
                    )
                )
            else:
                processes.append(forked.start(arguments, env, None if out is None else out.fileno()))
    return processes


def wait(processes: Sequence[Rank], timeout: float = 800) -> list[int]:
    """Exit statuses; kills what is left when one fails or the time is up."""
    try:
        return [p.wait(timeout) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.wait()


def train(run: Path, world_size: int, timeout: float = 800, expect: int = 0, *, anew: bool = False) -> None:
    """Run `python -m multitrain.train RUN` on `world_size` ranks to its end."""
    log = run / "ranks.log"
    codes = wait(start_ranks(["-m", "multitrain.train", str(run)], world_size, log=log, anew=anew), timeout)
    assert codes == [expect] * world_size, f"exit statuses {codes}\n{log.read_text()[-6000:]}"


def pack(data: Path, folder: Path, names: Sequence[str] = ("stride", "segment", "with.dot")) -> Path:
    """Pack the datasets of `data` as ``FOLDER/NAME``, four videos a shard; returns `folder`."""
    from multitrain.cli import main

    for name in names:
        words = ("--annotations", str(data / name), "--shard-videos", "4", "--workers", "1")
        assert main(["data", "pack", str(data / name), str(folder / name), *words]) == 0
    return folder


def excite(model: Any) -> None:
    """Scale the expander of a fresh model up, so that its embeddings spread and the informative loss has something to see."""
    import torch

    with torch.no_grad():
        for layer in (model.expander.fc1, model.expander.fc2):
            layer.weight.mul_(30.0)


def browse(page: Path, folder: Path, query: str = "") -> str:
    """What headless Chromium makes of a page, scripts run; the test is skipped where there is none.

    Args:
        page: an HTML file.
        folder: for the browser's profile.
        query: ``?name=value`` after the page's address.
    """
    import pytest

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((p for p in map(shutil.which, names) if p), None)
    if program is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} is installed")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1280,2000", "--virtual-time-budget=10000", "--dump-dom", page.as_uri() + query]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
