"""What a checkpoint is made of has reached the disk before its name says that it is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from multitrain.engine import checkpoint as ck
from multitrain.records.checkpoints import FILES


def test_every_file_and_folder_is_synced_before_the_name_that_makes_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synced and nothing else: no test that only kills the process can see a missing fsync."""
    done: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(source: str | Path, target: str | Path) -> None:
        done.append(("rename", str(source)))
        rename(source, target)

    def noted_replace(source: str | Path, target: str | Path) -> None:
        done.append(("replace", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_replace)
    content = ck.Checkpoint({"w": torch.ones(3)}, {"exp_avg.w": torch.ones(3)}, {"update": 7})
    ck.write(tmp_path, content, "name: x")
    (renamed,) = [i for i, (what, _) in enumerate(done) if what == "rename"]
    (pointed,) = [i for i, (what, _) in enumerate(done) if what == "replace"]
    temporary, pointer = done[renamed][1], done[pointed][1]
    synced = [path for what, path in done[:renamed] if what == "fsync"]
    assert {f"{temporary}/{name}" for name in (*FILES, "manifest.json")} | {temporary} <= set(synced)
    assert synced.index(f"{temporary}/manifest.json") > max(synced.index(f"{temporary}/{name}") for name in FILES)
    between = [path for what, path in done[renamed:pointed] if what == "fsync"]
    assert str(tmp_path) in between, "the folder's new name, before the pointer names it"
    assert pointer in between
    assert ("fsync", str(tmp_path)) in done[pointed:]
