"""Packs at an address: the same bytes by one request a video, whatever the server drops; no credentials anywhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import pack, settings

from launch.resume import with_absolute_paths
from multitrain.cli import main
from multitrain.config import ConfigError, compose, leaves, validate
from multitrain.data import packs, remote
from multitrain.data.annotations import CatalogError
from multitrain.data.catalog import Catalog, open_catalogs, plan_of, summary
from multitrain.data.clips import Task, TrainClipFn
from multitrain.data.decode import VideoError, container, known_packets, open_video
from multitrain.data.loader import TrainLoader
from multitrain.order import BatchShape
from tests.object_store import ENVIRONMENT, ObjectStore, serving

pytest.importorskip("aiohttp", reason="multitrain[remote] is not installed")
NAMES = ("stride", "segment", "with.dot")
S3 = pytest.param(
    "s3",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("s3fs") is None, reason="multitrain[remote] (s3fs) is not installed"
    ),
)


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets of `videos`, packed below ``bucket``."""
    folder = tmp_path_factory.mktemp("served")
    pack(videos, folder / "bucket")
    return folder


@pytest.fixture
def store(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with serving(packed) as server:
        for name, value in ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        remote._file_system.cache_clear()
        packs.forget()
        yield server
        remote.set_patience(60)
        packs.use_stage(None)


def address(store: ObjectStore, scheme: str) -> str:
    return "s3://bucket" if scheme == "s3" else f"{store.url}/bucket"


def on_server(videos: Path, base: str, **changes: Any) -> dict[str, Any]:
    mapping = settings(videos, data__workers=0, **changes)
    for name in NAMES:
        mapping["data"]["datasets"][name]["videos"] = f"{base}/{name}"
    return mapping


def job_of(mapping: dict[str, Any], index: Path) -> TrainClipFn:
    config = validate(mapping)
    catalogs = open_catalogs(config.data, "train", index)
    job = TrainClipFn(catalogs, plan_of(config, catalogs), config)
    job.warm_up()
    return job


def clips(job: TrainClipFn, count: int) -> list[bytes]:
    made = []
    for sample in job.plan.tickets(0, count):
        out = np.zeros(job.shape, job.dtype)
        assert job.run(Task(0, sample), out).skipped == []
        made.append(out.tobytes())
    return made


@pytest.mark.parametrize("scheme", ["http", S3])
def test_clips_have_the_bits_of_files_by_one_request_a_video(
    videos: Path, store: ObjectStore, tmp_path: Path, scheme: str
) -> None:
    loose = job_of(settings(videos), tmp_path)
    stored = job_of(on_server(videos, address(store, scheme)), tmp_path)
    assert stored.plan.fingerprint == loose.plan.fingerprint
    fetched = len(store.requests)
    assert fetched <= 3 * 4  # each index once
    assert clips(stored, 24) == clips(loose, 24)
    assert len(store.requests) - fetched <= 1.2 * 24
    again = len(store.requests)
    job_of(on_server(videos, address(store, scheme)), tmp_path)
    assert len(store.requests) == again + 3  # whether each index is still the same


@pytest.mark.parametrize("scheme", ["http", S3])
def test_dropped_and_stalled_requests_change_no_bit_and_skip_no_video(
    videos: Path, store: ObjectStore, tmp_path: Path, scheme: str
) -> None:
    store.faults = True
    remote.set_patience(5)
    stored = job_of(on_server(videos, address(store, scheme)), tmp_path)
    remote.set_patience(5)
    assert clips(stored, 48) == clips(job_of(settings(videos), tmp_path), 48)


@pytest.mark.parametrize("scheme", ["http", S3])
def test_a_request_is_repeated_until_the_server_answers(store: ObjectStore, packed: Path, scheme: str) -> None:
    store.failing = 8  # the libraries themselves repeat some
    shard = "bucket/stride/shard-000000.tar"
    content = remote.read(f"{address(store, scheme)}/stride/shard-000000.tar", 100, 900)
    assert content == (packed / shard).read_bytes()[100:1000]
    assert not store.failing


def test_worker_processes_read_from_a_server(videos: Path, store: ObjectStore, tmp_path: Path) -> None:
    batches = []
    for mapping in (settings(videos), on_server(videos, address(store, "http"))):
        mapping["data"]["workers"] = 2
        job = job_of(mapping, tmp_path)
        with TrainLoader(job.catalogs, job.plan, BatchShape(16, 1, 2, 8), 0, job.config, 0, 1) as loader:
            batches.append(b"".join(batch.clips.numpy().tobytes() for batch in loader))
    assert batches[0] == batches[1]


def test_copies_on_the_node_are_a_cache(videos: Path, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    stage = {"data__stage": str(tmp_path / "disk"), "augment__copies": 1}
    job = job_of(on_server(videos, address(store, "http"), **stage), tmp_path)
    shards = sum(len(packs.Pack(c.videos).shards()) for c in job.catalogs.values())
    plain = clips(job_of(settings(videos, augment__copies=1), tmp_path), 16)
    with TrainLoader(job.catalogs, job.plan, BatchShape(16, 1, 2, 8), 0, job.config, 0, 9) as loader:
        while len(list((tmp_path / "disk").glob("*/*/*.staged"))) < shards:
            loader.next_batch(0.05)
        loader.close()
        job.warm_up()
        asked = len(store.requests)
        assert clips(job, 16) == plain
        assert len(store.requests) == asked


def test_what_is_missing_or_forbidden_is_said_at_once(videos: Path, store: ObjectStore, tmp_path: Path) -> None:
    base = address(store, "http")
    for wrong, said in (("none", "no pack.index there"), ("private", "may not be read")):
        store.forbidden.add("/bucket/private/pack.index")
        mapping = on_server(videos, base)
        mapping["data"]["datasets"]["stride"]["videos"] = f"{base}/{wrong}"
        with pytest.raises(CatalogError, match=said) as refused:
            open_catalogs(validate(mapping).data, "train", tmp_path)
        assert "\n" not in str(refused.value)
    catalog = job_of(on_server(videos, base), tmp_path).catalogs["stride"]
    store.forbidden |= {f"/bucket/stride/shard-00000{n}.tar" for n in range(3)}
    asked = len(store.requests)
    with pytest.raises(VideoError, match=r"bucket/stride/shard-00000\d.tar: may not be read") as error:
        open_video(catalog.path(0))
    assert not error.value.transient
    assert len(store.requests) == asked + 1


def test_a_server_that_is_gone_is_a_temporary_error(videos: Path, store: ObjectStore, tmp_path: Path) -> None:
    catalog = job_of(on_server(videos, address(store, "http")), tmp_path).catalogs["stride"]
    store.down = True
    remote.set_patience(0.5)
    with pytest.raises(VideoError, match="did not answer in time") as error:
        open_video(catalog.path(0))
    assert error.value.transient


def test_a_server_without_ranges_is_refused(videos: Path, store: ObjectStore, tmp_path: Path) -> None:
    job = job_of(on_server(videos, address(store, "http")), tmp_path)
    store.ranges = False
    with pytest.raises(ConfigError, match="ignores ranges"):
        open_video(job.catalogs["stride"].path(0))


def test_an_index_that_was_changed_there_is_fetched_again(
    videos: Path, packed: Path, store: ObjectStore, tmp_path: Path
) -> None:
    base = address(store, "http") + "/stride"
    first = remote.mirror(base, tmp_path)
    assert remote.mirror(base, tmp_path) == first
    index = packed / "bucket" / "stride" / "pack.index"
    content = index.read_bytes()
    try:
        index.write_bytes(content + b"\0")
        second = remote.mirror(base, tmp_path)
        assert second != first
        store.down = True
        remote.set_patience(0.5)
        assert remote.mirror(base, tmp_path) == second, "during an outage"
        with pytest.raises(ConfigError, match="did not answer"):
            remote.mirror(base + "/other", tmp_path)
    finally:
        index.write_bytes(content)
    assert (first / "pack.index").read_bytes() == content


@pytest.mark.parametrize(
    ("videos_at", "said"),
    [
        ("s3://AKIA:hunter2@bucket/x", "credentials into the environment"),
        ("https://me:hunter2@host/x", "credentials into the environment"),
        ("https://host/x?X-Amz-Signature=hunter2", "credentials into the environment"),
        ("ftp://host/x", "begins with s3://"),
        ("s3://", "needs a host or bucket"),
        ("https://ho st/x", "no blanks"),
    ],
)
def test_an_address_with_credentials_or_of_another_kind_is_refused_and_not_repeated(
    videos: Path, videos_at: str, said: str
) -> None:
    mapping = settings(videos)
    mapping["data"]["datasets"]["stride"]["videos"] = videos_at
    with pytest.raises(ConfigError, match=said) as refused:
        validate(mapping)
    with pytest.raises(ConfigError) as typed:
        compose(["experiment=ssv2", f"data.datasets.ssv2.videos={videos_at}", "no.such=1"])
    for error in (refused, typed):
        assert "hunter2" not in str(error.value)
        assert "\n" not in str(error.value)


def test_an_address_stays_one_in_a_run_and_credentials_stay_outside(
    videos: Path, store: ObjectStore, tmp_path: Path
) -> None:
    mapping = on_server(videos, address(store, "http") + "/")
    mapping["data"]["datasets"]["stride"]["videos"] += "/"
    config = with_absolute_paths(leaves(validate(mapping)), tmp_path / "run")
    assert config.data.datasets["stride"].videos == f"{store.url}/bucket//stride"
    summary(validate(on_server(videos, address(store, "http"))), tmp_path)
    found = [
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode() in p.read_bytes()
    ]
    assert found == []


def test_annotations_at_an_address_and_commands_on_files_are_refused(
    videos: Path, store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = settings(videos)
    mapping["data"]["datasets"]["stride"]["annotations"] = "s3://bucket/x"
    with pytest.raises(ConfigError, match="copy them to a folder"):
        validate(mapping)
    words = [
        "data=ssv2",
        f"data.datasets.ssv2.videos={store.url}/bucket/stride",
        f"data.datasets.ssv2.annotations={videos}/stride",
    ]
    assert main(["data", "check", *words, "--out", str(tmp_path / "out")]) == 2
    assert re.search("is an address; check the pack before", capsys.readouterr().err)


def test_without_the_library_the_extra_is_named(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError(f"Install a library for {scheme}")

    import fsspec

    remote._file_system.cache_clear()
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for scheme in ("s3", "gs", "https"):
        mapping = on_server(videos, f"{scheme}://bucket")
        with pytest.raises(CatalogError, match=r"pip install 'multitrain\[remote\]'") as refused:
            Catalog.open(validate(mapping).data.datasets["stride"], "stride", "train", tmp_path)
        assert "\n" not in str(refused.value)


def test_nothing_is_imported_without_an_address(root: Path) -> None:
    heavy = "[m for m in ('fsspec', 'aiohttp', 'torch') if m in sys.modules]"
    code = f"import sys, multitrain.data.clips, multitrain.data.staging; sys.exit(' '.join({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_a_long_video_on_a_server_is_read_in_parts(
    videos: Path, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_packets, "LONG", 1)
    monkeypatch.setattr(container, "_BLOCK", 1024)
    stored = job_of(on_server(videos, address(store, "http")), tmp_path)
    assert clips(stored, 24) == clips(job_of(settings(videos), tmp_path), 24)
    known_packets.forget()
