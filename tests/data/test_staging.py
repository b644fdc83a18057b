"""Staged copies of shards are never part of the result, never more than the limit, and never somebody else's files."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitrain.cli import main
from multitrain.config import ConfigError, DatasetConfig, compose
from multitrain.data import packs, stage_folder, staged, staging
from multitrain.data.catalog import Catalog
from multitrain.data.packs import Pack, find_packed, open_pack
from multitrain.data.shards_ahead import AHEAD, Horizon, Job, Needs, Shard
from multitrain.data.staging import Stager, Staging
from multitrain.order import BatchShape, Plan, Source
from multitrain.order.windows import scatter
from tests.users import ALICE

VIDEOS, BATCH = 60, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `files`, and `pack`: 15 shards of 4 videos (which are no videos), and `train.csv`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "files").mkdir()
    rng = np.random.default_rng(0)
    for i in range(VIDEOS):
        (folder / "files" / f"{i}.mp4").write_bytes(rng.bytes(20_000 + 100 * i))
    (folder / "train.csv").write_text("".join(f"{i}.mp4 {i % 3}\n" for i in range(VIDEOS)))
    words = ("--annotations", str(folder), "--shard-videos", "4", "--workers", "1")
    assert main(["data", "pack", str(folder / "files"), str(folder / "pack"), *words]) == 0
    return folder


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    packs.forget()
    yield
    packs.use_stage(None)
    packs.forget()


def job(
    made: Path, stage: Path | str, limit: int = 10**9, *, window: int | None = 3, stop: int = 45, **more: Any
) -> Job:
    dataset = DatasetConfig(annotations=str(made), videos=str(more.pop("videos", made / "pack")), classes=3)
    catalog = Catalog.open(dataset, "a", "train", made / "index")
    source = Source("a", len(catalog), digest=catalog.digest)
    plan = Plan([source], seed=1, effective_batch=BATCH, shuffle_window=window, shard_videos=4)
    ranks = more.pop("ranks", range(1))
    shape = BatchShape(BATCH, more.pop("world", 1), 1, BATCH // more.pop("per", 1))
    return Job(str(stage), limit, plan, {"a": catalog}, shape, ranks, 0, stop)


@contextmanager
def running(given: Job) -> Iterator[Callable[[bytes], object]]:
    """A staging process in a thread; a function that writes to it."""
    reader, writer = os.pipe()
    thread = threading.Thread(target=Stager(given, reader).run, daemon=True)
    thread.start()
    try:
        yield lambda line: os.write(writer, line)
    finally:
        os.close(writer)
        thread.join(60)
        assert not thread.is_alive()
        os.close(reader)


def root_of(stage: Path) -> Path:
    return stage / f"multitrain-stage-{os.getuid()}"


def copies(stage: Path) -> list[str]:
    return sorted(p.name for p in root_of(stage).glob("*/*.staged"))


def taken(stage: Path) -> int:
    sizes = []
    for path in root_of(stage).glob("*/*"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def the_pack(made: Path) -> Pack:
    found = open_pack(made / "pack")
    assert found is not None
    return found


def assert_reads(made: Path) -> None:
    """Every video has its bytes."""
    for i in range(VIDEOS):
        assert packs.read(made / "pack" / f"{i}.mp4") == (made / "files" / f"{i}.mp4").read_bytes()


# -------------------------------------------------------------------------------------------------------------- copies


def test_shards_that_fit_are_all_copied_read_and_deleted_at_the_end(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(job(made, tmp_path)) as tell:
        eventually(lambda: len(copies(tmp_path)) == 15)
        assert root_of(tmp_path).stat().st_mode & 0o777 == 0o700
        packs.use_stage(str(tmp_path))
        shared: list[Path] = []
        monkeypatch.setattr(packs, "_range", lambda stored: shared.append(stored.shard))
        assert_reads(made)
        assert shared == []
        folder = root_of(tmp_path) / the_pack(made).identity
        foreign = [
            root_of(tmp_path) / "mine.tar",
            folder / "mine.tar",
            folder / "shard-000001.tar",
            folder / "x.part-1",
        ]
        for path in foreign:
            path.write_text("a file of the user's")
        (folder / "link.staged").symlink_to(made / "train.csv")
        tell(b"done\n")
        eventually(lambda: copies(tmp_path) == ["link.staged"])
    assert all(path.exists() for path in (*foreign, made / "train.csv"))
    assert sorted(p.name for p in root_of(tmp_path).iterdir()) == sorted([folder.name, "lock", "mine.tar"])
    assert capsys.readouterr().err.count("all of 15 shards") == 1


def test_the_sizes_that_the_index_gives_are_those_of_the_shards(made: Path) -> None:
    pack = the_pack(made)
    assert pack.shards() == {p.name: p.stat().st_size for p in sorted((made / "pack").glob("*.tar"))}


def test_the_limit_is_never_exceeded_and_each_update_finds_its_shards(made: Path, tmp_path: Path) -> None:
    largest = max(the_pack(made).shards().values())
    limit = 6 * largest
    given = job(made, tmp_path, limit)
    needs, most = Needs(given), 0
    with running(given) as tell:
        for update in range(given.stop):
            tell(b"%d\n" % update)
            wanted = {shard.path.name + ".staged" for shard in needs.of(update)}
            while not wanted <= set(copies(tmp_path)):
                most = max(most, taken(tmp_path))
            most = max(most, taken(tmp_path))
    assert 0 < most <= limit


def test_an_order_without_windows_keeps_its_copies_when_few_fit(made: Path, tmp_path: Path) -> None:
    limit = 4 * max(the_pack(made).shards().values())
    given = job(made, tmp_path, limit, window=None)
    with running(given) as tell:
        eventually(lambda: len(copies(tmp_path)) >= 4)
        first = copies(tmp_path)
        for update in range(10):
            tell(b"%d\n" % update)
            time.sleep(0.02)
        assert copies(tmp_path) == first


def test_a_node_copies_what_its_own_ranks_read(made: Path, tmp_path: Path) -> None:
    parts = [Needs(job(made, tmp_path, ranks=ranks, world=4, per=4)) for ranks in (range(4), range(2), range(2, 4))]
    every, *halves = ([{s.path for s in needs.of(u)} for u in range(8)] for needs in parts)
    assert [a | b for a, b in zip(*halves)] == every
    assert halves[0] != halves[1]


class Arithmetic:
    """The shards of each update of one of `nodes` nodes, without files."""

    def __init__(self, plan: Plan, nodes: int) -> None:
        self._plan, self._nodes = plan, nodes
        size, per = plan.sources[0].size, plan.shard_videos
        self.shards = [Shard.__new__(Shard) for _ in range(size // per)]
        for number, shard in enumerate(self.shards):
            shard.name, shard.size, shard.videos = str(number), 1, per
        self._shard = np.empty(size, np.int64)
        self._shard[scatter(np.arange(size), size)] = np.arange(size) // per

    def of(self, update: int) -> dict[Shard, int]:
        batch = self._plan.effective_batch
        drawn = self._plan.tickets(update * batch, update * batch + batch // self._nodes)["index"]
        numbers, videos = np.unique(self._shard[drawn], return_counts=True)
        return {self.shards[n]: int(count) for n, count in zip(numbers, videos)}


@pytest.mark.parametrize(
    ("window", "nodes", "least", "copies"), [(16, 1, 0.98, 80), (16, 4, 0.98, 80), (None, 1, 0.2, 12)]
)
def test_with_a_window_each_shard_is_copied_once_an_epoch_and_nearly_every_read_is_from_a_copy(
    made: Path, tmp_path: Path, window: int | None, nodes: int, least: float, copies: int
) -> None:
    """With room for the window's shards only, and the time to copy one shard an update."""
    plan = Plan([Source("a", 4000)], seed=0, effective_batch=32, shuffle_window=window, shard_videos=50)
    given = replace(job(made, tmp_path, stop=250), plan=plan, shape=BatchShape(32, nodes, 1, 32 // nodes))
    needs, stager, room = Arithmetic(plan, nodes), Stager(given, 0), 17
    horizon = Horizon(given, needs, room)  # type: ignore[arg-type]
    there: list[Shard] = []
    made_copies = found = reads = 0
    for update in range(given.stop):
        horizon.advance(update)
        while not horizon.complete:
            horizon.advance(update)
        staged = [shard for shard in horizon.wanted() if shard in there]
        for shard in [s for s in horizon.wanted() if s not in there]:
            kept = stager._kept(horizon, staged, shard, room)
            if kept is not None:
                there, made_copies = kept, made_copies + 1
                break
        used = needs.of(update)
        found += sum(videos for shard, videos in used.items() if shard in there)
        reads += sum(used.values())
        assert len(there) <= room
    assert found / reads >= least
    assert made_copies <= 2 * copies


def test_looking_ahead_ends_at_the_limit_or_the_last_update(made: Path, tmp_path: Path) -> None:
    for limit, stop in ((10**9, 70), (1, 400)):
        given = job(made, tmp_path, stop=stop)
        needs = Needs(given)
        horizon = Horizon(given, needs, limit)
        while not horizon.complete:
            horizon.advance(3)
        assert horizon._next == (stop if limit > 1 else 3 + AHEAD)
        assert {s.path for s in horizon.wanted()[: len(needs.of(3))]} == {s.path for s in needs.of(3)}


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_killed_process_leaves_whole_copies_that_the_next_one_uses(made: Path, tmp_path: Path) -> None:
    given = job(made, tmp_path)
    for turn in range(3):
        process = Staging(given)
        assert process._process is not None
        eventually(lambda turn=turn: len(copies(tmp_path)) > 3 * turn)
        process._process.send_signal(signal.SIGKILL)
        process.close(done=False)
        packs.use_stage(str(tmp_path))
        assert_reads(made)
    (half := root_of(tmp_path) / the_pack(made).identity / "shard-000001.tar.part-1-0123abcd").write_bytes(b"x")
    kept = {p: p.stat().st_mtime_ns for p in root_of(tmp_path).glob("*/*.staged")}
    cut = sorted(kept)[1]
    os.truncate(cut, 100)
    process = Staging(given)
    eventually(lambda: len(copies(tmp_path)) == 15 and cut.stat().st_size > 100)
    assert not half.exists()
    assert all(p.stat().st_mtime_ns == was for p, was in kept.items() if p != cut)
    process.reached(7)
    process.close(done=True)
    assert sorted(p.name for p in root_of(tmp_path).iterdir()) == ["lock"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_is_said_once_and_changes_nothing(
    made: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging, "_PAUSE_SECONDS", 0.01)
    calls: list[int] = []

    def full(file: int, *_: Any) -> None:
        calls.append(file)
        if len(calls) > 2:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stage_folder.os, "posix_fallocate", full)
    monkeypatch.setattr(staging, "_LONGEST_PAUSE_SECONDS", 0.01)
    with running(job(made, tmp_path)) as tell:
        for turn in range(2000):
            tell(b"%d\n" % (turn % 45))
            if len(calls) > 8:
                break
            time.sleep(0.01)
        packs.use_stage(str(tmp_path))
        assert_reads(made)
        assert len(copies(tmp_path)) == 2
        assert not list(root_of(tmp_path).glob("*/*.part-*"))
    said = capsys.readouterr().err
    assert said.count(os.strerror(number)) == 1
    assert said.count("\n") == 2


def test_a_damaged_copy_is_replaced_and_the_shared_shard_read(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(job(made, tmp_path)) as tell:
        eventually(lambda: len(copies(tmp_path)) == 15)
        stored = find_packed(made / "pack" / "7.mp4")
        assert stored is not None
        copy = root_of(tmp_path) / the_pack(made).identity / f"{stored.shard.name}.staged"
        content = copy.read_bytes()
        copy.write_bytes(content[: stored.offset] + bytes(100) + content[stored.offset + 100 :])
        packs.use_stage(str(tmp_path))
        tell(b"1\n")
        assert_reads(made)
        eventually(lambda: tell(b"2\n") and copy.exists() and copy.read_bytes() == content)
        eventually(lambda: tell(b"3\n") and "made again" in capsys.readouterr().err)


def test_a_disk_that_hangs_is_left_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staged, "READ_SECONDS", 0.2)
    folder = root_of(tmp_path) / the_pack(made).identity
    folder.mkdir(parents=True)
    root_of(tmp_path).chmod(0o700)
    for shard in the_pack(made).shards():
        os.mkfifo(folder / f"{shard}.staged")  # opening it hangs until somebody writes
    packs.use_stage(str(tmp_path))
    began = time.monotonic()
    assert_reads(made)
    assert time.monotonic() - began < 0.2 * VIDEOS / 2  # not once a video
    assert "has not answered" in packs.stage_trouble()
    process = Staging(job(made, tmp_path))
    for _ in range(3):
        process.report(packs.stage_trouble())
    process.close(done=False)
    assert capsys.readouterr().err.count("has not answered") == 1


def test_a_disk_that_vanishes_is_read_no_more(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging, "_PAUSE_SECONDS", 0.01)
    disk = tmp_path / "disk"
    disk.mkdir()
    with running(job(made, disk)) as tell:
        eventually(lambda: len(copies(disk)) == 15)
        packs.use_stage(str(disk))
        assert_reads(made)
        disk.rename(tmp_path / "gone")
        assert_reads(made)
        eventually(lambda: tell(b"1\n") and "No such file" in capsys.readouterr().err)
        (tmp_path / "gone").rename(disk)
        (root_of(disk) / the_pack(made).identity / "shard-000003.tar.staged").unlink()
        eventually(lambda: tell(b"2\n") and len(copies(disk)) == 15)
        root_of(disk).rename(tmp_path / "cleaned")  # as a cleaner of temporary folders does
        eventually(lambda: tell(b"3\n") and len(copies(disk)) == 15)
    assert_reads(made)


def test_a_node_without_the_folder_says_so_in_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOT_HERE", raising=False)
    monkeypatch.setenv("HERE", str(tmp_path))
    for stage, reason in (
        ("$NOT_HERE/x", "NOT_HERE is not set on this node"),
        ("${HERE}/none", f"{tmp_path}/none is no folder"),
        ("$HERE", "all of 15 shards"),
    ):
        given = job(made, stage)
        with running(given) as tell:
            packs.use_stage(stage)
            assert_reads(made)
            eventually(lambda stage=stage, tell=tell: stage != "$HERE" or len(copies(tmp_path)) == 15)
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1


def test_loose_files_are_said_to_need_a_pack(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(job(made, tmp_path, videos=made / "files")):
        pass
    assert "only packs are staged, and 'a' is not packed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- other processes


def test_a_folder_that_others_may_enter_or_own_is_neither_used_nor_read(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = root_of(tmp_path)
    folder = root / the_pack(made).identity
    folder.mkdir(parents=True)
    for shard in the_pack(made).shards():
        (folder / f"{shard}.staged").write_bytes(b"of another user" * 100)
    given = job(made, tmp_path)
    for turn in range(3):
        if turn == 1 and os.geteuid() == 0:
            os.chown(root, ALICE, ALICE)
        root.chmod(0o700 if turn else 0o755)
        if turn == 2:
            root.rename(tmp_path / "elsewhere")
            root.symlink_to(tmp_path / "elsewhere")
        if turn == 1 and os.geteuid() != 0:
            continue
        packs.use_stage(str(tmp_path))
        assert_reads(made)
        with running(given):
            pass
        assert "not a folder of this user" in capsys.readouterr().err
    assert len(list(root.glob("*/*.staged"))) == 15


def test_runs_of_one_user_share_copies_and_take_none_that_another_needs(made: Path, tmp_path: Path) -> None:
    sizes = the_pack(made).shards()
    limit = sum(sizes.values()) - 1
    one, other = job(made, tmp_path, limit, window=1, stop=3), job(made, tmp_path, limit)
    with running(one) as tell_one, running(other) as tell_other:
        wanted = {s.path.name + ".staged" for u in range(3) for s in Needs(one).of(u)}
        for update in range(0, 45, 3):
            tell_other(b"%d\n" % update)
            eventually(
                lambda update=update: (
                    {s.path.name + ".staged" for s in Needs(other).of(update)} <= set(copies(tmp_path))
                )
            )
            tell_one(b"0\n")
        assert wanted <= set(copies(tmp_path))
        assert taken(tmp_path) <= limit
        tell_other(b"done\n")
        eventually(lambda: len(list(root_of(tmp_path).glob("wanted-*"))) == 1)
        assert wanted <= set(copies(tmp_path))


def test_copies_of_a_pack_that_was_packed_again_are_not_taken_for_it(made: Path, tmp_path: Path) -> None:
    before = the_pack(made).identity
    again = tmp_path / "again"
    words = ("--annotations", str(made), "--shard-videos", "4", "--workers", "1")
    assert main(["data", "pack", str(made / "files"), str(again), *words]) == 0
    assert Pack(again).identity == before
    (tmp_path / "files").mkdir()
    for file in (made / "files").iterdir():
        (tmp_path / "files" / file.name).write_bytes(file.read_bytes()[::-1])
    assert main(["data", "pack", str(tmp_path / "files"), str(tmp_path / "other"), *words]) == 0
    assert Pack(tmp_path / "other").identity != before


@pytest.mark.parametrize("word", ["data.stage=", "data.stage=scratch", "data.stage_limit=much", "data.stage_limit=0"])
def test_a_stage_that_cannot_be_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.stage") as refused:
        compose(["experiment=ssv2", "data.stage=/tmp", word])
    assert "\n" not in str(refused.value)


def test_the_node_expands_the_variable_and_not_the_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", "/submission")
    data = compose(["experiment=ssv2", "data.stage=$SLURM_TMPDIR", "data.stage_limit=1.5T"]).data
    assert (data.stage, data.stage_limit) == ("$SLURM_TMPDIR", 15 * 10**11)
