"""What is measured is the CPU time of the variant alone, in a process set up as its own; footage is what it is said to be."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks import footage
from benchmarks.measure import take_turns_apart
from tests.data.numbered import write_numbered


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_each_variant_has_its_process_its_preparation_and_its_time(tmp_path: Path) -> None:
    state: list[str] = []

    def note(name: str, seconds: float) -> None:
        burn(seconds)
        with open(tmp_path / name, "a") as file:
            file.write(f"{os.getpid()} {state}\n")

    variants = {
        "long": (lambda _: note("long", 0.2), lambda: state.append("prepared")),
        "short": (lambda _: note("short", 0.02), None),
    }
    took = take_turns_apart(variants, 2)
    assert [len(t) for t in took.values()] == [2, 2]
    assert min(took["long"]) >= 0.2
    assert min(took["short"]) < min(took["long"])
    long, short = ((tmp_path / n).read_text().split("\n")[:-1] for n in variants)
    assert len(long) == len(short) == 3  # two rounds and a warm-up
    assert len({*long}) == len({*short}) == 1
    assert long[0].endswith("['prepared']")
    assert short[0].endswith("[]")
    assert len({os.getpid(), int(long[0].split()[0]), int(short[0].split()[0])}) == 3
    assert state == []


def test_a_measured_process_that_ends_ends_the_benchmark(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_: int) -> None:
        raise ValueError("what went wrong")

    with pytest.raises(SystemExit, match="has ended"):
        take_turns_apart({"bad": (fail, None)}, 1)
    assert "what went wrong" in capfd.readouterr().err


def test_videos_of_a_folder_are_spread_over_it_and_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(6):
        write_numbered(tmp_path / f"{n}.mp4", 4)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("no video either")
    assert [p.name for p in footage.real(tmp_path, 3)] == ["0.mp4", "4.mp4"]
    assert "2.mp4" in capsys.readouterr().err
    assert footage.described(footage.real(tmp_path, 9)) == "5 videos (mp4), 96×64, 30 fps, 0.133 s"


@pytest.mark.parametrize(
    ("files", "reason"), [(None, "no such folder"), ([], "no video file"), (["a.mp4"], "none of 1 files")]
)
def test_a_folder_without_videos_is_one_line(tmp_path: Path, files: list[str] | None, reason: str) -> None:
    folder = tmp_path / "videos"
    for name in files or []:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no video")
    if files is not None:
        folder.mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=reason) as ended:
        footage.real(folder, 4)
    assert "\n" not in str(ended.value)
