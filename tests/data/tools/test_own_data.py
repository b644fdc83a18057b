"""One's own videos: class folders, tables and lists of other projects become a dataset, whose splits stay as they are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from multitrain.cli import main
from multitrain.config import compose
from multitrain.config.class_names import read_class_names
from multitrain.data.annotations import CatalogError
from multitrain.data.tools.importing import Sample
from multitrain.data.tools.splitting import UNSPLIT, Division, by_pattern, divide, position


def tree(top: Path, names: Sequence[str]) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"video")
    return top


def run(*words: object) -> int:
    return main(["data", "import", *map(str, words)])


def splits(out: Path) -> dict[str, str]:
    """The split of each path; with test.csv a copy of val.csv, that of val."""
    found: dict[str, str] = {}
    for split in ("train", "val", "test"):
        file = out / f"{split}.csv"
        for line in file.read_text().splitlines() if file.is_file() else []:
            found.setdefault(line.rpartition(" ")[0], split)
    return found


def unsplit(names: Sequence[str], label: str = "a") -> list[Sample]:
    return [Sample(UNSPLIT, name, (label,)) for name in names]


# ------------------------------------------------------------------------------------------------------------ division


def test_an_added_file_moves_no_other() -> None:
    names = [f"class {i % 50}/video {i}.mp4" for i in range(10_000)]
    samples = [Sample(UNSPLIT, name, (name.split("/")[0],)) for name in names]
    before = {s.path: s.split for s in divide(samples[:9_000], Division()).samples}
    after = {s.path: s.split for s in divide([*samples[9_000:], *samples[:9_000]], Division()).samples}
    assert {path: after[path] for path in before} == before
    counts = [list(after.values()).count(split) / 10_000 for split in ("train", "val", "test")]
    assert counts == pytest.approx([0.7, 0.15, 0.15], abs=0.015)


def test_a_class_with_one_video_trains_on_it_and_keeps_it_when_others_come() -> None:
    names = [f"v{i}.mp4" for i in range(200)]
    tested = next(n for n in names if Division().of(n) == "test")
    alone = divide(unsplit([tested]), Division())
    assert alone.samples[0].split == "train"
    assert alone.kept == [tested]
    trained = next(n for n in names if Division().of(n) == "train")
    again = divide(unsplit([tested, trained]), Division(kept=alone.kept))
    assert {s.split for s in again.samples} == {"train"}
    assert again.kept == [tested]


def test_a_group_is_in_one_split() -> None:
    names = [f"{label}/person{p:02d}_{i}.mp4" for label in "abc" for p in range(30) for i in range(4)]
    group = by_pattern("(person[0-9]+)")
    samples = [Sample(UNSPLIT, n, (n[0],)) for n in names]
    placed = divide(samples, Division(), {n: group(n) for n in names}).samples
    assert len({(group(s.path), s.split) for s in placed}) == 30
    assert {s.split for s in placed} == {"train", "val", "test"}


def test_videos_of_a_group_in_two_given_splits_are_refused() -> None:
    samples = [Sample("train", "p1_a.mp4", ("x",)), Sample("val", "p1_b.mp4", ("x",))]
    with pytest.raises(CatalogError, match=r"group 'p1' is in train .* and in val"):
        divide(samples, Division(), {"p1_a.mp4": "p1", "p1_b.mp4": "p1"})


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "no regular expression"), ("person", "0 groups"), ("(a)(b)", "2 groups"), ("(zebra)", "nothing in 'v.mp4'")],
)
def test_a_wrong_pattern_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(CatalogError, match=said):
        by_pattern(pattern)("v.mp4")


def test_the_hash_never_changes() -> None:
    """Another value would divide everybody's videos anew."""
    assert position("a/b.mp4") == pytest.approx(POSITION, abs=1e-15)


POSITION = 0.9370106906409114

# -------------------------------------------------------------------------------------------------------------- folders


