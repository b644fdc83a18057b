"""Batches are a function of the plan and the update: not of workers, ranks, restarts or bad luck."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multitrain.data.clips as clips
import multitrain.data.loader as loader
from multitrain.config import ConfigError, RunConfig
from multitrain.data.call_timeout import CallTimeout, TimeoutRunner
from multitrain.data.catalog import Catalog, open_catalogs, sources
from multitrain.data.clips import EvalViewsFn, Task, TrainClipFn
from multitrain.data.decode import Video, VideoError
from multitrain.data.loader import Batch, EvalLoader, LoaderError, TrainLoader
from multitrain.data.pool import IGNORED, Pool, ProcessPool, Result, open_pool
from multitrain.data.views import load_views
from multitrain.order import BatchShape, Plan, key
from tests import material
from tests.data.numbered import run_config, write_numbered

BATCH = 16
UPDATES = 3


class Setting:
    """Catalogs, plan and configuration of a tiny run."""

    def __init__(self, data: Path, index: Path, **changes: Any) -> None:
        self.config: RunConfig = run_config(data, effective_batch=BATCH, **changes)
        self.catalogs: dict[str, Catalog] = open_catalogs(self.config.data, "train", index)
        listed = sources(self.config.data, self.catalogs)
        self.plan = Plan(listed, seed=self.config.seed, effective_batch=BATCH, group=2)

    def load(
        self, start: int = 0, stop: int = UPDATES, *, rank: int = 0, world: int = 1, micro: int = 4, workers: int = 0
    ) -> TrainLoader:
        config = self.config.model_copy(update={"data": self.config.data.model_copy(update={"workers": workers})})
        shape = BatchShape(BATCH, world, micro, BATCH // world // micro)
        return TrainLoader(self.catalogs, self.plan, shape, rank, config, start, stop)

    def batches(self, *range_: int, **how: int) -> list[Batch]:
        with self.load(*range_, **how) as batches:
            return list(batches)


@pytest.fixture
def setting(videos: Path, tmp_path: Path) -> Setting:
    return Setting(videos, tmp_path / "index")


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("clips", "dataset", "boxes", "keys"))
    return (
        tensors and (a.labels, a.start, a.skipped) == (b.labels, b.start, b.skipped) and (a.tickets == b.tickets).all()
    )


def clip_by_key(batches: list[Batch]) -> dict[int, tuple[bytes, tuple[int, ...], int]]:
    """Pixels and box, labels and dataset of every clip."""
    found = {}
    for b in batches:
        for i, key_ in enumerate(b.keys.tolist()):
            found[key_] = (b.clips[i].numpy().tobytes() + b.boxes[i].numpy().tobytes(), b.labels[i], int(b.dataset[i]))
    return found


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, nearest first."""
    try:
        children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [d for c in children for d in descendants(c)]


def workers_of(batches: TrainLoader) -> list[int]:
    """Process ids of a loader's workers, once they are there."""
    pool = batches._pool
    assert isinstance(pool, ProcessPool)
    return wait_for(lambda: descendants(pool._fork_server.pid))


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def first_batch(batches: TrainLoader, seconds: float = 120.0) -> Batch:
    batch: Batch = wait_for(lambda: batches.next_batch(1.0), seconds)
    return batch


def test_a_batch_is_what_the_plan_says(setting: Setting) -> None:
    batches = setting.batches()
    assert [b.start for b in batches] == list(range(0, UPDATES * BATCH, 4))
    for b in batches:
        tickets = setting.plan.samples(b.start, b.start + 4)
        assert (b.tickets == tickets).all()
        assert b.clips.shape == (8, 4, 32, 32, 3)
        assert b.clips.dtype == torch.uint8
        assert (b.dataset.dtype, b.boxes.dtype, b.keys.dtype) == (torch.int64, torch.int32, torch.int64)
        assert b.boxes.shape == (8, 4)
        assert b.dataset.tolist() == [d for d in tickets["dataset"].tolist() for _ in range(2)]
        names = [setting.plan.sources[d].name for d in tickets["dataset"]]
        labels = [setting.catalogs[n].labels(int(i)) for n, i in zip(names, tickets["index"])]
        assert b.labels == [label for label in labels for _ in range(2)]
        keys = [
            key("clip", 0, n, int(i), int(p), copy)
            for n, i, p in zip(names, tickets["index"], tickets["pass"])
            for copy in (0, 1)
        ]
        assert b.keys.numpy().view(np.uint64).tolist() == keys
        assert b.skipped == []
        assert b.decode_seconds > 0


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 2), (3, 1)])
def test_the_bits_do_not_depend_on_the_number_of_workers(
    setting: Setting, videos: Path, tmp_path: Path, workers: int, prefetch: int
) -> None:
    other = Setting(videos, tmp_path / "index", data__prefetch=prefetch).batches(workers=workers)
    expected = setting.batches(workers=0)
    assert len(other) == len(expected) == UPDATES * 4
    assert all(same(a, b) for a, b in zip(expected, other))


