"""The user's own backbone is part of a run's snapshot, which every start of the run uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.snapshot import own_module, snapshot
from multitrain.config import ConfigError


def test_the_file_or_package_is_copied_and_an_earlier_copy_is_enough(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mynet.py").write_text("def build(): ...\n")
    package = tmp_path / "own" / "nets" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "deep.py").write_text("def build(): ...\n")
    (package / "weights.bin").write_text("no code")
    (package / ".secret.py").write_text("no code")
    snapshot(tmp_path / "one", [str(tmp_path / "own")], "mynet:build")
    assert (tmp_path / "one" / "mynet.py").read_text() == "def build(): ...\n"
    snapshot(tmp_path / "two", [str(tmp_path / "own")], "nets.inner.deep:build")
    copied = sorted(str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two" / "nets").rglob("*.*"))
    assert copied == ["nets/__init__.py", "nets/inner/deep.py"]
    snapshot(tmp_path / "three", [], "mynet:build", earlier=tmp_path / "one")
    assert (tmp_path / "three" / "mynet.py").is_file()


def test_a_file_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no mynet\.py or folder mynet in .*--config-dir FOLDER") as caught:
        own_module("mynet:build", [str(tmp_path)])
    assert "\n" not in str(caught.value)
    assert own_module("mvitv2", []) is None
    assert own_module(None, []) is None