def test_class_folders_become_a_dataset_and_the_printed_command_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "my clips", [f"{c}/deep/{i}.MP4" for c in ("turn left", "jump") for i in range(20)])
    assert run("folder", "my clips", "--out", "own videos") == 0
    out = capsys.readouterr().out
    assert "40 videos of 2 classes; the smallest is 'jump' with 20" in out
    found = splits(tmp_path / "own videos")
    assert len(found) == 40
    assert set(found.values()) == {"train", "val", "test"}
    assert (tmp_path / "own videos/classes.txt").read_text() == "jump\nturn left\n"
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    words = words[words.index("submit") + 1 :]
    assert words[0] == "--config-dir"
    config = compose([w for w in words[2:] if w != "experiment=finetune"], config_dirs=[words[1]])
    dataset = config.data.datasets["own_videos"]
    assert Path(dataset.videos) == tmp_path / "my clips"
    assert dataset.flip is False, "a class is called left"
    assert all((Path(dataset.videos) / name).is_file() for name in found)


@pytest.mark.parametrize("classes", [["1 walk", "2 run"], ["0,b", "1,a"], ["5", "7"], ['["x"]'], ["a,b", "#c", "日本"]])
def test_classes_of_any_name_are_read_back(tmp_path: Path, classes: list[str]) -> None:
    """``1 walk`` is no label with its name."""
    videos = tree(tmp_path / "v", [f"{c}/1.mp4" for c in classes])
    assert run("folder", videos, "--out", tmp_path / "o") == 0
    assert read_class_names(tmp_path / "o/classes.txt") == sorted(classes)


def test_split_folders_are_kept_whatever_their_names(tmp_path: Path) -> None:
    names = [f"{top}/{c}/{i}.mp4" for top in ("Training", "valid", "testing") for c in "ab" for i in range(3)]
    assert run("folder", tree(tmp_path / "v", names), "--out", tmp_path / "o") == 0
    expected = {"Training": "train", "valid": "val", "testing": "test"}
    assert splits(tmp_path / "o") == {name: expected[name.split("/")[0]] for name in names}


def test_val_is_cut_from_train_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{top}/{c}/{i}.mp4" for top in ("train", "test") for c in "ab" for i in range(40)]
    assert run("folder", tree(tmp_path / "v", names), "--out", tmp_path / "o") == 0
    found = splits(tmp_path / "o")
    assert {found[n] for n in names if n.startswith("test")} == {"test"}
    assert {found[n] for n in names if n.startswith("train")} == {"train", "val"}
    assert "no val in it" in capsys.readouterr().err


def test_a_class_called_train_is_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("folder", tree(tmp_path / "v", ["train/1.mp4", "plane/1.mp4", "test/1.mp4"]), "--out", tmp_path / "o") == 0
    )
    assert (tmp_path / "o/classes.txt").read_text().split() == ["plane", "test", "train"]
    assert "taken as a class" in capsys.readouterr().err


def test_what_is_passed_over_is_counted_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    videos = tree(
        tmp_path / "v", ["a/1.mp4", "a/1.jpg", "a/notes.txt", "b/2.jpg", "b/2.webm", "top.mp4", "b/.hidden", "a/x "]
    )
    (videos / "b/none.mp4").touch()
    (videos / "linked").symlink_to(videos / "a")
    assert run("folder", videos, "--out", tmp_path / "o") == 0
    said = caplog.text + capfd.readouterr().err
    assert "passed over 4 files without a video's suffix (2 .jpg, 1 .txt, 1 without suffix; first: 'a/1.jpg')" in said
    assert "1 linked folder (first: 'linked')" in said
    assert "passed over 1 video without content (first: 'b/none.mp4')" in said
    assert "passed over 1 video in no class folder (DIR/CLASS/VIDEO) (first: 'top.mp4')" in said
    assert set(splits(tmp_path / "o")) == {"a/1.mp4", "b/2.webm"}


def test_data_check_names_what_it_passes_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    videos = tree(tmp_path / "v", ["a/1.mp4", "a/1.jpg"])
    main(["data", "check", str(videos), "--out", str(tmp_path / "checked"), "--workers", "1"])
    assert "passed over 1 file without a video's suffix (1 .jpg; first: 'a/1.jpg')" in caplog.text