def test_a_restart_goes_on_with_the_same_bits(setting: Setting) -> None:
    whole = setting.batches()
    with setting.load(0, UPDATES, workers=2) as interrupted:
        before = [first_batch(interrupted) for _ in range(6)]  # in the middle of update 1
    after = setting.batches(1, UPDATES, workers=1)
    assert all(same(a, b) for a, b in zip(before, whole))
    assert len(after) == (UPDATES - 1) * 4
    assert all(same(a, b) for a, b in zip(after, whole[4:]))


@pytest.mark.parametrize(("world", "micro"), [(2, 4), (4, 2), (4, 4), (1, 16)])
def test_ranks_together_make_the_same_clips_of_an_update(setting: Setting, world: int, micro: int) -> None:
    alone = clip_by_key(setting.batches(1, 2))
    together: dict[int, Any] = {}
    for rank in range(world):
        together |= clip_by_key(setting.batches(1, 2, rank=rank, world=world, micro=micro))
    assert len(alone) == 2 * BATCH
    assert together == alone


def test_passes_and_copies_differ(setting: Setting) -> None:
    batches = setting.batches(0, 6)
    seen: dict[tuple[int, int], list[bytes]] = {}
    for b in batches:
        for i, ticket in enumerate(b.tickets):
            video = (int(ticket["dataset"]), int(ticket["index"]))
            seen.setdefault(video, []).extend(b.clips[j].numpy().tobytes() for j in (2 * i, 2 * i + 1))
    assert max(len(made) for made in seen.values()) >= 6
    assert all(len(set(made)) == len(made) for made in seen.values())


