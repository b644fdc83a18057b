"""Files that appear whole or not at all, and output folders in which nothing of anybody else's is touched."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from multitrain.errors import ConfigError
from multitrain.files import InTheWayError, OutputFolder, output_file, replace_text, replacing, stamp


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


def test_a_name_as_long_as_a_disk_allows_can_be_replaced(tmp_path: Path) -> None:
    replace_text(tmp_path / ("n" * 255), "x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


@pytest.fixture
def umask() -> Iterator[None]:
    """The tests' own umask comes back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_umask_and_setgid_decide_mode_and_group_whatever_a_library_sets(
    tmp_path: Path, umask: None, mask: int, mode: int
) -> None:
    os.umask(mask)
    folder = tmp_path / "shared"
    folder.mkdir()
    group = 4242 if os.getuid() == 0 else os.getgid()
    os.chown(folder, -1, group)
    folder.chmod(0o2775)
    with output_file(folder / "below" / "a", "test") as temporary:
        temporary.unlink()  # as a library does that writes a private file and renames it
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        os.chown(temporary, -1, os.getgid())
    replace_text(folder / "b", "")
    for file in (folder / "below" / "a", folder / "b"):
        assert stat.S_IMODE(file.stat().st_mode) == mode
        assert file.stat().st_gid == group


# ---------------------------------------------------------------------------------------------------- output folders


def test_the_same_command_replaces_and_deletes_what_it_made_and_nothing_else(tmp_path: Path) -> None:
    first = OutputFolder(tmp_path / "out", "one")
    first.write_text("a.txt", "1")
    OutputFolder(tmp_path / "out", "one").write_text("a.txt", "2")
    assert (tmp_path / "out" / "a.txt").read_text() == "2"
    for maker, name in (("two", "a.txt"), ("one", "b.txt")):
        (tmp_path / "out" / "b.txt").write_text("mine")
        out = OutputFolder(tmp_path / "out", maker)
        for touch in (lambda: out.write_text(name, "x"), lambda: out.remove(name)):  # noqa: B023 (called at once)
            with pytest.raises(InTheWayError, match=f"{name} is in the way: {maker} did not write it"):
                touch()
    (tmp_path / "out" / "a.txt").write_text("edited by hand")
    with pytest.raises(InTheWayError, match="or it was changed since"):
        first.write_text("a.txt", "3")
    (tmp_path / "out" / "a.txt").write_text("2")
    assert first.remove("a.txt")
    assert not first.remove("a.txt")
    assert (tmp_path / "out" / "b.txt").read_text() == "mine"


def test_a_file_with_the_same_content_is_left_alone_whoever_made_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    before = (tmp_path / "a").stat()
    OutputFolder(tmp_path, "one").write_text("a", "same")
    assert (tmp_path / "a").stat() == before


def test_what_an_earlier_version_made_is_recognised_by_its_content_only_where_the_caller_says_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_text("header\nold")
    out = OutputFolder(tmp_path, "one")
    with pytest.raises(InTheWayError):
        out.write_text("a", "header\nnew")
    out.write_text("a", "header\nnew", recognise=lambda content: content.startswith(b"header\n"))
    assert (tmp_path / "a").read_text() == "header\nnew"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/x", "", ".", "a\0b", ".multitrain-files.jsonl"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        OutputFolder(tmp_path / "out", "one").write_text(name, "x")
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "out"])


def test_an_overlong_name_is_one_line(tmp_path: Path) -> None:
    for name in ("n" * 300, "/".join(["d" * 200] * 30)):
        with pytest.raises(ConfigError, match="cannot be written"):
            OutputFolder(tmp_path, "one").write_text(name, "x")


def test_no_link_below_the_folder_is_followed_or_replaced(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    (original / "v.mp4").write_text("precious")
    root = tmp_path / "out"
    root.mkdir()
    (root / "v.mp4").symlink_to(original / "v.mp4")
    (root / "folder").symlink_to(original)
    (root / "dangling").symlink_to(tmp_path / "nothing")
    (root / ".multitrain-files.jsonl").symlink_to(original / "v.mp4")
    out = OutputFolder(root, "one")
    for name in ("v.mp4", "folder/v.mp4", "folder/new", "dangling"):
        for touch in (out.check, out.remove, lambda n: out.write_text(n, "x"), out.target):
            with pytest.raises(InTheWayError, match="is a link"):
                touch(name)
    with pytest.raises(ConfigError, match="cannot be written"):
        out.write_text("plain", "x")
    assert (original / "v.mp4").read_text() == "precious"
    assert sorted(p.name for p in original.iterdir()) == ["v.mp4"]
    assert not (tmp_path / "nothing").exists()


def test_the_folder_itself_may_be_reached_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    OutputFolder(tmp_path / "home" / "out", "one").write_text("a", "x")
    assert (tmp_path / "disk" / "out" / "a").read_text() == "x"


def test_what_is_read_is_never_written(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "list.csv").write_text("x")
    sources = [tmp_path / "videos", tmp_path / "list.csv"]
    with pytest.raises(InTheWayError, match="is the input of one"):
        OutputFolder(tmp_path / "videos", "one", sources)
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    with pytest.raises(InTheWayError, match="is the input of one"):
        OutputFolder(tmp_path / "link", "one", sources)
    around = OutputFolder(tmp_path, "one", sources)
    for name in ("videos/new.mp4", "videos/below/new.mp4", "list.csv", "x/../videos/v.mp4"):
        with pytest.raises(InTheWayError, match="in the way"):
            around.target(name)
    OutputFolder(tmp_path / "videos" / "small", "one", sources).write_text("new.mp4", "x")


def test_a_hard_link_to_a_source_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("precious")
    (tmp_path / "out").mkdir()
    os.link(tmp_path / "v", tmp_path / "out" / "v")
    out = OutputFolder(tmp_path / "out", "one", [tmp_path / "v"])
    for touch in (out.remove, lambda n: out.write_text(n, "x")):
        with pytest.raises(InTheWayError, match="in the way"):
            touch("v")
    assert (tmp_path / "out" / "v").samefile(tmp_path / "v")


def test_a_folder_or_pipe_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "p")
    for name in ("a", "p"):
        with pytest.raises(InTheWayError, match=f"/{name} is in the way: it is not a regular file"):
            OutputFolder(tmp_path, "one").write_text(name, "x")
    with pytest.raises(ConfigError, match="is not a folder"):
        OutputFolder(tmp_path / "p", "one")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        OutputFolder(tmp_path, "one").write_text("file/below", "x")