def test_another_import_replaces_its_own_files_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{c}/{i}.mp4" for c in "ab" for i in range(30)]
    videos, out = tree(tmp_path / "v", names), tmp_path / "o"
    assert run("folder", videos, "--out", out) == 0
    before = splits(out)
    tree(videos, [f"{c}/new {i}.mp4" for c in "ab" for i in range(30)])
    assert run("folder", videos, "--out", out) == 0
    after = splits(out)
    assert {name: after[name] for name in before} == before
    assert run("folder", videos, "--out", out, "--val", "0", "--test", "0") == 0
    assert not (out / "val.csv").exists()
    assert not (out / "test.csv").exists()
    (out / "data/o.yaml").write_text("mine: true\n")
    train = (out / "train.csv").read_text()
    tree(videos, ["a/last.mp4"])
    assert run("folder", videos, "--out", out) == 2
    assert "o.yaml is in the way" in capsys.readouterr().err
    assert ((out / "train.csv").read_text(), (out / "data/o.yaml").read_text()) == (train, "mine: true\n")


def test_the_dataset_goes_to_a_folder_of_configurations_and_replaces_nothing_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, home = tree(tmp_path / "v", ["a/1.mp4"]), tmp_path / "my configs"
    words = ["folder", videos, "--out", tmp_path / "o", "--config-dir", home, "--name", "my set"]
    assert run(*words) == 0
    assert f"--config-dir '{home}' experiment=finetune data=my_set name=my_set" in capsys.readouterr().out
    assert list(compose(["data=my_set"], config_dirs=[home]).data.datasets) == ["my_set"]
    (home / "data/my_set.yaml").write_text("mine: true\n")
    tree(videos, ["b/1.mp4"])
    assert run(*words) == 2
    assert "my_set.yaml is in the way" in capsys.readouterr().err
    assert (tmp_path / "o/classes.txt").read_text() == "a\n", "nothing was written"


