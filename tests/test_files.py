"""Files that are written under a temporary name."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitrain.files import replace_text, replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_in_the_middle_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_keeps_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = b"\xff \xc3\xa9.mp4 0\n"
    replace_text(tmp_path / "train.csv", name.decode("utf-8", errors="surrogateescape"))
    assert (tmp_path / "train.csv").read_bytes() == name
