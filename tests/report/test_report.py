"""The report shows what a run did, all of it and nothing else, on one page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multitrain.config import ConfigError
from multitrain.engine import checkpoint as checkpoints
from multitrain.evaluation import pictures
from multitrain.evaluation.evaluator import evaluate
from multitrain.evaluation.pictures import Example, History
from multitrain.evaluation.scored import Scored, confused, hardest, newest_evaluation, read_evaluation
from multitrain.model import MultiTrain
from multitrain.records.recorder import Recorder
from multitrain.report import run_report
from multitrain.report.page import render
from multitrain.report.run_report import accuracy_table, write_report
from tests import support

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 updates that was resumed at 20 and validated twice, with a checkpoint and a test of all datasets."""
    folder = tmp_path_factory.mktemp("report")
    for name, classes in (("stride", 5), ("segment", 3), ("with.dot", 4)):
        support.write_dataset(folder / "data" / name, 2 * classes, classes, seed=classes)
    (folder / "data/segment/classes.txt").write_text("walk\nrun <fast>\nstand\n")
    run, config = support.write_run(folder / "runs", support.settings(folder / "data"))
    (run / "env.txt").write_text("torch==<b>")
    for first, last in ((0, 25), (20, 40)):
        with Recorder(run, total_updates=40, start_update=first, tensorboard=False) as recorder:
            recorder.event("resume" if first else "start", update=first, world_size=4 if first else 2)
            for update in range(first, last):
                recorder.update(a_record(update))
                if update in (19, 39):
                    recorder.validation(
                        update + 1, {d: {"top1": float(update), "top5": 99.0} for d in config.data.datasets}
                    )
    (run / "skipped.jsonl").write_text(
        '{"update": 2, "dataset": "stride", "path": "v <9>.mp4", "reason": "no frames"}\n'
    )
    model = MultiTrain(config.model, {"stride": 5, "segment": 3, "with.dot": 4})
    state = {"update": 40, "datasets": model.datasets, "multi_label": [], "model": config.model.model_dump(mode="json")}
    weights = checkpoints.Checkpoint({k: v.detach() for k, v in model.state_dict().items()}, {}, state)
    checkpoints.write(run / "checkpoints", weights, (run / "config.yaml").read_text())
    evaluate(model, config, list(model.datasets), out_dir=run / "evaluation/update-00000040/test")
    return run


def a_record(update: int) -> dict[str, Any]:
    return {
        "update": update,
        "loss": 5.0 - update / 10,
        "loss_classification": 2.0,
        "loss_projection": 2.0,
        "loss_informative": 9.0,
        "loss_per_dataset": {"stride": 1.0, "segment": 2.0},
        "lr": 1e-3,
        "grad_norm": None if update == 3 else 1.0,
        "clips_per_second": 50.0,
        "seconds": 0.5,
        "world_size": 2 if update < 20 else 4,
    }


def test_the_page_needs_no_other_file_and_shows_every_picture_and_figure(run: Path, tmp_path: Path) -> None:
    made = write_report(run, out=tmp_path, clips=2)
    page = made.page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not [part for part in ("url(", "@import", "<script") if part in page]
    for name in ("curves", "clips", "confusion"):
        png = (tmp_path / f"{name}.png").read_bytes()
        assert base64.b64encode(png).decode() in page
        assert decoded(png).std() > 10
    for name, tested in read_evaluation(run / "evaluation/update-00000040/test").items():
        assert name in made.table
        assert f"{tested.result['top1']:.1f}" in page
    assert "<fast>" not in page
    assert "2 → 4" in page
    assert made.notes == []
    assert "| segment | 6 | 3 |" in (tmp_path / "report.md").read_text()


def test_the_page_tells_interruptions_what_was_not_read_the_hardest_classes_and_the_settings(
    run: Path, tmp_path: Path
) -> None:
    page = write_report(run, out=tmp_path, clips=0).page.read_text()
    sections = dict(re.findall(r'<section id="([^"]*)">(.*?)</section>', page, re.DOTALL))
    assert set(sections) == {
        "accuracy",
        "training",
        "interruptions",
        "confusion",
        "hardest-classes",
        "not-read",
        "settings",
    }
    cells = re.findall(r"<td[^>]*>(.*?)</td>", sections["interruptions"])
    assert cells[2:4] == ["20", "killed without warning"]
    assert cells[5:] == ["5", "4"]  # updates 20 to 24 were done again, on four ranks
    assert "v &lt;9&gt;.mp4" in sections["not-read"]
    assert "no frames" in sections["not-read"]
    assert "torch==&lt;b&gt;" in sections["settings"]
    assert "effective_batch: 16" in sections["settings"]
    tested = read_evaluation(run / "evaluation/update-00000040/test")
    for name, t in tested.items():
        for hard in hardest(t):
            assert f"{hard.right} of {hard.videos}" in sections["hardest-classes"], name
    for link in re.findall(r'<a href="#([^"]*)"', page):
        assert link in sections


