"""What a run's record looks like from outside, whatever interrupted it."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from multitrain.records import events, jsonl, metrics
from multitrain.records.progress import Progress, duration
from multitrain.records.recorder import Recorder


def record(update: int, loss: float | None = None) -> dict[str, object]:
    return {
        "update": update,
        "loss": 10.0 - update if loss is None else loss,
        "loss_classification": 1.0,
        "loss_projection": 2.0,
        "loss_informative": 3.0,
        "loss_per_dataset": {"shapes": 0.5, "a b": 0.25},
        "lr": 0.1 * update,
        "grad_norm": 0.7,
        "loss_scale": 1.0,
        "tickets": f"digest{update}",
        "world_size": 2,
        "seconds": 1.5,
        "data_wait_fraction": 0.25,
        "clips_per_second": 20.0,
        "max_memory_gb": 1.25,
        "skipped": {"shapes": 1},
    }


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(e.step, e.value) for e in board.Scalars(tag)]


def test_a_resumed_run_has_every_update_once_and_in_order_in_metrics_and_tensorboard(tmp_path: Path) -> None:
    with Recorder(tmp_path, total_updates=10) as first:
        first.event("start")
        for u in range(7):
            first.update(record(u, loss=100.0 + u))
        first.validation(4, {"shapes": {"top1": 40.0, "top5": 80.0}})
        first.validation(6, {"shapes": {"top1": 60.0, "top5": 90.0}})
    with Recorder(tmp_path, total_updates=10, start_update=4) as second:
        second.event("resume")
        for u in range(4, 10):
            second.update(record(u, loss=200.0 + u))
        second.validation(6, {"shapes": {"top1": 61.0, "top5": 90.0}})
    written = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["update"] for r in written] == list(range(10))
    expected = [100.0 + u for u in range(4)] + [200.0 + u for u in range(4, 10)]
    assert [r["loss"] for r in written] == expected
    assert points(tmp_path, "train/loss") == [(u + 1, v) for u, v in enumerate(expected)]
    assert points(tmp_path, "val/shapes/top1") == [(4, 40.0), (6, 61.0)]


def test_tensorboard_has_the_documented_names(tmp_path: Path) -> None:
    with Recorder(tmp_path, total_updates=1) as recorder:
        recorder.update(record(0))
        recorder.event("checkpoint", update=1, seconds=0.5)
        recorder.validation(1, {"a b": {"top1": 1.0, "top5": 5.0}})
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    train = ["loss", "loss_classification", "loss_projection", "loss_informative", "loss_shapes", "loss_a b", "lr"]
    assert set(board.Tags()["scalars"]) == {
        *(f"train/{n}" for n in (*train, "grad_norm", "loss_scale")),
        *(f"perf/{n}" for n in ("clips_per_second", "data_wait_fraction", "update_seconds", "max_memory_gb")),
        *("checkpoint/save_seconds", "data/skipped_shapes", "val/a b/top1", "val/a b/top5"),
    }


def test_a_line_cut_off_by_a_crash_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 0, "loss": 1.5}\n{"update": 1, "loss": 1.25}\n{"update": 2, "lo')
    assert [r["update"] for r in metrics.read(path)] == [0, 1]
    book = metrics.Metrics(path, start_update=3)
    book.write({"update": 3, "loss": 1.0})
    book.close()
    assert path.read_bytes().count(b"\n") == 3
    assert [r["update"] for r in metrics.read(path)] == [0, 1, 3]

    history = tmp_path / "events.jsonl"
    for torn in (b'{"event": "checkp', b'{"event": "' + b"x" * 10_000):
        history.write_bytes(b'{"event": "start"}\n' + torn)
        events.Events(history).write("resume")
        assert [json.loads(line)["event"] for line in history.read_text().splitlines()] == ["start", "resume"]


def test_without_file_locks_a_torn_line_is_ended_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "f").write_bytes(b'{"a": 1}\n{"b')
    jsonl.append(tmp_path / "f", {"c": 3})
    assert (tmp_path / "f").read_bytes() == b'{"a": 1}\n{"b\n{"c": 3}\n'


def test_floats_come_back_to_the_bit_and_values_that_json_lacks_are_null(tmp_path: Path) -> None:
    values = [0.1 + 0.2, math.pi * 1e-300, 1 / 3]
    jsonl.append(tmp_path / "f", {"v": values, "nan": float("nan"), "inf": [float("inf")]})
    (text,) = (tmp_path / "f").read_text().splitlines()
    back = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert back == {"v": values, "nan": None, "inf": [None]}


def test_numpy_and_torch_scalars_are_numbers(tmp_path: Path) -> None:
    import numpy as np
    import torch

    jsonl.append(
        tmp_path / "f", {"a": np.float32(0.5), "b": torch.tensor(2.5), "c": np.int64(3), "d": {"e": np.float64(1.5)}}
    )
    assert list(jsonl.read(tmp_path / "f")) == [{"a": 0.5, "b": 2.5, "c": 3, "d": {"e": 1.5}}]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run", total_updates=5, rank=1) as recorder:
        recorder.event("start")
        recorder.update(record(0))
        recorder.validation(1, {"shapes": {"top1": 1.0}})
        recorder.write("hello")
    assert not (tmp_path / "run").exists()


def test_bad_videos_of_updates_done_again_are_not_counted_twice(tmp_path: Path) -> None:
    Recorder(tmp_path, total_updates=9, rank=3).skipped([{"update": 1, "dataset": "x"}, {"update": 5, "dataset": "x"}])
    Recorder(tmp_path, total_updates=9, start_update=5, tensorboard=False).close()
    assert [r["update"] for r in jsonl.read(tmp_path / "skipped.jsonl")] == [1]


def test_events_say_when_where_and_under_which_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    events.Events(tmp_path / "e", host="n1").write("signal", name="SIGUSR2")
    (event,) = events.read(tmp_path / "e")
    assert event.pop("time").endswith("+00:00")
    assert event.pop("pid") == os.getpid()
    assert event == {"event": "signal", "job": "41", "restart": 2, "host": "n1", "name": "SIGUSR2"}


def test_without_a_scheduler_restarts_are_counted_from_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for expected in range(3):
        events.Events(tmp_path / "e", restart=expected).write("begin")
        book = events.Events(tmp_path / "e")
        assert book.restart == expected
        book.write("resume" if expected else "start")


def test_lines_of_many_processes_never_mix(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from multitrain.records import jsonl
        for i in range(50):
            jsonl.append(Path(sys.argv[1]), {"who": sys.argv[2], "i": i, "pad": "x" * 3000})
        """
    )
    many = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "f"), str(n)]) for n in range(3)]
    assert [p.wait() for p in many] == [0, 0, 0]
    raw = (tmp_path / "f").read_bytes().splitlines()
    assert len(raw) == len(list(jsonl.read(tmp_path / "f"))) == 150


