"""Guarantee 9 with hostile layouts: links, hard links, folders and foreign files where the commands write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from multitrain.cli import main
from tests import support


@pytest.fixture(scope="module")
def home(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/tiny` with a checkpoint, `data`, and `precious`: a folder that no command may touch."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "data").symlink_to(tiny_data)
    support.write_random_run(folder)
    (folder / "precious").mkdir()
    (folder / "precious" / "file").write_text("precious")
    return folder


def tree(*roots: Path) -> dict[Path, tuple[object, ...]]:
    """Every file, folder and link below, with what tells whether it was touched."""
    found: dict[Path, tuple[object, ...]] = {}
    for root in roots:
        for path in (root, *sorted(root.rglob("*"))):
            held = os.lstat(path)
            if path.is_symlink():
                found[path] = ("link", os.readlink(path))
            else:
                found[path] = (held.st_ino, path.read_bytes()) if path.is_file() else (held.st_ino,)
    return found


def _link(target: Path, home: Path) -> None:
    target.symlink_to(home / "precious" / "file")


def _dangling(target: Path, home: Path) -> None:
    target.symlink_to(home / "precious" / "new")


def _hard(target: Path, home: Path) -> None:
    os.link(home / "precious" / "file", target)


def _foreign(target: Path, home: Path) -> None:
    target.write_text("somebody's")


def _folder(target: Path, home: Path) -> None:
    target.mkdir()
    (target / "inside").write_text("somebody's")


def _link_to_folder(target: Path, home: Path) -> None:
    target.symlink_to(home / "precious")


def _pipe(target: Path, home: Path) -> None:
    os.mkfifo(target)


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    "a link to a file": _link,
    "a link to nothing": _dangling,
    "a hard link": _hard,
    "a foreign file": _foreign,
    "a folder": _folder,
    "a link to a folder": _link_to_folder,
    "a pipe": _pipe,
}
"""What stands where a command wants to write."""

COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "embed": lambda home, out: ["embed", f"{home}/runs/tiny", f"{home}/data/stride/v 0.mp4", "--out", f"{out}.npz"],
    "embed --plot": lambda home, out: [
        *("embed", f"{home}/runs/tiny", f"{home}/data/stride/v 0.mp4", f"{home}/data/stride/v 1.mp4"),
        *("--out", f"{out.parent}/other.npz", "--plot", f"{out}.png"),
    ],
    "nearest": lambda home, out: ["nearest", f"{home}/runs/tiny", "--plot", f"{out}.png"],
    "overlay": lambda home, out: [
        *("predict", f"{home}/runs/tiny", f"{home}/data/stride/v 0.mp4", "--overlay", f"{out}.mp4", "--device", "cpu"),
    ],
    "report": lambda home, out: [
        "report",
        f"{home}/runs/tiny",
        "--out",
        f"{out.parent}/report.html/..",
        "--clips",
        "0",
    ],
    "data stats": lambda home, out: [
        "data",
        "stats",
        "--run",
        f"{home}/runs/tiny",
        "--sample",
        "1",
        "--plot",
        f"{out}.png",
    ],
    "data show": lambda home, out: [
        "data",
        "show",
        "--run",
        f"{home}/runs/tiny",
        "--videos",
        "2",
        "--out",
        f"{out}.png",
    ],
    "convert": lambda home, out: ["convert", f"{home}/runs/tiny", f"{out}.pyth"],
}
ENDINGS = {"embed": "out.npz", "overlay": "out.mp4", "report": "report.html", "convert": "out.pyth"}


@pytest.mark.filterwarnings("ignore:.*the published code builds")
@pytest.mark.parametrize("command", COMMANDS)
def test_what_stands_where_a_command_writes_stays_and_is_named(
    home: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(home / "runs" / "tiny", home / "precious")
    for layout, make in LAYOUTS.items():
        desk = tmp_path / layout.replace(" ", "-")
        desk.mkdir()
        target = desk / ENDINGS.get(command, "out.png")
        make(target, home)
        held = os.lstat(target)
        words = COMMANDS[command](home, desk / "out")
        if command == "report":
            words[3] = str(desk)
        if command == "overlay" and target.is_dir():
            continue  # a folder for the videos
        status = main(words)
        said = capsys.readouterr().err.strip()
        assert status == 2, (layout, said)
        assert len([line for line in said.splitlines() if not line.startswith("note:")]) == 1, (layout, said)
        assert str(target) in said or target.name in said, (layout, said)
        after = os.lstat(target)
        assert (held.st_ino, held.st_mode, held.st_nlink) == (after.st_ino, after.st_mode, after.st_nlink), layout
    assert tree(home / "runs" / "tiny", home / "precious") == before


@pytest.mark.filterwarnings("ignore:.*the published code builds")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "report"])
def test_over_a_linked_folder_only_new_files_are_made(home: Path, tmp_path: Path, command: str) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "theirs").write_text("theirs")
    (tmp_path / "desk").symlink_to(away)
    assert main(COMMANDS[command](home, tmp_path / "desk" / "out")) == 0
    assert (away / "theirs").read_text() == "theirs"
    assert (tmp_path / "desk").is_symlink()


RUNS_OWN = ("checkpoints", "checkpoints/update-00000099", "checkpoints/update-00000001", "logs", "lease/new")
"""Folders that a run writes, there or not: no command writes there what a user asks for."""
BESIDE = ("", "new", "evaluation/new")
"""Other folders of a run, in which no model is written; a figure may be."""
MODELS = ("convert to a folder", "convert to .safetensors", "export")

OTHERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "convert to a folder": lambda home, out: ["convert", f"{home}/runs/tiny", str(out.parent)],
    "convert to .safetensors": lambda home, out: ["convert", f"{home}/runs/tiny", f"{out}.safetensors"],
    "export": lambda home, out: ["export", f"{home}/runs/tiny", str(out.parent)],
    "overlay folder": lambda home, out: [
        *("predict", f"{home}/runs/tiny", f"{home}/data/stride/v 0.mp4", f"{home}/data/stride/v 1.mp4"),
        *("--overlay", str(out), "--device", "cpu"),
    ],
    "data check": lambda home, out: ["data", "check", f"{home}/data/stride", "--out", str(out.parent)],
    "data check --write-clean": lambda home, out: [
        *("data", "check", "--run", f"{home}/runs/tiny", "--out", f"{home}/checked", "--write-clean", str(out.parent)),
    ],
    "data resize": lambda home, out: ["data", "resize", f"{home}/data/stride", str(out.parent)],
}


@pytest.mark.filterwarnings("ignore:.*the published code builds")
@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS])
def test_nothing_is_written_into_a_run(
    home: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as it is and over a link to it; figures and tables go beside the run's own files, never among them."""
    monkeypatch.chdir(tmp_path)
    run = home / "runs" / "tiny"
    (tmp_path / "over").symlink_to(run)
    before = tree(run, home / "precious")
    for place in (
        root / part for part in (*RUNS_OWN, *(BESIDE if command in MODELS else ())) for root in (run, tmp_path / "over")
    ):
        words = (COMMANDS | OTHERS)[command](home, place / "out")
        if command == "report":
            words[3] = str(place)
        status = main(words)
        said = capsys.readouterr().err.strip()
        assert status == 2, (place, said)
        assert "never written into" in said, (place, said)
        assert len(said.splitlines()) == 1, (place, said)
        assert tree(run, home / "precious") == before, place