KILLED = """
import os, sys
from pathlib import Path
import multitrain.files as f
out = f.OutputFolder(sys.argv[1], "one")
where, real = sys.argv[2], f._move
def die(*paths, **more):
    if where == "before":
        os.kill(os.getpid(), 9)
    real(*paths, **more)
    os.kill(os.getpid(), 9)
f._move = die
out.write_text("a", sys.argv[3])
"""


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("first", [None, "old"])
def test_a_kill_at_either_side_of_the_move_loses_nothing(tmp_path: Path, where: str, first: str | None) -> None:
    root = tmp_path / "out"
    if first is not None:
        OutputFolder(root, "one").write_text("a", first)
    command = [sys.executable, "-c", KILLED, str(root), where, "new"]
    assert subprocess.run(command, check=False).returncode == -9
    there = (root / "a").read_text() if (root / "a").exists() else None
    assert there == ("new" if where == "after" else first)
    OutputFolder(root, "one").write_text("a", "third")
    assert (root / "a").read_text() == "third"


def test_of_two_processes_that_write_at_once_the_last_one_counts_and_a_stranger_stays(tmp_path: Path) -> None:
    ours, part = OutputFolder(tmp_path, "one"), tmp_path / "part"
    for name, comes, stays in (("a", OutputFolder(tmp_path, "one"), False), ("b", OutputFolder(tmp_path, "two"), True)):
        part.write_text("late")

        def meanwhile(_: object, comes: OutputFolder = comes, name: str = name) -> None:
            comes.write_text(name, "early")

        if stays:
            with pytest.raises(InTheWayError, match="b is in the way"):
                ours.place(part, name, note=meanwhile)
        else:
            ours.place(part, name, note=meanwhile)
        assert (tmp_path / name).read_text() == ("early" if stays else "late")


def test_a_torn_or_hostile_record_makes_nothing_ours(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    made = stamp(tmp_path / "a")
    lines = [
        '{"name": "a", "by": "one", "bytes": 8}',
        '{"name": "a", "by": "one", "bytes": "8", "digest": null}',
        "[" * 100_000,
        json.dumps({"name": "a", "by": "two", **made}),
        json.dumps({"name": "a", "by": "one", **made}).removesuffix("}"),
    ]
    (tmp_path / ".multitrain-files.jsonl").write_text("\n".join(lines))
    out = OutputFolder(tmp_path, "one")
    with pytest.raises(InTheWayError):
        out.write_text("a", "x")
    out.write_text("b", "x")
    out.write_text("b", "y")
    assert OutputFolder(tmp_path, "one").remove("b")


@pytest.mark.parametrize("refused", ["the file in the making", "the record"])
def test_what_cannot_be_written_is_named_as_the_user_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Not by the name of a file in the making or of a record. The system's refusal is acted, since root is refused nothing."""
    system = os.open

    def no_new_files(path: str, flags: int, *more: int) -> int:
        made = ".multitrain-files" if refused == "the record" else ".multitrain-"
        if flags & os.O_CREAT and made in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return system(path, flags, *more)

    monkeypatch.setattr(os, "open", no_new_files)
    with pytest.raises(ConfigError) as caught:
        OutputFolder(tmp_path, "one").write_text("a.txt", "x")
    assert str(caught.value).startswith(str(tmp_path))
    assert ".multitrain" not in str(caught.value)
    assert os.strerror(errno.EROFS) in str(caught.value)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    for folder in ("/sys/zz", "/proc/self/zz"):
        with pytest.raises(ConfigError, match="cannot be written"):
            OutputFolder(folder, "one").write_text("a", "x")
        with pytest.raises(ConfigError), output_file(Path(folder) / "a.png", "one"):
            pass