def test_no_text_of_a_stranger_becomes_markup_or_steers_the_page() -> None:
    bad = "</style><img src=x>'\"&{{ 7*7 }}\x1b[31m\u202e\udce9"
    row = (bad,) * 7
    page = render(
        name=bad,
        made=bad,
        state=bad,
        summary={bad: bad},
        pictures={"curves": b"png"},
        findings=[(bad, bad)],
        accuracy=[(bad, bad), (bad, bad)],
        bars=[(1.0, 2.0)],
        interruptions=[row],
        confused={bad: [row[:3]]},
        hardest={bad: [row[:4]]},
        unread=[row[:4]],
        unread_counts={bad: 1},
        settings={bad: f"one\n{bad}"},
    )
    assert not re.search("[\x1b\u202e\udce9]", page)
    assert "49" not in page
    assert page.count("<img") == 1
    assert page.count("</style>") == 1
    assert page.count("{{ 7*7 }}\\x1b[31m\\u202e\\xe9") >= 25
    tags = re.findall(r"<[^>]*>", page)
    assert not [tag for tag in tags if "7*7" in tag and 'class="state' not in tag]


def test_a_browser_shows_every_picture_and_nothing_sticks_out(run: Path, tmp_path: Path) -> None:
    made = write_report(run, out=tmp_path, clips=1)
    script = (
        "<script>addEventListener('load', () => { const d = document; d.title = JSON.stringify({"
        "pictures: [...d.images].map(i => [i.alt, i.naturalWidth, Math.round(i.getBoundingClientRect().width)]),"
        "wide: d.documentElement.scrollWidth - d.documentElement.clientWidth,"
        "sections: [...d.querySelectorAll('section')].map(s => Math.round(s.getBoundingClientRect().height))})})</script>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(made.page.read_text() + script)
    dom = support.browse(copy, tmp_path)
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom).group(1)))  # type: ignore[union-attr]
    assert [name for name, *_ in seen["pictures"]] == ["curves", "clips", "confusion"]
    assert all(natural > 600 and shown > 300 for _, natural, shown in seen["pictures"])
    assert seen["wide"] == 0
    assert min(seen["sections"]) > 40


