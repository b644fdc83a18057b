"""Where the bytes of the videos come from is not part of a run: files, shards, a node's copies and a server give equal bits."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support import pack, settings, train, write_run

from multitrain.config import load
from tests.engine.test_resume import assert_same_bits, interrupt
from tests.object_store import ENVIRONMENT, serving

NAMES = ("stride", "segment", "with.dot")


@pytest.fixture(scope="module")
def packed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of `tiny_data`, packed."""
    return pack(tiny_data, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def on_files(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on files."""
    changes: dict[str, Any] = {"checkpoint__every": 2, "data__shuffle_window": 2, "data__shard_videos": 4}
    mapping = settings(tiny_data, updates=5, data__workers=1, **changes)
    run, _ = write_run(tmp_path_factory.mktemp("files"), mapping)
    train(run, 1)
    return run


def elsewhere(on_files: Path, runs: Path, videos: str, **data: Any) -> Path:
    """The same run with videos from ``VIDEOS/DATASET``; a run that is there goes on with them."""
    mapping = load(on_files).model_dump(mode="json")
    mapping["data"] |= data
    for name, dataset in mapping["data"]["datasets"].items():
        dataset["videos"] = f"{videos}/{name}"
    return write_run(runs, mapping)[0]


def test_half_on_files_and_half_on_shards_is_the_same_run(
    on_files: Path, tiny_data: Path, packed: Path, tmp_path: Path
) -> None:
    run = elsewhere(on_files, tmp_path, str(tiny_data))
    assert interrupt(run, 1, signal.SIGTERM, after=2) == [75]
    assert elsewhere(on_files, tmp_path, str(packed)) == run
    train(run, 1)
    assert_same_bits(run, on_files)


@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_a_run_on_staged_shards_that_is_killed_ends_with_the_bits_of_the_run_on_files(
    on_files: Path, packed: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (disk := tmp_path / "disk").mkdir()
    monkeypatch.setenv("NODE_DISK", str(disk))
    run = elsewhere(on_files, tmp_path, str(packed), stage="$NODE_DISK", stage_limit=limit)
    assert interrupt(run, 1, signal.SIGKILL, after=3, checkpoint=True) == [-9]
    copied = [p.stat().st_size for p in disk.glob("*/*/*.staged")]
    assert copied
    assert sum(copied) <= limit
    train(run, 1)
    assert_same_bits(run, on_files)
    assert not list(disk.glob("*/*/*"))
    assert f"go to {disk}/multitrain-stage-{os.getuid()}" in (run / "ranks.log").read_text()


def test_a_run_on_a_server_that_drops_and_stalls_requests_ends_with_the_bits_of_the_run_on_files(
    on_files: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs", reason="multitrain[remote] is not installed")
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with serving(packed.parent) as store:
        store.faults = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        run = elsewhere(on_files, tmp_path, f"s3://{packed.name}", index=str(tmp_path / "index"), decode_timeout=12)
        assert interrupt(run, 1, signal.SIGKILL, after=3, checkpoint=True) == [-9]
        train(run, 1)
    assert_same_bits(run, on_files)
    assert not (run / "skipped.jsonl").exists() or not (run / "skipped.jsonl").read_text()
    logged = "".join(p.read_text(errors="replace") for p in run.rglob("*") if p.suffix in (".log", ".yaml", ".jsonl"))
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in logged