def test_a_killed_process_leaves_every_line_it_wrote(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, signal, sys
        from multitrain.records.recorder import Recorder
        recorder = Recorder(sys.argv[1], total_updates=9, tensorboard=False)
        for update in range(5):
            recorder.update({"update": update, "loss": 1.0})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL).returncode
        == -signal.SIGKILL
    )
    assert [r["update"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_the_recorder_needs_no_torch() -> None:
    code = "import sys, multitrain.records.recorder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_one_plain_line_an_update_with_the_time_to_go() -> None:
    stream, now = io.StringIO(), iter(range(0, 1000, 2))
    progress = Progress(100, 90, log_every=2, stream=stream, clock=lambda: float(next(now)))
    for update in range(90, 100):
        progress.update(record(update, loss=1.5))
    written = stream.getvalue()
    assert [line.split("update ")[1].split("/")[0].strip() for line in written.splitlines()] == [
        "92",
        "94",
        "96",
        "98",
        "100",
    ]
    assert "loss 1.5000" in written
    assert "ETA 16 s" in written.splitlines()[0]  # 8 updates of 2 s
    assert "\r" not in written
    assert "\x1b" not in written


def test_a_terminal_has_a_bar() -> None:
    stream = Terminal()
    progress = Progress(10, 4, stream=stream)
    progress.update(record(4))
    progress.close()
    assert "\r" in stream.getvalue()
    assert "5/10" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (25920, "7 h 12 min"),
        (183600, "2 d 03 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_checkpoint_events_put_metrics_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(file: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with Recorder(tmp_path, total_updates=3, tensorboard=False) as recorder:
        recorder.update(record(0))
        recorder.event("checkpoint", update=1, seconds=0.1)
        assert synced == ["metrics.jsonl", "events.jsonl"]


def png(side: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (side, side), (255, 0, 0)).save(out, "PNG")
    return out.getvalue()


def test_pictures_and_settings_are_in_tensorboard_and_a_failure_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"optim.lr": 1e-3, "name": "x", "data.datasets.a.crop": [0.1, 1.0], "init_from": None}
    with Recorder(tmp_path, total_updates=2, settings=settings, measures=["val/a/top1"]) as recorder:
        recorder.pictures(1, lambda: {"val/a/confusion": png(16)})
        recorder._drawing.join()  # type: ignore[union-attr]
        recorder.pictures(2, lambda: {"val/a/confusion": png(32)})
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [(i.step, i.width) for i in board.Images("val/a/confusion")] == [(1, 16), (2, 32)]
    session = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"optim.lr" in session

    with Recorder(tmp_path / "b", total_updates=2) as recorder:
        recorder.pictures(1, lambda: 1 / 0)  # type: ignore[return-value,arg-type]
        recorder._drawing.join()  # type: ignore[union-attr]
        recorder.pictures(2, lambda: pytest.fail("drawn again"))
        recorder.update(record(0))
    assert capsys.readouterr().err.count("no pictures for TensorBoard from here on: division by zero") == 1
    assert len(metrics.read(tmp_path / "b/metrics.jsonl")) == 1


def test_a_run_that_must_leave_does_not_wait_for_pictures(tmp_path: Path) -> None:
    import threading

    released = threading.Event()
    with Recorder(tmp_path, total_updates=2) as recorder:
        recorder.pictures(1, lambda: {"never": b""} if released.wait(20) else {})
        recorder.event("signal", request="stop")
        recorder.close()
        assert recorder._drawing.is_alive()  # type: ignore[union-attr]
        released.set()


class Service:
    """A stand-in for Weights & Biases: there is no account to talk to here."""

    def __init__(self, fail_at: str = "") -> None:
        self.calls: list[tuple[str, object]] = []
        self._fail_at = fail_at

    def __getattr__(self, name: str) -> object:
        def call(*args: object, **kwargs: object) -> Service:
            if name == self._fail_at:
                raise ConnectionError("no\nnetwork")
            self.calls.append((name, args or kwargs))
            return self

        return call


@pytest.mark.parametrize("fail_at", ["", "init", "log", "finish"])
def test_weights_and_biases_gets_the_same_numbers_and_never_disturbs_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fail_at: str
) -> None:
    service = Service(fail_at)
    monkeypatch.setitem(sys.modules, "wandb", service)  # type: ignore[arg-type]
    with Recorder(tmp_path / "first", total_updates=2, tensorboard=False, wandb="lab", settings={"a": 1}) as recorder:
        recorder.update(record(0))
        recorder.validation(1, {"shapes": {"top1": 40.0, "videos": 3}})
    assert len(metrics.read(tmp_path / "first/metrics.jsonl")) == 1
    said = capsys.readouterr().err
    assert said.count("gets no more data from this start (ConnectionError: no network)") == (fail_at != "")
    if not fail_at:
        names = [name for name, _ in service.calls]
        assert names == ["init", "define_metric", "log", "log", "finish"]
        assert service.calls[0][1]["id"] == "first"  # type: ignore[index]
        assert service.calls[2][1][0]["train/loss"] == 10.0  # type: ignore[index]
        assert service.calls[3][1][0] == {"val/shapes/top1": 40.0, "update": 1}  # type: ignore[index]


def test_without_the_library_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Recorder(tmp_path, total_updates=2, tensorboard=False, wandb="lab"):
        pass
    assert "pip install 'multitrain[wandb]'" in capsys.readouterr().err