@pytest.mark.parametrize(
    ("names", "words", "said"),
    [
        (["a.mp4", "b.mp4"], [], "2 videos, none usable in a class folder"),
        (["a/readme.txt"], [], "no video files in it"),
        (["a/1.mp4"], ["--val", "0.6", "--test", "0.5"], "shares of 0 or more"),
        (["a/1.mp4"], ["--val", "nan"], "shares of 0 or more"),
    ],
)
def test_a_folder_without_use_is_refused_in_one_line(
    tmp_path: Path, names: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("folder", tree(tmp_path / "v", names), "--out", tmp_path / "o", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------------------- tables and lists


@pytest.mark.parametrize("form", ["csv", "tsv", "semicolon", "jsonl", "json"])
def test_a_table_is_read_by_the_names_of_its_columns(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": i, "file": f"clips/{i}.mp4", "Action": "ab"[i % 2], "who": f"p{i % 7}"} for i in range(70)]
    file = tmp_path / {"csv": "t.csv", "tsv": "t.tsv", "semicolon": "s.csv", "jsonl": "t.jsonl", "json": "t.json"}[form]
    if form == "json":
        file.write_text(json.dumps(rows))
    elif form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = {"csv": ",", "tsv": "\t", "semicolon": ";"}[form]
        file.write_text("".join(mark.join(map(str, r)) + "\n" for r in [list(rows[0]), *(r.values() for r in rows)]))
    tree(tmp_path, ["clips/0.mp4"])
    assert run("table", file, "--out", tmp_path / "o", "--group-by", "who") == 0
    captured = capsys.readouterr()
    assert "path is 'file', label is 'Action', group is 'who'" in captured.err
    assert f'videos: "{tmp_path}"' in (tmp_path / "o/data/o.yaml").read_text()
    found = splits(tmp_path / "o")
    assert len(found) == 70
    assert len({(int(name[6:-4]) % 7, split) for name, split in found.items()}) == 7, "a person is in one split"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("a,b\n1,2\n", [], "columns 'a', 'b'; say which one with --path-column NAME"),
        ("path,b\n1,2\n", [], "say which one with --label-column NAME"),
        ("path,label\n1,2\n", ["--label-column", "labl"], "no column 'labl'; --label-column: did you mean 'label'?"),
        ("path,label\n", [], "no row in it"),
        ("path,label\nv.mp4,a\nv.mp4,b\n", [], "'v.mp4' has the labels 'a' and 'b'; keep one"),
        ("path,path,label\na,b,c\n", [], "t.csv:1: two columns are called 'path'"),
        ("path,label\nv.mp4,\n", [], "t.csv:2: no label in the row"),
        ("path,label\nv.mp4,1,2\n", [], "t.csv:2: more cells than columns"),
        ("path,label,split\nv.mp4,a,nowhere\n", [], "t.csv:2: 'nowhere' is no split"),
        ("path,label\n/a/v.mp4,a\nw.mp4,a\n", [], "some paths are absolute"),
        ("path,label\n../v.mp4,a\n", [], "leads out of the folder"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(
    tmp_path: Path, text: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert run("table", tmp_path / "t.csv", "--out", tmp_path / "o", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("mmaction2", "a b/{0}.mp4 {1}"),
        ("mmaction2", "a b/{0}.mp4 120 {1}"),
        ("videomae", "a b/{0}.mp4 0 {1}"),
        ("videomae", "a b/{0}.mp4,{1}"),
        ("pytorchvideo", "a b/{0}.mp4\t{1}"),
        ("videomae", "/data/v/{0}.mp4 0 64 {1}"),
    ],
)
def test_lists_of_other_projects_are_read_by_one_parser(tmp_path: Path, form: str, line: str) -> None:
    for split, numbers in (("train", range(6)), ("val", range(6, 9))):
        text = "".join(line.format(i, i % 3) + "\n" for i in numbers)
        (tmp_path / f"k400_{split}_list_videos.txt").write_text(text)
    files = [tmp_path / f"k400_{split}_list_videos.txt" for split in ("train", "val")]
    assert run(form, *files, "--out", tmp_path / "o") == 0
    start = "" if line.startswith("/") else "a b/"
    assert (tmp_path / "o/train.csv").read_text() == "".join(f"{start}{i}.mp4 {i % 3}\n" for i in range(6))
    assert splits(tmp_path / "o") == {f"{start}{i}.mp4": "train" if i < 6 else "val" for i in range(9)}


def test_ucf101_follows_its_official_split(tmp_path: Path) -> None:
    folder = tmp_path / "ucfTrainTestlist"
    folder.mkdir()
    (folder / "classInd.txt").write_text("1 Zumba\n2 Archery\n")
    (folder / "trainlist02.txt").write_text("Zumba/v_Zumba_g08_c01.avi 1\nArchery/v_Archery_g01_c01.avi 2\n")
    (folder / "testlist02.txt").write_text("Archery/v_Archery_g02_c01.avi\n")
    videos = tree(tmp_path / "UCF-101", ["Zumba/v_Zumba_g08_c01.avi"])
    assert run("ucf101", folder, "--split", 2, "--videos", videos, "--out", tmp_path / "o") == 0
    assert (tmp_path / "o/train.csv").read_text() == "Zumba/v_Zumba_g08_c01.avi 0\nArchery/v_Archery_g01_c01.avi 1\n"
    assert (tmp_path / "o/val.csv").read_text() == (tmp_path / "o/test.csv").read_text()
    assert run("ucf101", folder, "--split", 3, "--out", tmp_path / "o") == 2


def test_hmdb51_follows_its_official_split(tmp_path: Path) -> None:
    for label, rows in {"brush_hair": ((1, 1), (2, 2), (3, 0)), "wave": ((4, 2), (5, 1))}.items():
        for split in (1, 2):
            text = "".join(f"{label} clip {i}.avi {side if split == 1 else 1} \n" for i, side in rows)
            (tmp_path / f"{label}_test_split{split}.txt").write_text(text)
    assert run("hmdb51", tmp_path, "--out", tmp_path / "o") == 0
    assert splits(tmp_path / "o") == {
        "brush_hair/brush_hair clip 1.avi": "train",
        "brush_hair/brush_hair clip 2.avi": "val",
        "wave/wave clip 4.avi": "val",
        "wave/wave clip 5.avi": "train",
    }


def test_other_names_of_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trainingSet.csv").write_text("run/a.mp4,run,3,0\n")
    assert run("mit", tmp_path / "trainingSet.csv", "--out", tmp_path / "o") == 0
    assert "data=o" in capsys.readouterr().out
    assert run("foldr", tmp_path, "--out", tmp_path / "o") == 2
    assert "did you mean 'folder'?" in capsys.readouterr().err
