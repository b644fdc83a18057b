"""A checkpoint is whole and verified, or it is not a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from multitrain.engine import checkpoint as ck
from multitrain.engine.checkpoint import Checkpoint, CheckpointError


def content(update: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(update)
    weights = {"a.b": torch.randn(3, 5, generator=generator), "with%2Edot": torch.randn(7, generator=generator)}
    moments = {f"{m}.{n}": t * 2 for m in ("exp_avg", "exp_avg_sq") for n, t in weights.items()}
    return Checkpoint(weights, moments, {"update": update, "fingerprint": "f"})


def save(folder: Path, *updates: int) -> list[Path]:
    return [ck.write(folder, content(u), "seed: 0\n") for u in updates]


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 1234)
    assert folder.name == "update-00001234"
    back, expected = ck.read(folder), content(1234)
    assert back.update == 1234
    for name, tensor in {**expected.weights, **expected.moments}.items():
        assert torch.equal({**back.weights, **back.moments}[name], tensor)
    assert (tmp_path / "latest").read_text().strip() == folder.name
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "config.yaml"]
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    old, new = save(tmp_path, 5, 10)
    path = new / file
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if (file, damage) == ("manifest.json", "flip"):
        path.write_bytes(data.replace(b'"sha256": "', b'"sha256": "0', 1))
    found, refused = ck.newest_verified(tmp_path)
    assert found == old
    assert file in refused[new] or (file, damage) == ("manifest.json", "flip")
    with pytest.raises(CheckpointError, match=new.name):
        ck.read(new)


def test_a_file_that_has_another_size_is_named_as_such(tmp_path: Path) -> None:
    """Which is quicker to find than another checksum, and says more."""
    (folder,) = save(tmp_path, 5)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    size = (folder / "model.safetensors").stat().st_size
    assert ck.verify(folder) == f"model.safetensors has {size} bytes instead of {size - 4}"


def test_a_stale_or_missing_pointer_changes_nothing(tmp_path: Path) -> None:
    _, new = save(tmp_path, 5, 10)
    (tmp_path / "latest").write_text("update-00000005\n")
    assert ck.newest_verified(tmp_path)[0] == new
    (tmp_path / "latest").unlink()
    assert ck.newest_verified(tmp_path)[0] == new


def test_starting_over_in_silence_is_refused_when_no_checkpoint_is_whole(tmp_path: Path) -> None:
    (only,) = save(tmp_path, 5)
    (only / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole.*model\.safetensors"):
        ck.newest_verified(tmp_path)
    assert ck.newest_verified(tmp_path / "fresh") == (None, {})


def test_temporary_folders_are_not_checkpoints_and_are_cleared(tmp_path: Path) -> None:
    save(tmp_path, 5)
    leftover = tmp_path / ".update-00000010.77.tmp"
    leftover.mkdir()
    assert [p.name for p in ck.listed(tmp_path)] == ["update-00000005"]
    ck.clear_temporary(tmp_path)
    assert not leftover.exists()


def test_retention_keeps_the_newest_and_every_nth_and_never_counts_a_damaged_one(tmp_path: Path) -> None:
    folders = save(tmp_path, 5, 10, 15, 20, 25)
    (folders[-1] / "manifest.json").unlink()
    ck.prune(tmp_path, keep=2, keep_every=10)
    assert [p.name[-2:] for p in ck.listed(tmp_path)] == ["25", "20", "15", "10"]
    assert ck.newest_verified(tmp_path)[0] == folders[3]


def test_a_full_disk_leaves_what_was_there_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = save(tmp_path, 5)
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 200:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert ck.newest_verified(tmp_path) == (old, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", old.name]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_what_a_disk_gives_back_changed_is_no_checkpoint_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The disk takes every write and keeps other bytes: only reading back, before the rename, can notice."""
    (old,) = save(tmp_path, 5)
    real = os.write

    def changed(descriptor: int, data: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(file):
            data = bytes(data)[:-3] + bytes([bytes(data)[-3] ^ 1]) + bytes(data)[-2:]
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", changed)
    with pytest.raises(OSError, match="read back differently"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert ck.newest_verified(tmp_path) == (old, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", old.name]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda d, data: real(d, data[: max(1, len(data) // 3)]))
    (folder,) = save(tmp_path, 3)
    assert ck.verify(folder) is None


def test_writing_the_same_update_again_keeps_a_whole_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 5)
    before = (folder / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 5)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    (folder / "state.json").write_text("{}")
    save(tmp_path, 5)
    assert ck.verify(folder) is None
