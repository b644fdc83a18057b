"""`multitrain VERB` does what the functions do; a mistake is one line and exit status 2."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.published import SMALL
from multitrain import cli, load
from multitrain import config as configuration
from multitrain.commands.data import VERBS as DATA_VERBS
from multitrain.config import dump
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.model import MultiTrain
from tests import support

NAMES = {"stride": 5, "segment": 3, "with.dot": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on real small files with one checkpoint."""
    folder = tmp_path_factory.mktemp("cli")
    for i, (name, classes) in enumerate(NAMES.items()):
        support.write_dataset(folder / "data" / name, 9, classes, seed=i)
    settings = support.settings(folder / "data")
    settings["data"]["root"] = str(folder / "data")
    settings["runs"] = str(folder / "runs")
    run, config = support.write_run(folder / "runs", settings)
    state = {"update": 5, "datasets": NAMES, "model": config.model.model_dump(mode="json"), "multi_label": []}
    weights = MultiTrain(config.model, NAMES).state_dict()
    checkpoints.write(run / "checkpoints", Checkpoint(weights, {}, state), dump(config))
    return run


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of a command in this process."""
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# -- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evalute"], "did you mean 'evaluate'?"),
        (["train"], "launch/submit.py"),
        (["test"], "multitrain evaluate"),
        (["predict"], "the following arguments are required"),
        (["predict", "a.mp4", "--checkpoint", "nothing.pyth"], "nothing.pyth: no such file"),
        (["evaluate", "nothing"], "nothing: no such file or folder"),
        (["convert", "nothing", "b.onnx"], "b.onnx: its ending says no known format"),
        (["flops", "model=mvit_b99"], "there is no such model; did you mean 'mvitv2_b'"),
        (["data", "data=sssv2"], "did you mean 'ssv2'?"),
        (["data", "data.rot=x"], "did you mean"),
        (["predict", "b.mp4", "--checkpoint", "a.pyth", "--top", "0"], "not a whole number from 1 up"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    status, out, err = said(capsys, *arguments)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "--help")
    assert status == 0
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert said(capsys)[0] == 2
    for verb in ("predict", "evaluate", "convert", "data", "flops"):
        status, out, _ = said(capsys, verb, "--help")
        assert status == 0
        assert "example:" in out or "examples:" in out


def test_looking_up_a_verb_imports_nothing_heavy() -> None:
    code = "import sys; from multitrain import cli; cli.main(['--help']); print(sorted({'torch', 'av', 'cv2', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "multitrain", "evalute"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'evaluate'?" in done.stderr


# -- predict, convert, flops, data ---------------------------------------------------------------------------------------


def test_predict_answers_and_goes_on_after_a_broken_file(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken, names = tmp_path / "broken.mp4", tmp_path / "names.txt"
    broken.write_bytes(b"")
    names.write_text("push\npull\nlift\n")
    good = run.parents[1] / "data" / "segment" / "v 0.mp4"
    status, out, err = said(
        capsys, "predict", broken, good, "--checkpoint", run, "--top", 1, "--json", "--classes", f"segment={names}"
    )
    assert status == 2
    assert err.count("\n") == 1
    assert "broken.mp4: empty file" in err
    (line,) = out.splitlines()
    found = json.loads(line)
    assert found["video"] == str(good)
    assert found["predictions"]["segment"][0][0] in ("push", "pull", "lift")
    status, out, _ = said(capsys, "predict", good, "--checkpoint", run, "--top", 2)
    assert status == 0
    assert out.splitlines()[0] == str(good)
    assert [row.split()[0] for row in out.splitlines()[1:]] == list(NAMES)


def test_a_converted_model_predicts_the_same(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    video = run.parents[1] / "data" / "segment" / "v 1.mp4"
    status, out, _ = said(capsys, "convert", run, tmp_path / "a.safetensors")
    assert status == 0
    assert "heads: stride (5), segment (3), with.dot (4)" in out
    assert said(capsys, "convert", run, tmp_path / "a.safetensors")[0] == 2
    expected = said(capsys, "predict", video, "--checkpoint", run, "--json")
    assert expected[0] == 0
    assert said(capsys, "predict", video, "--checkpoint", tmp_path / "a.safetensors", "--json") == expected


def test_flops_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fvcore")
    status, out, _ = said(capsys, "flops", "model=tiny")
    assert status == 0
    assert "parameters" in out
    assert "8 × 64²" in out


def test_flops_of_stored_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fvcore")
    status, out, _ = said(capsys, "flops", "--run", run)
    stored = checkpoints.read(checkpoints.listed(run / "checkpoints")[0]).weights
    assert status == 0
    assert out.startswith(f"{sum(t.numel() for t in stored.values()):,} parameters")


def test_data_checks_the_annotation_files_of_a_run(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = said(capsys, "data", "--run", run, "--index", tmp_path)
    assert status == 0
    assert "epoch: 27 videos" in out
    status, _, err = said(capsys, "data", "--run", run, "data.datasets.segment.classes=2", "--index", tmp_path)
    assert status == 2
    assert "train.csv:3: label 2" in err


def test_status_and_report_are_passed_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "status", run)
    assert status == 0
    assert "tiny" in out


# -- the same words in every verb ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [*([v] for v in cli.VERBS if v not in ("data", "preflight")), *(["data", v] for v in DATA_VERBS)]
)
def test_every_verb_takes_config_dir(capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    status, out, _ = said(capsys, *verb, "--help")
    assert status == 0
    assert "--config-dir DIR" in out


def test_a_dataset_of_the_users_own_works_in_every_data_verb(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = run.parents[1] / "data" / "segment"
    (tmp_path / "mine/data").mkdir(parents=True)
    entry = f"datasets: {{own: {{annotations: '{data}', videos: '{data}', classes: 3}}}}"
    (tmp_path / "mine/data/own.yaml").write_text(entry)
    words = ["--config-dir", "mine", "data=own", "loss=single", "model=tiny", "effective_batch=4"]
    for verb in (["index"], ["stats", "--sample", "1"], ["bench", "--videos", "2"], ["check"]):
        status, _, err = said(capsys, "data", *verb, *words)
        assert status in (0, 1), f"{verb}: {err}"
        assert "no such" not in err
    assert "epoch: 9 videos" in said(capsys, "data", "index", *words)[1]
    status, _, err = said(capsys, "data", "index", "--config-dir", "nope", "data=own")
    assert (status, err.count("\n")) == (2, 1)
    assert "--config-dir nope: no such folder" in err


def test_a_run_is_known_by_its_name_and_a_model_stands_first(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(run.parents[1])
    name, video = run.name, "data/segment/v 1.mp4"
    assert said(capsys, "status", name)[0] == 0
    assert said(capsys, "compare", name, run)[0] == 0
    assert said(capsys, "data", "index", name, "--index", tmp_path)[0] == 0
    assert said(capsys, "data", "index", "--run", name, "--index", tmp_path)[0] == 0
    expected = said(capsys, "predict", video, "--checkpoint", run, "--json")
    assert expected[0] == 0
    for words in ([name, video], [video, "--run", name]):
        assert said(capsys, "predict", *words, "--json") == expected
    assert load(name).datasets == NAMES
    assert said(capsys, "convert", "--checkpoint", name, tmp_path / "b.safetensors")[0] == 0
    assert said(capsys, "embed", name, video, "--out", tmp_path / "f.npz")[0] == 0
    assert said(capsys, "nearest", name)[0] == 0


def test_a_report_is_made_of_a_run_by_its_name(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(run.parents[1])
    assert said(capsys, "report", run.name, "--clips", 0, "--out", tmp_path / "report")[0] == 0


def test_a_model_or_a_run_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["evaluate", "nothing"], ["predict", "nothing", "a.mp4"], ["embed", "nothing", "a.mp4"], ["convert", "nothing", "b.pyth"],
        ["export", "nothing", "b"], ["report", "nothing"], ["compare", "nothing"], ["status", "nothing"], ["nearest", "nothing"],
        ["data", "index", "nothing"], ["data", "stats", "--run", "nothing"], ["flops", "nothing"], ["predict", "x" * 5000, "a.mp4"],
        ["predict", "a\0b", "a.mp4"], ["data", "index", "data.root=" + "x" * 5000], ["evaluate", "--checkpoint", ""],
    ):  # fmt: skip
        status, out, err = said(capsys, *words)
        assert (status, out) == (2, ""), words
        assert err.count("\n") == 1, err
        assert "Traceback" not in err


# -- evaluate --------------------------------------------------------------------------------------------------------------


def test_evaluate_measures_robustness_and_resumes_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        run,
        "--dataset",
        "stride",
        "--perturb",
        "noise",
        "drop",
        "--strengths",
        "1",
        "5",
        "--out",
        tmp_path,
    ]
    status, out, _ = said(capsys, *words)
    assert status == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert rows[0] == ["dataset", "corruption", "none", "1", "5", "mean", "kept"]
    assert [row[:2] for row in rows[1:]] == [["stride", "noise"], ["stride", "drop"]]
    made = json.loads((tmp_path / "perturb/robustness.json").read_text())["datasets"]["stride"]
    one = json.loads((tmp_path / "perturb/noise-5/stride/metrics.json").read_text())
    assert made["corrupted"]["noise"]["5"] == one["top1"]
    assert (tmp_path / "perturb/robustness.png").read_bytes().startswith(b"\x89PNG")
    scores = (tmp_path / "perturb/noise-5/stride/scores.npz").read_bytes()
    shutil.rmtree(tmp_path / "perturb/drop-1")
    assert said(capsys, *words)[1] == out
    assert (tmp_path / "perturb/noise-5/stride/scores.npz").read_bytes() == scores
    (tmp_path / "perturb/robustness.txt").write_text("mine")
    assert "robustness.txt is in the way" in said(capsys, *words)[2]
    assert (tmp_path / "perturb/robustness.txt").read_text() == "mine"
    assert "leave one of them out" in said(capsys, "evaluate", run, "--perturb", "all", "--head", "stride")[2]


def test_evaluate_tests_a_dataset_without_a_head_by_a_map(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = configuration.load(run).data.datasets["segment"]
    (tmp_path / "map.csv").write_text("0,0\n1,0\n4,2\n")
    words = [
        "evaluate",
        run,
        "--dataset",
        "new",
        "--head",
        "stride",
        "--map",
        tmp_path / "map.csv",
        "--out",
        tmp_path / "out",
    ]
    shutil.copy(Path(data.annotations) / "test.csv", tmp_path)
    words += [f"data.datasets.new.annotations={tmp_path}", f"data.datasets.new.videos={data.videos}"]
    status, out, err = said(capsys, *words, "data.datasets.new.classes=3")
    assert status == 0, err
    with np.load(tmp_path / "out/new.by.stride/scores.npz") as arrays:
        scores, labels = arrays["scores"], arrays["labels"]
    mapped = np.stack([scores[:, 0] + scores[:, 1], np.zeros(len(scores)), scores[:, 4]], 1)[labels != 1]
    top1 = 100 * float((mapped.argmax(1) == labels[labels != 1]).mean())
    result = json.loads((tmp_path / "out/new.by.stride/metrics.json").read_text())
    assert result["top1"] == pytest.approx(top1)
    assert (result["measured"], result["covered_classes"]) == (len(mapped), 2)
    assert f"{len(mapped)} of a mapped class" in out
    assert "--map: maps the classes of another" in said(capsys, "evaluate", run, "--map", "x.csv")[2]
    assert "--map: is for one dataset" in said(capsys, "evaluate", run, "--head", "stride", "--map", "x.csv")[2]


def test_evaluate_prints_the_table_and_writes_beside_the_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, "evaluate", run, "--dataset", "stride", "segment", "eval.videos_per_batch=2")
    assert status == 0
    assert re.search(r"^stride: top-1 [0-9.]+–[0-9.]+, top-5 .*\(95 % interval, \d+ videos\)$", err, re.MULTILINE)
    (line,) = out.splitlines()
    assert [cell.split()[0] for cell in line.split(" | ")] == ["stride", "segment", "average"]
    folder = run / "evaluation" / "update-00000005" / "test"
    assert str(folder) in err
    assert json.loads((folder / "metrics.json").read_text())["table"] == line
    assert np.load(folder / "stride" / "scores.npz")["scores"].shape == (9, 5)


def test_evaluate_follows_overrides_of_the_stored_settings(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moved = tmp_path / "moved"
    (run.parents[1] / "data").rename(moved)
    try:
        status, _, err = said(capsys, "evaluate", run, "--dataset", "segment", "--out", out)
        assert status == 2
        assert "no such folder of annotations" in err
        assert said(capsys, "evaluate", run, f"data.root={moved}", "--dataset", "segment", "--out", out)[0] == 0
    finally:
        moved.rename(run.parents[1] / "data")
    for wrong, expected in {
        "model.depth=4": "cannot be changed",
        "eval.videos_per_bach=2": "did you mean 'videos_per_batch'",
        "evil.workers=2": "unknown option 'evil.workers'",
        "eval.workers=many": "eval.workers",
        "eval=[": "eval is chosen by name",
    }.items():
        status, _, err = said(capsys, "evaluate", run, "--out", out, wrong)
        assert status == 2
        assert expected in err
        assert err.count("\n") == 1


def test_evaluate_with_another_head_gives_scores_only(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = said(capsys, "evaluate", run, "--dataset", "segment", "--head", "stride", "--out", tmp_path)
    assert (status, out) == (0, "segment.by.stride –/– (9/9)\n")


def test_ranks_share_the_videos_and_agree_with_one(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["-m", "multitrain", "evaluate", str(run), "--dataset", "segment", "stride", "eval.videos_per_batch=2"]
    log = tmp_path / "log"
    ranks = support.start_ranks([*command, "--out", str(tmp_path / "two")], 2, log=log)
    assert support.wait(ranks) == [0, 0], log.read_text()
    assert log.read_text().count("average") == 1  # rank 0 alone prints
    assert len(list(tmp_path.glob("two/stride/shards/rank-*.scores"))) == 2
    assert said(capsys, *command[2:], "--out", tmp_path / "one")[0] == 0
    for name in ("segment", "stride"):
        one, two = (np.load(tmp_path / folder / name / "scores.npz")["scores"] for folder in ("one", "two"))
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_signalled_evaluation_goes_on_where_it_was(run: Path, tmp_path: Path, number: signal.Signals) -> None:
    data, videos = run.parents[1] / "data" / "stride", 300
    (tmp_path / "test.csv").write_text("".join(f"v {i % 9}.mp4 {i % 9 % 5}\n" for i in range(videos)))
    out, log = tmp_path / "out", tmp_path / "log"
    command = [
        "-m",
        "multitrain",
        "evaluate",
        str(run),
        "--dataset",
        "stride",
        "--out",
        str(out),
        "eval.videos_per_batch=1",
    ]
    command += [f"data.datasets.stride.annotations={tmp_path}", f"data.datasets.stride.videos={data}"]
    (process,) = support.start_ranks(command, 1, log=log)
    deadline = time.monotonic() + 600
    while not any(f.stat().st_size for f in out.glob("stride/shards/*")) and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 75), log.read_text()
    assert not (out / "metrics.json").exists()
    (first,) = out.glob("stride/shards/*.scores")
    kept = first.read_bytes()
    assert len(kept) > 64 * 20  # at least what was synced
    ranks = support.start_ranks(command, 2, log=log)
    assert support.wait(ranks) == [0, 0], log.read_text()
    assert first.read_bytes() == kept
    result = json.loads((out / "stride" / "metrics.json").read_text())
    assert (result["scored"], result["unreadable"]) == (videos, [])
    sizes = [len(f.read_bytes()) for f in out.glob("stride/shards/*.scores")]
    assert sum(sizes) < (videos + 64) * (8 + 8 + 5 * 4) + 3 * 1000  # nothing but a torn tail was scored twice


def test_evaluating_a_published_file_needs_only_the_folder_of_the_data(
    joint_pyth: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = SMALL / "videos"
    model = joint_pyth
    overrides = [f"data.root={root}", "eval.workers=0"]
    for name, folder, label in (("kinetics", "kinetics400", 0), ("ssv2", "ssv2", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.csv").write_text(f"test_0.mp4 {label}\n")
        overrides.append(f"data.datasets.{name}.annotations={tmp_path / folder}")
    status, out, _ = said(capsys, "evaluate", model, "--dataset", "kinetics", "ssv2", *overrides)
    assert status == 0
    assert [cell.split()[0] for cell in out.split(" | ")] == ["kinetics", "ssv2", "average"]
    from multitrain.data.views import load_views
    from multitrain.evaluation.predictor import load

    published = load(model)
    for name, folder, label in (("kinetics", "kinetics400", 0), ("ssv2", "ssv2", 2)):
        found = np.load(tmp_path / "evaluation" / "tiny_multi" / "test" / name / "scores.npz")
        video = root / folder / "videos_320p" / "test_0.mp4"
        clips = torch.from_numpy(
            load_views(video, published.run.data.datasets[name], published.run.data, published.config)
        )  # as published: tests/data/test_views.py
        with torch.no_grad():
            expected = published(clips)[name].sum(0)
        assert found["labels"].tolist() == [label]
        np.testing.assert_allclose(found["scores"][0], expected, atol=1e-5)
