"""Troubleshooting quotes messages that the code really says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

NOT_OURS = {"Reason=BeginTime"}


def messages(root: Path) -> list[str]:
    """Every text in the code, with `…` for what an f-string fills in."""
    found = []
    for file in [*root.glob("multitrain/**/*.py"), *root.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(root: Path) -> list[str]:
    return re.findall(r"^### `(.*)`$", (root / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def is_said(message: str, said: list[str]) -> bool:
    """Whether one text of the code has the fixed parts of the message, in order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip()), re.DOTALL)
    return any(pattern.search(text) for text in said)


def test_every_quoted_message_is_in_the_code(root: Path) -> None:
    said, entries = messages(root), quoted(root)
    assert len(entries) > 20
    assert [e for e in entries if e not in NOT_OURS and not is_said(e, said)] == []


@pytest.mark.parametrize("changed", ["SLURM declined the job: …", "no runs here; name a run's folder"])
def test_a_message_that_nobody_says_is_noticed(root: Path, changed: str) -> None:
    assert not is_said(changed, messages(root))


def test_every_entry_says_what_to_do(root: Path) -> None:
    text = (root / "docs/troubleshooting.md").read_text()
    for entry in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        head, _, body = entry.partition("\n")
        assert len(body.split("##")[0].strip()) > 20, head