def test_a_run_that_only_began_has_a_report_too(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.yaml").write_text((run / "config.yaml").read_text())
    made = write_report(tmp_path / "new")
    assert made.table == ""
    assert "Configuration" in made.page.read_text()
    assert not (tmp_path / "new/report/curves.png").exists()


def test_a_clip_that_cannot_be_read_is_named_and_the_others_are_shown(run: Path, tmp_path: Path) -> None:
    evaluated = read_evaluation(run / "evaluation/update-00000040/test")
    first = run_report._chosen(evaluated["stride"], 2)[0]
    broken = run.parents[1] / "data/stride" / str(evaluated["stride"].paths[first])
    content = broken.read_bytes()
    try:
        broken.write_bytes(b"gone")
        made = write_report(run, out=tmp_path, clips=2)
    finally:
        broken.write_bytes(content)
    assert [broken.name in note for note in made.notes] == [True]
    assert (tmp_path / "clips.png").exists()


def test_the_newest_checkpoints_test_is_taken_and_a_missing_one_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("update-00000200/test", "update-00001000/val", "update-00001000/test"):
        (tmp_path / "evaluation" / name).mkdir(parents=True)
        (tmp_path / "evaluation" / name / "metrics.json").write_text("{}")
    (tmp_path / "evaluation/update-00002000/test").mkdir(parents=True)  # has not finished
    assert newest_evaluation(tmp_path) == tmp_path / "evaluation/update-00001000/test"
    with pytest.raises(ConfigError, match="no finished evaluation"):
        write_report(run, evaluation=tmp_path / "nowhere")


def scored(labels: Any, scores: Any, **result: Any) -> Scored:
    scores = np.array(scores, np.float32)
    names = [f"class {i}" for i in range(scores.shape[1])]
    counts = {"scored": len(scores), "videos": len(scores), "class_names": names, "top1": 50.0, "top5": 100.0}
    return Scored("d", counts | result, np.array(labels), scores, np.array([f"{i}.mp4" for i in range(len(scores))]))


def test_chance_is_the_share_of_the_most_frequent_class() -> None:
    assert scored([0, 0, 0, 1], np.eye(4)).chance == 75.0
    assert scored(np.array([[1, 1], [0, 1]], bool), np.eye(2)).chance == 100.0


def test_the_hardest_classes_come_first_and_those_always_right_are_left_out() -> None:
    pairs = [[0, 0, 9], [1, 0, 3], [1, 1, 1], [2, 2, 1], [2, 3, 1], [3, 0, 1], [3, 1, 2], [3, 3, 3]]
    t = scored([0, 1, 2, 3], np.eye(5)[:4], confusion=pairs)
    found = hardest(t)
    assert [(h.name, h.right, h.videos) for h in found] == [("class 1", 1, 4), ("class 3", 3, 6), ("class 2", 1, 2)]
    assert found[1].predicted_as == (("class 1", 2), ("class 0", 1))
    assert confused(t, 2) == [("class 1", "class 0", 3, 4), ("class 3", "class 1", 2, 6)]
    several = scored(np.array([[1, 1], [0, 1]], bool), np.eye(2))
    assert (hardest(several), confused(several)) == ([], [])


def test_the_table_says_when_videos_were_not_scored() -> None:
    table = accuracy_table({"d": scored([0, 1], np.eye(2), videos=3)})
    assert table.splitlines()[1].split() == ["d", "2", "of", "3", "2", "50.0", "50.0"]


def test_the_surest_mistake_is_always_among_the_clips_and_none_is_shown_twice() -> None:
    labels = np.arange(12) % 4
    scores = np.eye(4)[labels] * 0.9
    scores[5], scores[6] = [0.8, 0, 0, 0], [0.99, 0, 0, 0]
    chosen = run_report._chosen(scored(labels, scores), 4)
    assert chosen[-1] == 6
    assert len(set(chosen)) == 4
    assert {int(labels[i]) for i in chosen[:-1]} >= {0, 1}


def test_a_long_curve_is_averaged_not_thinned() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    records = [{"update": i, "loss": float(v)} for i, v in enumerate(values)]
    x, y = pictures._curve(History(records), "loss")
    assert len(x) == pictures.POINTS
    assert (np.diff(x) > 0).all()
    assert abs(y.mean() - values.mean()) < 1e-3
    assert abs(np.abs(y).max()) < 0.5


def test_many_classes_make_a_confusion_matrix_without_names() -> None:
    png = pictures.confusion({"k": np.eye(400, dtype=int)}, {"k": [str(i) for i in range(400)]})
    assert decoded(png).shape[0] > 300


def test_right_is_green_and_wrong_is_red() -> None:
    def colours(truth: str) -> tuple[int, int]:
        frames = np.full((4, 8, 8, 3), 128, np.uint8)
        example = Example("d", frames, (truth,), {"d": [("a", 0.9), ("b", 0.1)]})
        rgb = decoded(pictures.film_strips([example], ["d"])).astype(int)
        return int((rgb[..., 1] - rgb[..., 0] > 50).sum()), int((rgb[..., 0] - rgb[..., 1] > 50).sum())

    green, red = colours("a")
    assert green > 1000 > red
    green, red = colours("b")
    assert red > 1000 > green


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from multitrain.evaluation import pictures\n"
        "pictures.curves(pictures.History([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "multitrain[report]" in done.stderr.splitlines()[-1]


def test_the_command_prints_json_for_scripts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report.main([str(run), "--out", str(tmp_path), "--clips", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["page"]).is_file()
    assert "chance" in said["table"]


def test_the_command_prints_the_table_and_the_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_report.main([str(run), "--out", str(tmp_path), "--clips", "1"]) == 0
    printed = capsys.readouterr().out
    assert "chance" in printed
    assert str(tmp_path / "report.html") in printed


def decoded(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
