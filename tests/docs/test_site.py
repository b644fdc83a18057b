"""The site builds without a warning and without a network, and what is made from the code is current."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from multitrain.config import reference
from multitrain.config.schema import fields
from tests import support


def test_the_configuration_reference_is_that_of_the_schema(root: Path) -> None:
    written = (root / "docs/configuration.md").read_text()
    assert written == reference.reference(), "python -m multitrain.config.reference docs/configuration.md"


def test_every_option_is_in_the_reference_with_a_description() -> None:
    text = reference.reference()
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| (.*) \|$", text, re.MULTILINE))
    leaves = [f for f in fields() if not any(o.startswith(f"{f}.") for o in fields())]
    assert set(leaves) <= set(rows)
    assert [name for name in leaves if len(rows[name]) < 5] == []


def test_the_site_builds_strictly_without_a_network(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    if shutil.which("unshare") and os.geteuid() == 0:
        probe = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
        command = ["unshare", "-n", *command] if probe.returncode == 0 else command
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "site/search/search_index.json").read_text())["docs"]
    for words in ("GraceTime", "cluster.lead_time", "PySlowFast", "aarch64"):
        assert any(words in entry["text"] or words in entry["title"] for entry in found), words
    for page in (root / "docs").rglob("*.md"):
        assert (tmp_path / "site" / page.relative_to(root / "docs")).with_suffix(".html").is_file()
    start = (tmp_path / "site/index.html").read_text()
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)[^"]*\.(?:js|css|woff2?)', start)
    scripts = re.findall(r'<script[^>]* src="?([^">]*)', start)
    assert "assets/iframe-worker.js" in scripts
    assert not [source for source in scripts if "://" in source]
    dom = support.browse(tmp_path / "site/index.html", tmp_path, query="?q=preemption")
    assert re.search(r'md-search-result__meta">\s*\d+ matching', dom), "the search works in pages opened as files"