def test_a_figure_may_lie_beside_a_runs_own_files(home: Path) -> None:
    out = home / "runs" / "tiny" / "figures" / "out"
    assert main(COMMANDS["nearest"](home, out)) == 0
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "a link to a folder"])
def test_clean_annotations_leave_what_stands_in_their_place(home: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "clean" / "stride" / "train.csv"
    target.parent.mkdir(parents=True)
    LAYOUTS[layout](target, home)
    held, before = os.lstat(target), tree(home / "precious")
    words = ["data", "check", "--run", f"{home}/runs/tiny", "--out", str(tmp_path / "checked"), "--workers", "1"]
    assert main([*words, "--write-clean", str(tmp_path / "clean")]) == 2
    assert (held.st_ino, held.st_nlink) == (os.lstat(target).st_ino, os.lstat(target).st_nlink)
    assert tree(home / "precious") == before


def test_a_folder_of_clean_annotations_that_is_the_annotations_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clean").mkdir()
    for name in support.TINY_CLASSES:
        (tmp_path / "clean" / name).symlink_to(home / "data" / name)
    before = tree((home / "data").resolve())
    words = ["data", "check", "--run", f"{home}/runs/tiny", "--out", str(tmp_path / "checked"), "--workers", "1"]
    for clean in (home / "data", tmp_path / "clean"):
        assert main([*words, "--write-clean", str(clean)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) <= 2
    assert tree((home / "data").resolve()) == before


def test_two_outputs_of_a_command_are_two_files(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    words = ["embed", f"{home}/runs/tiny", f"{home}/data/stride/v 0.mp4", "--out", f"{tmp_path}/a.npz", "--plot"]
    for other in (f"{tmp_path}/a.npz", f"{tmp_path}/link/./a.npz"):
        assert main([*words, other]) == 2
        assert "--out and --plot are one file" in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()


FOREIGN = {
    "config.json": '{"architectures": ["SomebodyElses"]}',
    "optimizer.safetensors": "somebody's",
    "README.md": "# My project\n",
}


@pytest.mark.parametrize("verb", ["convert", "export"])
@pytest.mark.parametrize("name", FOREIGN)
def test_force_replaces_what_such_a_command_made_and_nothing_else(
    home: Path, tmp_path: Path, verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    target = out / "model.safetensors" if verb == "convert" else out
    assert main([verb, f"{home}/runs/tiny", str(target), "--force"]) == 0
    assert main([verb, f"{home}/runs/tiny", str(target), "--force"]) == 0, "its own files"
    if (verb, name) in (("convert", "README.md"), ("export", "optimizer.safetensors")):
        return  # no file that it writes
    (out / name).write_text(FOREIGN[name])
    capsys.readouterr()
    assert main([verb, f"{home}/runs/tiny", str(target), "--force"]) == 2
    assert name in capsys.readouterr().err
    assert (out / name).read_text() == FOREIGN[name]
    (out / name).unlink()
    (out / name).symlink_to(home / "precious" / "file")
    assert main([verb, f"{home}/runs/tiny", str(target), "--force"]) == 2
    assert (home / "precious" / "file").read_text() == "precious"


def test_a_link_to_a_folder_is_exported_into_only_where_it_is_empty_or_an_exports(home: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "model.safetensors").write_text("somebody's")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert main(["export", f"{home}/runs/tiny", str(tmp_path / "link"), "--force"]) == 2
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "real" / "model.safetensors").read_text() == "somebody's"
