"""Runs and checkpoints of one user in the hands of another: used without a byte written into them, in every umask."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support, users

OTHER = 61999
"""The group of the folder that is shared."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with users.meeting_place() as place:
        yield place


@pytest.fixture
def desk(folder: Path) -> Iterator[Path]:
    """Bob's working folder."""
    place = folder / "bob"
    place.mkdir()
    os.chown(place, users.BOB, users.LAB)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def shared_run(tiny_data: Path, folder: Path) -> Path:
    """Alice's run, which the group may read and not write, as root's umask 022 leaves it."""
    shutil.copytree(tiny_data, folder / "data")
    run = support.write_random_run(folder)
    for place in (folder, *folder.rglob("*")):
        os.chown(place, users.ALICE, users.LAB)
        if place.is_dir():
            place.chmod(0o755)
    (folder / "data/stride").chmod(0o700)  # names of classes are looked for there, and need not be found
    return run


def everything(run: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in sorted(run.parent.rglob("*"))}


@pytest.mark.parametrize(("writable", "umask"), [(False, 0o077), (True, 0o002)], ids=["closed", "open"])
def test_another_users_run_is_used_and_not_written_into_and_files_have_the_mode_and_group_of_the_place(
    shared_run: Path, desk: Path, writable: bool, umask: int
) -> None:
    for place in (shared_run.parent, *shared_run.parent.rglob("*")):
        place.chmod(0o2775 if place.is_dir() and writable else 0o755 if place.is_dir() else 0o644)
    lab = desk / "lab"
    lab.mkdir()
    os.chown(lab, users.BOB, OTHER)
    lab.chmod(0o2777)
    before = everything(shared_run)
    run = str(shared_run)
    commands = [
        ["evaluate", run, "--dataset", "segment", "data.workers=0"],
        ["evaluate", run, "--dataset", "segment", "data.workers=0", "--out", "lab/test"],
        ["report", run, "--evaluation", "evaluation/tiny/update-00000001/test", "--clips", "0"],
        ["report", run, "--out", "lab/report", "--clips", "0"],
        ["export", run, "lab/export"],
        ["convert", run, "lab/a.safetensors"],
        ["convert", run, "lab/a.pyth"],
        ["compare", run, run],
        ["status", run],
    ]
    done = users.run_as(users.BOB, commands, desk, umask, heavy=True)
    assert done.returncode == 0, done.stderr
    assert everything(shared_run) == before
    assert (desk / "report/tiny/report.html").is_file()
    assert (desk / "evaluation/tiny/update-00000001/test/metrics.json").is_file()
    made = [p for p in lab.rglob("*") if p.is_file() and ".index" not in p.parts]
    assert len(made) > 10
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in made} == {p.name: oct(0o666 & ~umask) for p in made}
    assert {p.stat().st_gid for p in made} == {OTHER}


def verbs(run: str, data: str) -> dict[str, list[str]]:
    """Every verb that reads a run or data, on another user's."""
    clip = f"{data}/segment/v 0.mp4"
    return {
        "predict": [run, clip, "--top", "1", "--device", "cpu"],
        "predict --overlay": [run, clip, "--overlay", "seen.mp4", "--device", "cpu"],
        "embed": [run, clip, "--out", "clip.npz", "--device", "cpu"],
        "embed --dataset": [run, "--dataset", "segment", "--per-dataset", "2", "--out", "set.npz", "--device", "cpu"],
        "nearest": [run, "--plot", "heat.png"],
        "evaluate": [run, "--dataset", "segment", "data.workers=0"],
        "report": [run, "--out", "page", "--clips", "1"],
        "export": [run, "given"],
        "convert": [run, "a.safetensors"],
        "compare": [run, run],
        "status": [run],
        "status --runs": ["--runs", str(Path(run).parent)],
        "flops": [run],
        "data check": ["--run", run, "--out", "checked"],
        "data check FOLDER": [f"{data}/segment", "--out", "looked"],
        "data stats": ["--run", run, "--sample", "2", "--plot", "stats.png"],
        "data show": ["--run", run, "--videos", "2", "--out", "shown.png"],
        "data index": ["--run", run],
    }


def used(run: Path, data: Path, desk: Path, umask: int) -> dict[str, tuple[int, list[str]]]:
    """How each verb ends for Bob."""
    words = verbs(str(run), str(data))
    commands = [[*verb.partition(" --")[0].removesuffix(" FOLDER").split(), *rest] for verb, rest in words.items()]
    done = users.run_as(users.BOB, commands, desk, umask, heavy=True, each=True)
    return dict(zip(words, users.ends(done).values(), strict=True))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=lambda u: f"{u:03o}")
def test_every_verb_uses_another_users_run_and_data_without_writing_into_them(
    shared_run: Path, desk: Path, umask: int
) -> None:
    data = shared_run.parents[1] / "data"
    places = [shared_run.parent, *shared_run.parent.rglob("*"), data, *data.rglob("*")]
    for place in places:
        place.chmod(0o755 if place.is_dir() else 0o644)
    before = {p: p.stat().st_mtime_ns for p in places}
    found = used(shared_run, data, desk, umask)
    checked = {"data check": 1}  # the same videos are for training and for tests
    assert {verb: end for verb, end in found.items() if end[0] != checked.get(verb, 0)} == {}
    assert {
        p: p.stat().st_mtime_ns for p in (shared_run.parent, *shared_run.parent.rglob("*"), data, *data.rglob("*"))
    } == before
    made = [p for p in desk.rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in made} == {oct(0o666 & ~umask)}


def test_every_verb_says_in_a_line_which_folder_is_closed(shared_run: Path, desk: Path) -> None:
    data = shared_run.parents[1] / "data"
    shared_run.chmod(0o700)
    data.chmod(0o700)
    try:
        found = used(shared_run, data, desk, 0o022)
    finally:
        shared_run.chmod(0o755)
        data.chmod(0o755)
    for verb in ("status", "status --runs"):
        assert found.pop(verb) == (0, []), "shown as unreadable, beside the others"
    for verb, (status, lines) in found.items():
        assert status == 2, (verb, status, lines)
        assert len(lines) == 1, (verb, lines)
        assert str(shared_run.parents[1]) in lines[0], (verb, lines)
        assert "ermission denied" in lines[0] or "not be read" in lines[0], (verb, lines)
        if not verb.startswith("data"):
            assert f"{shared_run}: Permission denied; ask its owner" in lines[0], (verb, lines)
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize("verb", ["report", "evaluate", "export", "convert", "embed", "nearest"])
def test_a_folder_that_cannot_be_written_is_one_line(
    shared_run: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from multitrain.cli import main

    words = {
        "report": [str(shared_run), "--out", "/sys/zz", "--clips", "0"],
        "evaluate": [str(shared_run), "--dataset", "segment", "--out", "/sys/zz"],
        "export": [str(shared_run), "/sys/zz"],
        "convert": [str(shared_run), "/sys/zz.pyth"],
        "embed": ["none.mp4", "--checkpoint", str(shared_run), "--out", "/sys/zz/a.npz"],
        "nearest": [str(shared_run), "--plot", "/sys/zz/a.png"],
    }[verb]
    assert main([verb, *words]) == 2
    said = capsys.readouterr().err
    assert "/sys" in said
    assert len(said.strip().splitlines()) == 1, said
