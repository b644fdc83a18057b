"""Names in files that stay on disk do not change when code is renamed: files are the bytes that earlier versions wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from multitrain import lease
from multitrain.cli import main
from multitrain.config import DatasetConfig
from multitrain.data.catalog import Catalog

INDEX = "c4f38a216b2f16a7ce8699a01235acd3c1e4a4cb5afcb73c10a85717b4a767ea"
"""SHA-256 of the index of two lines, written by the version of 2026-11-30."""
HOLDER = ["start", "job", "cluster", "restart", "host", "user", "pid", "machine", "began", "since"]
"""Keys of a lease of that version; later ones may be added behind."""


def videos(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).write_bytes(name.encode() * 9)
    return folder


def test_an_index_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    dataset = DatasetConfig(annotations=str(tmp_path), videos=str(videos(tmp_path / "videos")), classes=2)
    catalog = Catalog.open(dataset, "d", "train", tmp_path / "index")
    (file,) = (tmp_path / "index").glob("*.index")
    assert file.name == "28680a843a9d4dc1e54a34c3252b4f5c.index"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == INDEX
    assert catalog.digest == "c7728a0a9b52231d95bca14fdda0cb05"


def test_a_pack_and_the_record_of_what_a_command_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["data", "pack", str(videos(tmp_path / "videos")), str(out), "--workers", "1"]) == 0
    written = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.iterdir() if f.is_file()}
    assert written == {
        ".multitrain-files.jsonl": "8f5d1bc312eaf71fd3714d12e72a6cf9516dd34b7791625536bfe0b795bcbb0e",
        "pack.index": "c84c98400f2b9034b4bc83e7719f51888ccb53014190e161f685f8a18a908496",
        "shard-000000.tar": "389e18fba0653df823f68f92e98f184d8c597ccd9458ee4c604c661631af0885",
    }


def test_a_lease(tmp_path: Path) -> None:
    with lease.acquire(tmp_path):
        (holder, counter) = (tmp_path / "lease/00000001.json").read_text().splitlines()
        assert list(json.loads(holder))[: len(HOLDER)] == HOLDER
        assert counter.isdigit()
        assert (tmp_path / "lease/00000001.over").read_text() == ""
    assert (tmp_path / "lease/00000001.over").read_text() == "released\n"
