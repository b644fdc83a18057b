"""A dry run says what a node reads of packs; a submission warns when `data.stage` cannot have its effect."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import pack, settings, write_run

from multitrain.cli import main
from multitrain.config import validate
from multitrain.data import catalog, loader
from multitrain.data.packs import INDEX
from multitrain.data.shards_ahead import Job
from multitrain.order import BatchShape
from multitrain.text import byte_size

NAMES = ("stride", "segment", "with.dot")


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(videos, tmp_path_factory.mktemp("packed"))


def on_packs(videos: Path, packed: Path, names: tuple[str, ...] = NAMES, **changes: Any) -> dict[str, Any]:
    mapping = settings(videos, **changes)
    for name in names:
        mapping["data"]["datasets"][name]["videos"] = str(packed / name)
    return mapping


def test_the_lines_of_a_dry_run_count_files_bytes_and_reads(
    videos: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = on_packs(videos, packed, data__decoder="pyav", augment__copies=2)
    run, _ = write_run(tmp_path, mapping)
    assert catalog.main([str(run), "--index", str(tmp_path / "i"), "--clips", "480"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shards = list((packed / "stride").glob("*.tar"))
    total = sum(s.stat().st_size for s in shards)
    assert lines[0] == f"pack   stride: {len(shards) + 1} files, {byte_size(total)}, 11 videos"
    assert (packed / "stride" / INDEX).exists()
    assert len(lines) == 4
    assert lines[3].endswith(", 240 reads")
    assert (
        catalog.main([str(write_run(tmp_path, settings(videos))[0]), "--index", str(tmp_path / "i"), "--clips", "9"])
        == 0
    )
    assert capsys.readouterr().out.strip() == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__stage_limit": 10**9}, ""),
        ({"data__stage_limit": 30_000}, "with an order without windows"),
        ({"data__stage_limit": 30_000, "data__shuffle_window": 2}, "cannot hold the"),
        ({"data__stage_limit": 80_000, "data__shuffle_window": 1}, ""),
        ({"names": NAMES[:1]}, "'segment', 'with.dot' are not packed"),
    ],
)
def test_a_stage_that_cannot_hold_what_updates_read_is_warned_of(
    videos: Path, packed: Path, tmp_path: Path, changes: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = changes.pop("names", NAMES)
    mapping = on_packs(videos, packed, names, data__stage="$TMPDIR", data__shard_videos=4, **changes)
    catalog.summary(validate(mapping), tmp_path)
    found = [r.getMessage() for r in caplog.records if "stage" in r.getMessage()]
    assert (len(found) == 1 and said in found[0]) if said else not found


def test_a_dry_run_prints_them(videos: Path, packed: Path, tmp_path: Path, root: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        f"datasets:\n  stride: {{annotations: '{videos / 'stride'}', videos: '{packed / 'stride'}', classes: 5}}\n"
    )
    words = ["data=mine", "cluster=local", "gpus=2", "model.width=16", f"runs={tmp_path}/runs", "effective_batch=8"]
    command = [sys.executable, "launch/submit.py", "--config-dir", str(tmp_path), *words, "dry_run=true", "name=x"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert "# pack   stride: 4 files" in done.stdout
    assert "# reads  of packs, a node and second" in done.stdout


def test_data_check_says_what_the_file_system_still_allows(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(packed / "with.dot"), "--out", str(tmp_path / "out"), "--workers", "1"]) in (0, 1)
    assert f"{packed / 'with.dot'}: " in capsys.readouterr().err


def test_the_first_rank_of_each_node_starts_the_process_that_copies(
    videos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[range] = []

    class Recorded:
        def __init__(self, job: Job) -> None:
            started.append(job.ranks)

        def close(self, *, done: bool) -> None:
            assert not done

    monkeypatch.setattr(loader, "Staging", Recorded)
    for stage in (None, "$TMPDIR"):
        config = validate(on_packs(videos, packed, data__stage=stage, gpus=2, nodes=2, cluster__kind="slurm"))
        catalogs = catalog.open_catalogs(config.data, "train", tmp_path)
        plan = catalog.plan_of(config, catalogs)
        for rank in range(4):
            loader.TrainLoader(catalogs, plan, BatchShape(16, 4, 2, 2), rank, config, 0, 1).close()
        assert started == ([] if stage is None else [range(2), range(2, 4)])
