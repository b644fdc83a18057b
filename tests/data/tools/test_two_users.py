"""Two users, by their real numbers, share a folder of videos, its copies, findings and index, with either umask."""

from __future__ import annotations

import os
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support import write_video

from multitrain.cli import main
from multitrain.data.annotations import Syntax
from multitrain.data.index import ensure_index

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users"),
    pytest.mark.usefixtures("in_this_process"),
]

ALICE, BOB, LAB = 61001, 61002, 61000


class Said(NamedTuple):
    """The end of a command, and all that it printed."""

    status: int
    text: str


def by(user: int, umask: int, action: Callable[[], int], folder: Path) -> Said:
    """`action` in a child process that is `user`, of the group :data:`LAB`."""
    log = folder / f"said-{os.urandom(4).hex()}"
    if (child := os.fork()) == 0:
        status = 99
        try:
            with open(log, "w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                os.setgroups([])
                os.setgid(LAB)
                os.setuid(user)
                os.umask(umask)
                status = action()
        except SystemExit as end:
            status = int(str(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = Said(status, log.read_text())
    assert "Traceback" not in said.text, said.text
    return said


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder of Alice's with videos, which pytest's own private folders let everybody through to."""
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == 0 and str(place) not in ("/", "/tmp"):
            place.chmod(place.stat().st_mode | 0o055)
    folder = tmp_path / "lab"
    (folder / "videos").mkdir(parents=True)
    for number in range(4):
        write_video(folder / "videos" / f"v{number}.mp4", number, frames=8)
    (folder / "train.csv").write_text("".join(f"v{n}.mp4 0\n" for n in range(4)))
    for place in (folder, *folder.rglob("*")):
        os.chown(place, ALICE, LAB)
        place.chmod(0o755 if place.is_dir() else 0o644)
    warm = tmp_path / "warm"  # all imports are done before anybody loses the right to read the interpreter's files
    for verb in (["check", str(folder / "videos")], ["resize", str(folder / "videos")]):
        main(["data", verb[0], verb[1], *(["--out"] if verb[0] == "check" else []), str(warm / verb[0])])
    ensure_index(folder / "train.csv", Syntax(b" ", False), warm / "index")
    return folder


def open_for_the_group(folder: Path) -> None:
    for place in (folder, *folder.rglob("*")):
        if place.is_dir():
            place.chmod(0o2775)


def made_below(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def resize(lab: Path, shard: str) -> int:
    return main(["data", "resize", str(lab / "videos"), str(lab / "small"), "--preset", "ultrafast", "--shard", shard])


def check(lab: Path, shard: str) -> int:
    return main(["data", "check", str(lab / "videos"), "--out", str(lab / "checked"), "--shard", shard])


@pytest.mark.parametrize("verb", [resize, check])
def test_a_group_shares_the_work_where_the_folder_is_open_to_it(
    lab: Path, tmp_path: Path, verb: Callable[[Path, str], int]
) -> None:
    open_for_the_group(lab)
    tmp_path.chmod(0o777)
    users = [ALICE, BOB]
    for shard, user in enumerate(users):
        assert by(user, 0o002, lambda shard=shard: verb(lab, f"{shard}/2"), tmp_path).status == 0  # type: ignore[misc]
    for user in users:  # each replaces the table of the other
        assert by(user, 0o002, lambda: verb(lab, "0/1"), tmp_path).status == 0
    folder = lab / ("small" if verb is resize else "checked")
    made = made_below(folder)
    assert len(made) >= 4
    assert {(stat.S_IMODE(p.stat().st_mode), p.stat().st_gid) for p in made} == {(0o664, LAB)}
    assert {p.stat().st_uid for p in made} == {ALICE, BOB}
    assert not [p for p in made if p.name.endswith(".tmp") or p.name.startswith("part-")]


@pytest.mark.parametrize("verb", [resize, check])
def test_a_folder_that_is_not_open_is_one_line_and_stays(
    lab: Path, tmp_path: Path, verb: Callable[[Path, str], int]
) -> None:
    tmp_path.chmod(0o777)
    assert by(ALICE, 0o022, lambda: verb(lab, "0/1"), tmp_path).status == 0
    before = {p: p.stat().st_mtime_ns for p in lab.rglob("*")}
    assert {stat.S_IMODE(p.stat().st_mode) for p in made_below(lab)} == {0o644}
    (lab / "videos" / "v9.mp4").write_bytes((lab / "videos" / "v0.mp4").read_bytes())
    said = by(BOB, 0o022, lambda: verb(lab, "0/2"), tmp_path)
    assert said.status == 2
    assert len(said.text.strip().splitlines()) == 1
    assert str(lab) in said.text
    assert {p: p.stat().st_mtime_ns for p in before if p != lab / "videos"} == {
        p: t for p, t in before.items() if p != lab / "videos"
    }


def test_private_videos_and_folders_are_named(lab: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    open_for_the_group(lab)
    (lab / "videos" / "v1.mp4").chmod(0o600)
    said = by(BOB, 0o002, lambda: check(lab, "0/1"), tmp_path)
    assert said.status == 1
    assert "v1.mp4" in said.text
    assert "Permission denied" in said.text
    (lab / "videos" / "v1.mp4").chmod(0o644)
    said = by(BOB, 0o002, lambda: check(lab, "0/1"), tmp_path)
    assert said.status == 0, "nothing was wrong with the file itself"
    (lab / "videos").chmod(0o700)
    for verb in (check, resize):
        said = by(BOB, 0o002, lambda verb=verb: verb(lab, "0/1"), tmp_path)  # type: ignore[misc]
        assert said.status == 2
        assert len(said.text.strip().splitlines()) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664)])
def test_an_index_is_made_by_one_and_used_by_all(lab: Path, tmp_path: Path, umask: int, mode: int) -> None:
    tmp_path.chmod(0o777)
    if umask == 0o002:
        open_for_the_group(lab)
    os.utime(lab / "train.csv", (1, 1))

    def use(name: str = "train.csv") -> int:
        return len(ensure_index(lab / name, Syntax(b" ", False), lab / "index").name) and 0

    assert by(ALICE, umask, use, tmp_path).status == 0
    made = made_below(lab / "index")
    assert {stat.S_IMODE(p.stat().st_mode) for p in made} == {mode}
    assert {p.stat().st_gid for p in made} == {LAB}
    before = {p: p.stat().st_mtime_ns for p in made}
    (lab / "copy.csv").write_bytes(
        (lab / "train.csv").read_bytes()
    )  # the same content: the index is there, its note is not
    os.utime(lab / "copy.csv", (1, 1))
    for name in ("train.csv", "copy.csv"):
        assert by(BOB, umask, lambda name=name: use(name), tmp_path).status == 0  # type: ignore[misc]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    (lab / "other.csv").write_text("v1.mp4 1\n")
    command = main if umask == 0o002 else _refused(use)
    assert by(BOB, umask, (lambda: use("other.csv")) if command is main else command, tmp_path).status == 0


def _refused(use: Callable[[str], int]) -> Callable[[], int]:
    """An index that cannot be written is one line."""

    def run() -> int:
        from multitrain.data.annotations import CatalogError

        try:
            use("other.csv")
        except CatalogError as error:
            return int("\n" in str(error) or "cannot be written (Permission denied)" not in str(error))
        return 1

    return run
