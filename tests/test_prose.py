"""The words that docs/contributing.md lists as dropped do not come back into code or documentation."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("multitrain/**/*.py", "launch/**/*.py", "launch/**/*.sh", "docs/**/*.md")


def section() -> str:
    """The part of docs/contributing.md with the table of dropped words."""
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    return text.partition("\n## Words\n")[2].partition("\n## ")[0]


def dropped() -> list[str]:
    """The dropped words, from the first column of the table."""
    rows = re.findall(r"^\| (.+?) \|", section(), re.MULTILINE)
    return [word for row in rows if row not in ("dropped", "---") for word in row.split(", ")]


def test_dropped_words_stay_out_of_code_and_documentation() -> None:
    words = dropped()
    assert len(words) > 15
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    found = []
    for file in sorted(file for glob in SOURCES for file in ROOT.glob(glob)):
        text = file.read_text(encoding="utf-8").replace(section(), "")
        found += [
            f"{file.relative_to(ROOT)}:{number}: {match[0]!r}"
            for number, line in enumerate(text.splitlines(), 1)
            for match in pattern.finditer(line)
        ]
    assert not found, "use the words of docs/contributing.md instead:\n" + "\n".join(found)
