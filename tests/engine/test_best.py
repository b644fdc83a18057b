"""The best checkpoint by a validation is kept, a run ends early when nothing gets better, and both are functions of the updates."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import settings, train, write_run

from multitrain.config import ConfigError, RunConfig, load, validate
from multitrain.engine import checkpoint as ck
from multitrain.engine.best import Best
from multitrain.interop.model_path import resolve_model_file
from multitrain.records.checkpoints import BEST, pointed_to, update_of
from multitrain.report.status import status
from multitrain.report.status_text import card
from tests.engine.test_checkpoint import save
from tests.engine.test_resume import events, interrupt, metrics

UPDATES = 6


def config(**changes: Any) -> RunConfig:
    return validate(settings(Path("/data"), **{"eval__every": 1, "checkpoint__best": "val/stride/top1", **changes}))


def add_all(best: Best, values: list[float]) -> list[bool]:
    return [best.add(i + 1, {"stride": {"top1": v}, "segment": {"top1": 10 * v}}) for i, v in enumerate(values)]


def test_the_first_of_equal_values_is_the_best_and_later_ones_count_against_the_patience() -> None:
    best = Best(config(eval__patience=2))
    assert add_all(best, [3.0, 5.0, 5.0]) == [True, True, False]
    assert (best.update, best.value, best.since, best.patience_is_over) == (2, 5.0, 1, False)
    again = Best(config(eval__patience=2))
    again.restore(json.loads(json.dumps(best.state())))
    assert not again.add(4, {"stride": {"top1": 4.0}})
    assert again.patience_is_over
    other = Best(config(checkpoint__best="val/segment/top1"))
    other.restore(best.state())
    assert other.value is None, "the values of another measure cannot be compared"


def test_the_mean_over_the_datasets_is_a_measure_as_well() -> None:
    best = Best(config(checkpoint__best="val/mean/top1"))
    add_all(best, [2.0])
    assert best.value == 11.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"checkpoint__best": "val/none/top1"},
            "'none', which is not a dataset of this run: stride, segment, with.dot",
        ),
        ({"checkpoint__best": "val/stride/map"}, "map is measured on multi_label datasets only"),
        ({"checkpoint__best": "stride/top1"}, "checkpoint.best"),
        ({"eval__every": None}, "set eval.every=UPDATES"),
        ({"checkpoint__best": None, "eval__patience": 3}, "set checkpoint.best=val/stride/top1"),
    ],
)
def test_a_measure_that_there_is_not_is_refused_with_what_there_is(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_retention_never_deletes_the_best_nor_loses_it_when_a_better_one_could_not_be_written(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5)
    ck.point_to_best(tmp_path, 1)
    ck.point_to_best(tmp_path, 9)  # there is no such checkpoint
    ck.point_to_best(tmp_path, None)
    ck.prune(tmp_path, keep=2, keep_every=None)
    assert [update_of(f) for f in ck.listed(tmp_path)] == [5, 4, 1]
    ck.point_to_best(tmp_path, 5)
    ck.prune(tmp_path, keep=2, keep_every=None)
    assert [update_of(f) for f in ck.listed(tmp_path)] == [5, 4]
    (tmp_path / ".best.7.tmp").touch()
    ck.clear_temporary(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "update-00000004", "update-00000005"]


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"eval__every": 1, "checkpoint__best": "val/mean/top1", "checkpoint__every": 2, "data__workers": 1}
    run, _ = write_run(tmp_path_factory.mktemp("best"), settings(tiny_data, gpus=2, updates=UPDATES, **changes))
    train(run, 2)
    return run


def means(run: Path) -> list[float]:
    return [sum(d["top1"] for d in e["results"].values()) / len(e["results"]) for e in events(run, "validation")]


def test_a_run_keeps_its_best_checkpoint_and_every_command_finds_it(reference: Path) -> None:
    values = means(reference)
    best = 1 + values.index(max(values))
    folder = ck.folder_of(reference / "checkpoints", best)
    assert pointed_to(reference / "checkpoints", BEST) == folder.name
    assert ck.read(folder).state["best"]["update"] == best
    assert resolve_model_file(reference / "best") == folder / "model.safetensors"
    assert resolve_model_file(reference / "latest").parent.name == f"update-{UPDATES:08d}"
    assert events(reference, "best")[-1]["value"] == max(values)
    found = status(reference)
    assert (found["best"], found["best_value"]) == (best, max(values))
    assert f"best: update {best}" in card(found)


def test_a_killed_run_ends_with_the_same_best_and_the_same_bits(reference: Path, tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, load(reference).model_dump(mode="json"))
    assert interrupt(run, 2, signal.SIGKILL, after=3, checkpoint=True) == [-9, -9]
    train(run, 2)
    assert pointed_to(run / "checkpoints", BEST) == pointed_to(reference / "checkpoints", BEST)
    for name in (f"update-{UPDATES:08d}", str(pointed_to(run / "checkpoints", BEST))):
        ours, theirs = (ck.read(r / "checkpoints" / name) for r in (run, reference))
        assert ours.state["best"] == theirs.state["best"]
        for key, tensor in {**theirs.weights, **theirs.moments}.items():
            assert torch.equal({**ours.weights, **ours.moments}[key], tensor), key


def test_a_run_whose_validation_gets_no_better_ends_early_and_stays_ended(reference: Path, tmp_path: Path) -> None:
    values = means(reference)
    expected = next((i + 1 for i in range(1, UPDATES) if values[i] <= max(values[:i])), UPDATES)
    mapping = load(reference).model_dump(mode="json")
    mapping["eval"]["patience"] = 1
    run, _ = write_run(tmp_path, mapping)
    train(run, 2)
    assert len(metrics(run)) == expected
    assert events(run, "end")[-1]["status"] == "finished"
    assert len(events(run, "early_end")) == int(expected < UPDATES)
    train(run, 2)
    assert len(metrics(run)) == expected
