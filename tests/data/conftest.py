"""Video files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.numbered import LENGTHS, write_numbered


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three datasets of `support.settings`: csvs beside H.264 files of 1 to 40 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number, (name, classes, count) in enumerate((("stride", 5, 11), ("segment", 3, 7), ("with.dot", 4, 6))):
        lines = []
        for i in range(count):
            path = f"class {i % classes}/v{i}.mp4"
            write_numbered(folder / name / path, LENGTHS[i % len(LENGTHS)], tint=50 * number + 7 * i)
            lines.append(f"{path} {i % classes}\n")
        for split in ("train", "val", "test"):
            (folder / name / f"{split}.csv").write_text("".join(lines))
    return folder
