"""`convert` to a `.safetensors` file writes further files beside it: none of them replaces what it did not make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from multitrain.config import ConfigError
from multitrain.files import RECORD
from multitrain.interop.convert import convert
from multitrain.interop.export import export


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
    done = convert(source, tmp_path / "second.safetensors")
    assert any(
        "for another model, or was edited, and is kept; the description of this model is in second.json" in note
        for note in done.notes
    )
    assert (tmp_path / "config.json").read_text() == mine
    assert (tmp_path / "second.json").exists()


def test_a_checkpoint_is_never_written_into_even_by_force(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "folder")
    before = {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()}
    for name in ("model.safetensors", "other.safetensors"):
        with pytest.raises(ConfigError, match="never written into"):
            convert(source, tmp_path / "folder" / name, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()} == before


TARGETS = {
    "a.safetensors": ("a.safetensors", "a.optimizer.safetensors", "config.json"),
    "a.pyth": ("a.pyth",),
    "folder": tuple(
        f"folder/{n}"
        for n in ("model.safetensors", "optimizer.safetensors", "config.json", "config.yaml", "manifest.json")
    ),
    "export": tuple(f"export/{n}" for n in ("model.safetensors", "config.json", "class_names.json", "README.md")),
}


def make(source: Path, target: Path) -> None:
    (export if target.name == "export" else convert)(source, target, force=True)


@pytest.mark.parametrize("target", TARGETS)
def test_force_replaces_what_the_command_itself_wrote_and_names_and_keeps_everything_else(
    source: Path, tmp_path: Path, target: str
) -> None:
    make(source, tmp_path / target)
    files = [tmp_path / name for name in TARGETS[target]]
    own = [file for file in files if file.exists()]
    assert len(own) >= len(files) - 1
    make(source, tmp_path / target)
    for file in own:
        whole = file.read_bytes()
        for other in (b"mine", edited(file)):
            file.write_bytes(other)
            if file.name == "config.json" and target == "a.safetensors":
                continue  # goes to a.json then
            with pytest.raises(
                ConfigError, match=rf"{file.name} is in the way: \w+ did not write it, or it was changed"
            ):
                make(source, tmp_path / target)
            assert file.read_bytes() == other
        file.write_bytes(whole)
    make(source, tmp_path / target)


def edited(file: Path) -> bytes:
    """A file of the same kind and with the same description, as somebody has trained on."""
    if file.suffix != ".safetensors":
        return file.read_bytes() + b" "
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        header = content.metadata()
    changed = file.with_name("changed")
    save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, changed, header)
    content_of = changed.read_bytes()
    changed.unlink()
    return content_of


@pytest.mark.parametrize("target", ["a.safetensors", "folder", "export"])
def test_what_an_earlier_version_wrote_which_kept_no_record_is_recognised(
    source: Path, tmp_path: Path, target: str
) -> None:
    make(source, tmp_path / target)
    for record in tmp_path.rglob(f"{RECORD}*"):
        record.unlink()
    make(source, tmp_path / target)


def test_weights_of_anybody_else_in_any_format_are_no_conversion(source: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    (tmp_path / "b.pyth").write_bytes(source.read_bytes())
    export(source, tmp_path / "given")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name in ("a.safetensors", "b.pyth", "given/model.safetensors"):
        with pytest.raises(ConfigError, match="convert did not write it"):
            convert(source, tmp_path / name, force=True)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