def test_copies_share_their_frames_and_datasets_that_forbid_it_are_not_mirrored(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[int, list[tuple[int, bool]]] = {}

    kept: list[object] = []

    class Recorded(clips.Augmenter):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.flip_allowed = given[-1]

        def __call__(self, frame: np.ndarray, target: np.ndarray) -> None:
            calls.setdefault(id(self), []).append((hash(frame.tobytes()), self.flip_allowed))
            kept.append(self)  # so that no other one gets its id

    monkeypatch.setattr(clips, "Augmenter", Recorded)
    (batch, *_) = Setting(videos, tmp_path / "index").batches(0, 1, micro=16)
    copies = list(calls.values())
    assert len(copies) == 2 * len(batch.tickets)
    assert copies[::2] == copies[1::2], "both copies of a video are made of the same frames"
    assert {allowed for copy in copies for _, allowed in copy} == {d != 1 for d in batch.dataset.tolist()}


def test_next_batch_returns_in_time_with_nothing_and_loses_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = setting.batches(0, 1)
    original = TrainClipFn.run
    monkeypatch.setattr(TrainClipFn, "run", lambda *a: (time.sleep(0.03), original(*a))[1])
    with setting.load(0, 1) as batches:
        got, nothing = [], 0
        while True:
            began = time.monotonic()
            try:
                batch = batches.next_batch(0.01)
            except StopIteration:
                break
            assert time.monotonic() - began < 30
            nothing += batch is None
            got += [batch] if batch else []
        assert nothing > 3
        assert all(same(a, b) for a, b in zip(got, expected))
        assert len(got) == 4
        with pytest.raises(StopIteration):
            batches.next_batch(0.01)


def test_batches_outlive_the_next_ones(setting: Setting) -> None:
    with setting.load(workers=1) as batches:
        first = first_batch(batches)
        copy = first.clips.clone()
        for _ in range(8):
            first_batch(batches)
        assert torch.equal(first.clips, copy)


# --- unreadable videos ------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(videos: Path, tmp_path: Path) -> Path:
    """The datasets, but for one file of `stride` that is no video and one that is missing."""
    shutil.copytree(videos, tmp_path / "data")
    (tmp_path / "data/stride/class 1/v1.mp4").write_bytes(b"no video")
    (tmp_path / "data/stride/class 4/v4.mp4").unlink()
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_video_gets_a_deterministic_stand_in(damaged: Path, tmp_path: Path, workers: int) -> None:
    setting = Setting(damaged, tmp_path / "index")
    batches = setting.batches(0, 2, workers=workers, micro=2)
    again = [*setting.batches(0, 1, micro=2), *setting.batches(1, 2, micro=2)]
    assert len(again) == len(batches)
    assert all(same(a, b) for a, b in zip(again, batches))
    bad = {"class 1/v1.mp4": "no video format", "class 4/v4.mp4": "No such file"}
    records = [r for b in batches for r in b.skipped]
    assert {r["path"] for r in records} == set(bad)
    for r in records:
        assert set(r) == {"dataset", "path", "reason", "update", "stand_in"}
        assert r["dataset"] == "stride"
        assert bad[r["path"]] in r["reason"]
        assert r["stand_in"] not in bad
        assert (tmp_path / "data/stride" / r["stand_in"]).exists()
    for number, b in enumerate(batches):
        assert all(r["update"] == number // 8 for r in b.skipped)
        for i, ticket in enumerate(b.tickets):  # the key stays the ticket's, the label is the stand-in's
            if ticket["dataset"] == 0 and int(ticket["index"]) in (1, 4):
                (record,) = (r for r in b.skipped if f"/v{int(ticket['index'])}.mp4" in r["path"])
                assert b.labels[2 * i] == (int(record["stand_in"][6]),)
                expected = key("clip", 0, "stride", int(ticket["index"]), int(ticket["pass"]), 0)
                assert b.keys[2 * i].item() == np.uint64(expected).view(np.int64)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_readable_videos_ends_the_run_with_a_reason(
    damaged: Path, tmp_path: Path, workers: int
) -> None:
    for path in (damaged / "stride").glob("*/*.mp4"):
        path.write_bytes(b"no video")
    with (
        Setting(damaged, tmp_path / "index").load(workers=workers) as batches,
        pytest.raises(LoaderError, match=r"fallback videos of dataset 'stride'"),
    ):
        list(batches)


def test_an_error_of_the_operating_system_gets_a_second_try(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = setting.batches(0, 1)
    original, failed = TrainClipFn.read, set()

    def flaky(self: TrainClipFn, path: Path, *rest: Any) -> np.ndarray:
        if path not in failed and len(failed) < 2:
            failed.add(path)
            raise VideoError(path, "Stale file handle", transient=True)
        return original(self, path, *rest)

    monkeypatch.setattr(TrainClipFn, "read", flaky)
    monkeypatch.setattr(clips, "_RETRY_DELAY_SECONDS", 0.0)
    got = setting.batches(0, 1)
    assert len(failed) == 2
    assert all(same(a, b) for a, b in zip(got, expected))


class StallingJob(TrainClipFn):
    """Gets stuck in the first video of the plan, as a decoder in a library would."""

    def read(self, path: Path, *rest: Any) -> np.ndarray:
        if str(path) == self.describe(Task(0, self.plan.samples(0, 1)[0])):
            time.sleep(1000)
        return super().read(path, *rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stalled_decode_is_a_bad_video(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(loader, "TrainClipFn", StallingJob)
    setting = Setting(videos, tmp_path / "index", data__decode_timeout=4.0)
    records = [r for b in setting.batches(0, 1, workers=workers) for r in b.skipped]
    stuck = StallingJob(setting.catalogs, setting.plan, setting.config).describe(Task(0, setting.plan.samples(0, 1)[0]))
    assert [stuck.endswith(r["path"]) for r in records] == [True]
    assert [r["reason"] for r in records] == ["decoding took longer than data.decode_timeout"]


def test_close_is_prompt_while_a_worker_is_stuck(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "TrainClipFn", StallingJob)
    setting = Setting(videos, tmp_path / "index", data__decode_timeout=1000)
    for workers in (2, 0):
        batches = setting.load(workers=workers)
        if workers:
            pids = workers_of(batches)
            os.kill(pids[-1], signal.SIGSTOP)
        assert wait_for(lambda batches=batches: batches.next_batch(2.0) is None)
        began = time.monotonic()
        batches.close()
        assert time.monotonic() - began < 60, "the stuck decode has 1000 s"
        with pytest.raises(LoaderError, match="closed"):
            batches.next_batch(0.1)
    assert not any(alive(pid) for pid in pids)


def test_a_test_video_given_up_never_writes_to_its_place_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_GUARD_MARGIN_SECONDS", 0.2)
    goes_on, ended = threading.Event(), threading.Event()
    original = Video.pictures

    def stuck(self: Video, indices: Any) -> Iterator[tuple[int, np.ndarray]]:
        try:
            for number, found in enumerate(original(self, indices)):
                if number == 1:
                    goes_on.wait(60)
                yield found
        finally:
            ended.set()

    setting = Setting(videos, tmp_path / "index", data__decode_timeout=4.0)
    job = EvalViewsFn(setting.catalogs["stride"], setting.config.data.datasets["stride"], setting.config)
    place = np.full(job.shape, 7, np.float32)
    monkeypatch.setattr(Video, "pictures", stuck)
    assert job.run(0, place) == "decoding took longer than data.decode_timeout"
    assert (place != 7).any(), "the first frame is written before the video gets stuck"
    place[:] = 7
    goes_on.set()
    assert ended.wait(20)
    assert (place == 7).all()


def test_a_call_that_does_not_return_is_left_behind() -> None:
    guard = TimeoutRunner()
    with pytest.raises(CallTimeout):
        guard.run(lambda: time.sleep(5), 0.05)
    assert guard.run(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        guard.run(lambda: 1 // 0, 5.0)


def test_the_thread_of_a_guard_ends_with_it_and_one_that_was_stuck_when_it_returns() -> None:
    released = threading.Event()
    guard = TimeoutRunner()
    threads = [guard.run(threading.current_thread, 5.0)]
    threads.append(guard.run(threading.current_thread, 5.0))
    assert threads[0] is threads[1]
    with pytest.raises(CallTimeout):
        guard.run(lambda: released.wait(60), 0.05)
    threads.append(guard.run(threading.current_thread, 5.0))
    del guard
    released.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


class Echo:
    """A job that gives its tasks back."""

    shape, dtype, answer_timeout = (1,), np.dtype(np.uint8), 60.0

    def warm_up(self) -> None:
        pass

    def run(self, task: int, out: np.ndarray) -> int:
        return task

    def describe(self, task: int) -> str:
        return str(task)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pool_is_gone_with_its_last_user_without_waiting_for_the_garbage_collector(workers: int) -> None:
    def next_of(pool: Pool) -> Result | None:
        try:
            return pool.next(60.0)
        except StopIteration:
            return None

    def used() -> weakref.ref[object]:
        pool = open_pool(Echo(), [3, 4], workers=workers, ahead=1)
        with contextlib.closing(pool):
            answers = [answer.result for answer in iter(lambda: next_of(pool), None)]
            assert answers == [3, 4]
            assert next_of(pool) is None, "the end is said again"
        return weakref.ref(pool)

    gc.disable()
    try:
        assert used()() is None
    finally:
        gc.enable()


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_a_clear_error(setting: Setting) -> None:
    with setting.load(0, 10**6, workers=2) as batches:
        first_batch(batches)
        os.kill(workers_of(batches)[0], signal.SIGKILL)
        with pytest.raises(
            LoaderError, match=r"loader worker \d \(pid \d+\) was killed by SIGKILL.*lower data\.workers"
        ):
            list(batches)
        with pytest.raises(LoaderError, match="SIGKILL"):
            batches.next_batch(5.0)


def test_a_killed_fork_server_is_a_clear_error(setting: Setting) -> None:
    with setting.load(0, 10**6, workers=2) as batches:
        first_batch(batches)
        pids = workers_of(batches)
        os.kill(batches._pool._fork_server.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        wait_for(lambda: not any(alive(pid) for pid in pids), 5)
        with pytest.raises(LoaderError, match="loader worker"):
            list(batches)


def test_workers_ignore_the_signals_of_the_job(setting: Setting) -> None:
    expected = setting.batches()
    with setting.load(workers=2) as batches:
        fork_server = batches._pool._fork_server.pid  # type: ignore[attr-defined]
        for number in IGNORED:
            os.kill(fork_server, number)  # while it starts
        got = [first_batch(batches)]
        for pid in [fork_server, *workers_of(batches)]:
            for number in IGNORED:
                os.kill(pid, number)
        got += list(batches)
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected))


SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from tests.data.test_loader import Setting, first_batch, workers_of
batches = Setting(Path({videos!r}), Path({index!r})).load(0, 10**6, workers=2)
first_batch(batches)
print(batches._pool._fork_server.pid, *workers_of(batches), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_the_training_process(videos: Path, tmp_path: Path, number: signal.Signals) -> None:
    script = SCRIPT.format(path=sys.path, videos=str(videos), index=str(tmp_path / "index"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    assert all(alive(pid) for pid in pids)
    process.send_signal(number)
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids), 3)


def test_workers_import_no_torch_and_have_one_thread_for_images(setting: Setting) -> None:
    with setting.load(0, 10**6, workers=1) as batches:
        first_batch(batches)
        (pid,) = workers_of(batches)
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        assert len(os.listdir(f"/proc/{pid}/task")) <= 2  # itself and the decoding thread


def test_nothing_is_left_of_a_closed_loader(setting: Setting) -> None:
    setting.batches(0, 1, workers=2)
    gc.collect()  # what other tests have left open
    before = len(os.listdir("/proc/self/fd")), descendants(os.getpid())
    for _ in range(3):
        setting.batches(0, 1, workers=2)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before[0]
    assert descendants(os.getpid()) == before[1]


def test_the_job_that_workers_get_is_small(setting: Setting) -> None:
    job = TrainClipFn(setting.catalogs, setting.plan, setting.config)
    assert len(pickle.dumps(job)) < 20_000


def test_settings_that_cannot_work_come_out_as_such(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ConfigError("no decord; use data.decoder=pyav")

    monkeypatch.setattr(TrainClipFn, "read", missing)
    with setting.load() as batches, pytest.raises(ConfigError, match=r"data\.decoder=pyav"):
        list(batches)


# --- testing ----------------------------------------------------------------------------------------------------------


def opened(setting: Setting, name: str, workers: int, indices: list[int]) -> EvalLoader:
    config = setting.config.model_copy(update={"eval": setting.config.eval.model_copy(update={"workers": workers})})
    return EvalLoader(setting.catalogs[name], indices, config.data.datasets[name], config)


@pytest.fixture
def tested(damaged: Path, tmp_path: Path) -> Setting:
    views = {"data__datasets__stride__temporal_views": 2, "data__datasets__stride__spatial_views": 3}
    return Setting(damaged, tmp_path / "index", **views)


@pytest.mark.parametrize("workers", [0, 2])
def test_videos_come_in_order_with_all_their_views_or_the_reason(tested: Setting, workers: int) -> None:
    indices = [9, 1, 0, 4, 2]
    with opened(tested, "stride", workers, indices) as loader_:
        found = list(loader_)
    assert [views.video for views in found] == indices
    dataset, config = tested.config.data.datasets["stride"], tested.config
    for index, views, error in found:
        if index in (1, 4):
            assert views is None
            assert error
        else:
            expected = load_views(tested.catalogs["stride"].path(index), dataset, config.data, config.model)
            assert views is not None
            assert views.shape == (6, 3, 4, 32, 32)
            assert np.array_equal(views.numpy(), expected)
            assert error == ""


def test_no_videos_are_no_views(tested: Setting) -> None:
    with opened(tested, "stride", 2, []) as loader_:
        assert list(loader_) == []


def test_odd_files_load_with_workers(odd: Path, tmp_path: Path) -> None:
    kinds = ["d_editlist.mp4", "d_vp9.webm", "ucf_archery.avi", "rot90.mov", "d_1frame.mp4", "av1.mkv"]
    names = sorted(material.names(odd, *kinds, "d_odd_341x255_vp9.webm"))
    (tmp_path / "train.csv").write_text("".join(f"{n} {i % 5}\n" for i, n in enumerate(names)))
    write_numbered(tmp_path / "unused.mp4", 1)
    data = {"stride": {"annotations": str(tmp_path), "videos": str(odd), "classes": 5}}
    setting = Setting(odd, tmp_path / "index", data__datasets=data)
    batches = setting.batches(0, 1, workers=2)
    assert all(b.skipped == [] for b in batches)
    assert all(same(a, b) for a, b in zip(batches, setting.batches(0, 1)))
