"""Guarantee 9 where a run's folder is made: links, files and foreign folders in its place, or within it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import yaml

from launch.run_folder import claimed, compose_run, write
from launch.submit import main
from multitrain import lease
from multitrain.config import ConfigError


@pytest.fixture(autouse=True)
def precious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's folder beside the working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "precious"
    folder.mkdir()
    for name in ("file", "00000001.json", "00000001.over", "d.txt", "config.yaml.bak"):
        (folder / name).write_text("precious")
    return folder


def untouched(folder: Path) -> bool:
    return len(list(folder.iterdir())) == 5 and all(p.read_text() == "precious" for p in folder.iterdir())


def words(*more: str) -> list[str]:
    return ["experiment=demo", "name=r", "gpus=1", "cluster=local", *more]


@pytest.mark.parametrize("layout", ["file", "link to a file", "link to a folder", "dangling link", "foreign folder"])
def test_what_stands_in_the_place_of_a_new_run_stays(precious: Path, layout: str) -> None:
    place = Path("runs/r")
    place.parent.mkdir()
    if layout == "file":
        place.write_text("mine")
    elif layout == "foreign folder":
        place.mkdir()
        (place / "mine").write_text("mine")
    else:
        place.symlink_to(
            precious / {"link to a file": "file", "link to a folder": ".", "dangling link": "none"}[layout]
        )
    before = sorted((p, os.lstat(p).st_ino) for p in Path("runs").rglob("*"))
    with pytest.raises(ConfigError) as caught:
        write(compose_run(words()))
    assert "\n" not in str(caught.value)
    assert sorted((p, os.lstat(p).st_ino) for p in Path("runs").rglob("*")) == before
    assert untouched(precious)


ODD_NAMES = (".", "..", "'.'", '"."', "...", "./", ".index", "-x", "a/b", "a b", "~", "x" * 243, "ü")


@pytest.mark.parametrize("name", [*ODD_NAMES, "x" * 300, "x" * 9000])
def test_a_name_that_is_no_folders_is_refused_before_any_path_is_made_of_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(), f"name={name}", "updates=1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "name" in said
    assert len(said) < 300, "a long name is cut"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "a b",
            "'a b' is neither an option (key=value) nor a run in {runs}; did you mean 'a-b'?; name=NAME starts a new run",
        ),
        (
            "",
            "'' is neither an option (key=value) nor a run in {runs}; known here: a-b, std2; name=NAME starts a new run",
        ),
        ("${seed}", "known here: a-b, std2; name=NAME starts a new run"),
        ("std3", "did you mean 'std2'?; name=std3 starts a new run"),
        ("x" * 300, "File name too long"),
        ("dry_run", "'dry_run' is an option, which needs a value; write dry_run=true"),
        ("nodes", "write nodes=VALUE"),
        ("optim.lr", "write optim.lr=VALUE"),
    ],
)
def test_a_word_that_is_no_run_is_answered_with_what_can_be_typed(
    word: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("std2", "a-b"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").touch()
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert says.format(runs=Path("runs").absolute()) in said
    assert said.count("\n") == 1


def test_the_longest_name_is_that_of_a_folder_that_can_be_made() -> None:
    write(compose_run([*words()[:1], "gpus=1", "cluster=local", "name=" + "x" * 242]))
    assert [p.name for p in Path("runs").iterdir()] == ["x" * 242]


@pytest.mark.parametrize("option", ["runs=", "--config-dir=", "data=", "init_from=", "data.root=", "experiment="])
@pytest.mark.parametrize("text", ["x" * 300, "/".join("x" * 3000)], ids=["a long name", "a long path"])
def test_a_path_that_the_system_refuses_is_one_line(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(), "dry_run=true", option + text]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: "), said


@pytest.mark.parametrize("runs", ["checkpoints", "evaluation", "checkpoints/update-00000009"])
def test_no_run_is_made_within_another(runs: str) -> None:
    write(compose_run(words()))
    before = sorted(Path("runs/r").rglob("*"))
    with pytest.raises(ConfigError, match="never written into"):
        compose_run(["experiment=demo", "gpus=1", "cluster=local", f"runs=runs/r/{runs}", "name=update-00000007"])
    assert sorted(Path("runs/r").rglob("*")) == before


@pytest.mark.parametrize("name", ["class_names", "code", "logs", "config.yaml", "overrides.yaml", "env.txt", "STOP"])
def test_a_link_within_a_run_that_is_submitted_again_leads_nothing_out(precious: Path, name: str) -> None:
    first = compose_run(words())
    write(first)
    place = first.path / name
    if place.is_dir():
        for file in sorted(place.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        place.rmdir()
    content = place.read_text() if place.is_file() else None
    place.unlink(missing_ok=True)
    target = precious / "file"
    if content is not None:  # readable as it was
        (precious.parent / "moved").write_text(content)
        target = precious.parent / "moved"
    place.symlink_to(precious if name in ("class_names", "code", "logs") else target)
    with contextlib.suppress(ConfigError):
        write(compose_run(words()))
    assert untouched(precious)
    if content is not None:
        assert target.read_text() == content


def test_a_lease_is_never_taken_over_a_link(precious: Path) -> None:
    first = compose_run(words())
    write(first)
    (first.path / lease.FOLDER).symlink_to(precious)
    with pytest.raises(ConfigError, match="is a link"), claimed(first.path):
        pass
    assert untouched(precious)
    (first.path / lease.FOLDER).unlink()
    (first.path / lease.FOLDER).mkdir()
    (first.path / lease.FOLDER / "00000001.over").symlink_to(precious / "new")
    with pytest.raises(ConfigError, match=r"00000001\.over"), claimed(first.path):
        pass
    assert untouched(precious)


def test_a_snapshot_follows_no_link_out(precious: Path) -> None:
    (precious.parent / "mine/data").mkdir(parents=True)
    (precious.parent / "mine/data/own.yaml").symlink_to(precious / "file")
    (precious.parent / "mine/experiment").symlink_to(precious)
    run = compose_run(words(), config_dirs=[str(precious.parent / "mine")])
    write(run)
    copied = [
        p for p in run.path.rglob("*") if p.is_file() and p.stat().st_size < 100 and p.read_bytes() == b"precious"
    ]
    assert copied == []
    assert yaml.safe_load((run.path / "config.yaml").read_text())["name"] == "r"
