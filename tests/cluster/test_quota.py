"""What a file system and Lustre's quota still allow is one line for each file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from multitrain.cluster import quota

LUSTRE = """#!/bin/sh
[ "$3" = -u ] && printf '     /lustre/a-long-name-of-one\\n   20480*  10240   30720       - 812000  900000 1000000       -\\n'
[ "$3" = -g ] && echo '/lustre 4 0 0 - 3 0 0 -'
exit 0
"""


@pytest.fixture
def lfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command `lfs` that answers as Lustre's does."""
    (program := tmp_path / "lfs").write_text(LUSTRE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOGNAME", "ann")
    return program


def test_a_file_system_has_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = quota.lines([tmp_path, tmp_path / "a", tmp_path / "none", "\0"])
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path}: ")
    assert "inodes" in lines[0]
    assert "quota" not in lines[0]


def test_the_quota_of_lustre_is_in_it(tmp_path: Path, lfs: Path) -> None:
    assert quota.lustre_quotas(tmp_path) == [quota.Quota("user ann", 20480 * 1024, 10240 * 1024, 812000, 900000)]
    assert quota.lines([tmp_path])[0].endswith("; quota of user ann: 812,000 of 900,000 files, 21 MB of 10.5 MB used")


@pytest.mark.parametrize("text", ["#!/bin/sh\necho none\n", "#!/bin/sh\nexit 1\n", "no program"])
def test_another_answer_is_no_quota(tmp_path: Path, lfs: Path, text: str) -> None:
    lfs.write_text(text)
    assert quota.lustre_quotas(tmp_path) == []
