"""A stored model answers for any readable file, in the names of its classes, and says why when it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import multitrain
from benchmarks import published
from multitrain.config import ConfigError, dump, validate
from multitrain.data.decode import VideoError
from multitrain.data.views import load_views
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine.checkpoint import Checkpoint
from multitrain.evaluation.predictor import Predictor
from multitrain.evaluation.predictor import load as load_predictor
from multitrain.model import MultiTrain
from tests import material, support

NAMES = {"stride": 5, "segment": 3, "with.dot": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on real small files with one checkpoint; `segment` has class names."""
    folder = tmp_path_factory.mktemp("predictor")
    for i, (name, classes) in enumerate(NAMES.items()):
        support.write_dataset(folder / "data" / name, 1, classes, seed=i)
    (folder / "data" / "segment" / "classes.txt").write_text("push\npull\nlift something heavy\n")
    settings = support.settings(folder / "data")
    settings["data"]["datasets"]["stride"] |= {
        "temporal_views": 3,
        "test_short_side": 64,
    }  # as large as `segment`'s frames
    settings["data"]["datasets"]["with.dot"]["multi_label"] = True
    run, config = support.write_run(folder / "runs", settings)
    model = MultiTrain(config.model, NAMES, multi_label=["with.dot"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("heads."):
                parameter.mul_(30)
    state = {"update": 5, "datasets": NAMES, "model": config.model.model_dump(mode="json"), "multi_label": ["with.dot"]}
    checkpoints.write(run / "checkpoints", Checkpoint(model.state_dict(), {}, state), dump(config))
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> Predictor:
    return load_predictor(run)


@pytest.fixture(scope="module")
def released(joint_pyth: Path) -> Predictor:
    return multitrain.load(str(joint_pyth))


def test_the_datasets_of_a_published_file_are_in_the_order_of_its_heads(released: Predictor) -> None:
    assert list(released.datasets.items()) == [("kinetics", 400), ("mit", 305), ("ssv2", 174)]


@pytest.mark.parametrize(
    ("folder", "name"),
    [(folder, name) for folder in (published.SMALL, published.WHOLE) for name in published.models(folder)],
)
def test_a_loaded_model_is_ready_and_gives_the_published_probabilities(folder: Path, name: str) -> None:
    golden = published.values(folder, name)
    released = multitrain.load(str(folder / f"{name}.pyth"))
    assert not released.training
    assert {p.device.type for p in released.parameters()} == {"cpu"}
    with torch.no_grad():
        for name, probabilities in released(golden["input"]).items():
            torch.testing.assert_close(probabilities, golden["eval_probs"][name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(released.features(golden["input"]), golden["eval_feature"], atol=1e-5, rtol=1e-5)


def test_prediction_is_that_of_the_centre_view(model: Predictor, run: Path) -> None:
    video = run.parents[1] / "data" / "stride" / "v 0.mp4"
    found = model.predict(video, top=2)
    assert list(found) == list(NAMES)
    for name, dataset in model.run.data.datasets.items():
        one = dataset.model_copy(update={"temporal_views": 1, "spatial_views": 1})
        clip = torch.from_numpy(load_views(video, one, model.run.data, model.config))
        with torch.no_grad():
            row = model(clip)[name][0]
        best = [model.label(name, int(i)) for i in row.argsort(descending=True)[:2]]
        assert [label for label, _ in found[name]] == best
        assert [p for _, p in found[name]] == pytest.approx(row.sort(descending=True).values[:2].tolist(), abs=1e-6)


def test_all_views_are_averaged_on_request(model: Predictor, run: Path) -> None:
    video = run.parents[1] / "data" / "stride" / "v 0.mp4"
    views = torch.from_numpy(load_views(video, model.run.data.datasets["stride"], model.run.data, model.config))
    assert len(views) == 3
    with torch.no_grad():
        expected = model(views)["stride"].mean(0)
    np.testing.assert_allclose(model.probabilities_of(video, views="test")["stride"], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="did you mean 'centre'"):
        model.predict(video, views="center")  # type: ignore[arg-type]


def test_labels_are_names_where_they_are_known_and_numbers_elsewhere(model: Predictor, run: Path) -> None:
    found = model.predict(run.parents[1] / "data" / "segment" / "v 0.mp4")
    assert {label for label, _ in found["segment"]} == {"push", "pull", "lift something heavy"}
    assert {label for label, _ in found["stride"]} == {"0", "1", "2", "3", "4"}


def test_no_more_classes_are_returned_than_there_are(model: Predictor, run: Path) -> None:
    found = model.predict(run.parents[1] / "data" / "segment" / "v 0.mp4", top=100)
    assert {name: len(best) for name, best in found.items()} == NAMES
    assert sum(p for _, p in found["stride"]) == pytest.approx(1)
    assert all(best == sorted(best, key=lambda b: -b[1]) for best in found.values())


def test_several_labels_have_probabilities_of_their_own(model: Predictor, run: Path) -> None:
    total = sum(p for _, p in model.predict(run.parents[1] / "data" / "stride" / "v 0.mp4")["with.dot"])
    assert abs(total - 1) > 1e-3  # sigmoids


def test_a_model_in_training_predicts_the_same_and_stays_in_training(model: Predictor, run: Path) -> None:
    video = run.parents[1] / "data" / "stride" / "v 0.mp4"
    expected = model.predict(video)
    model.train()
    try:
        assert model.predict(video) == expected
        assert model.training
    finally:
        model.eval()


def test_given_class_names_count_more_than_found_ones(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("a\nb\nc\n")
    model = load_predictor(run, class_names={"segment": file, "stride": list("vwxyz")})
    assert (model.label("segment", 2), model.label("stride", 4), model.label("with.dot", 1)) == ("c", "z", "1")
    for wrong in ({"segmet": file}, {"stride": file}, {"stride": ["one"]}):
        with pytest.raises(ConfigError):
            load_predictor(run, class_names=wrong)


def test_a_head_without_its_datasets_settings_is_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    settings = support.settings(tmp_path)
    del settings["data"]["datasets"]["segment"]
    for place in (copy, copy / "checkpoints" / "update-00000005"):
        (place / "config.yaml").write_text(dump(validate(settings)))
    manifest = copy / "checkpoints" / "update-00000005" / "manifest.json"
    import json

    content = json.loads(manifest.read_text())
    del content["files"]["config.yaml"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"data\.datasets\.segment"):
        load_predictor(copy)


def test_every_odd_but_playable_file_gives_an_answer(odd: Path, released: Predictor) -> None:
    files = sorted(odd.iterdir())
    assert len(files) >= 20
    for file in files:
        found = released.predict(file, top=1)
        assert all(np.isfinite(best[0][1]) and best[0][1] > 0 for best in found.values()), file


def test_a_broken_file_is_one_clear_line(broken: Path, released: Predictor) -> None:
    for name in sorted(material.names(broken, *material.NO_VIDEO)):
        with pytest.raises(VideoError) as caught:
            released.predict(broken / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(model: Predictor, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nothing\.mp4"):
        model.predict(tmp_path / "nothing.mp4")
