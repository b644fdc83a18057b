"""`convert` to a `.safetensors` file writes further files beside it: none of them replaces what it did not make."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitrain.config import ConfigError
from multitrain.interop.convert import convert


@pytest.fixture
def source(joint_pyth: Path) -> Path:
    return joint_pyth


@pytest.mark.parametrize("name", ["new.optimizer.safetensors", "new.json"])
def test_a_file_in_the_way_beside_the_target_stays(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        convert(source, tmp_path / "new.safetensors")
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_description_of_the_same_model_with_other_content_stays(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "first.safetensors")
    mine = (tmp_path / "config.json").read_text().replace("{", '{\n "note": "mine",', 1)
    (tmp_path / "config.json").write_text(mine)
    convert(source, tmp_path / "second.safetensors")
    assert (tmp_path / "config.json").read_text() == mine
    assert (tmp_path / "second.json").exists()


def test_a_checkpoint_is_never_written_into_even_by_force(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "folder")
    before = {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()}
    for name in ("model.safetensors", "other.safetensors"):
        with pytest.raises(ConfigError, match="never written into"):
            convert(source, tmp_path / "folder" / name, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()} == before
