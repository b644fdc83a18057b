"""A video's scores depend on the video, the weights and the settings alone; nothing is lost, repeated or made up."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multitrain.config import ConfigError, RunConfig
from multitrain.config import validate as checked
from multitrain.data.catalog import Catalog, open_catalogs
from multitrain.data.views import load_views
from multitrain.evaluation import metrics, shards, tables
from multitrain.evaluation.evaluator import Evaluation, EvaluationError, evaluate
from multitrain.evaluation.scored import read_evaluation
from multitrain.evaluation.shards import ShardReader, ShardWriter
from multitrain.evaluation.validation import validate
from multitrain.model import MultiTrain
from tests import support

BROKEN = 3
"""Number of the video in `stride` that cannot be read."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`stride`: ten videos, one broken; `segment`: three; `many`: five with several labels each."""
    folder = tmp_path_factory.mktemp("data")
    support.write_dataset(folder / "stride", 10, 5, seed=1)
    support.write_dataset(folder / "segment", 3, 3, seed=2)
    (folder / "stride" / f"v {BROKEN}.mp4").write_bytes(b"not a video")
    (folder / "many").mkdir()
    rows = [f"../stride/v {i}.mp4 {labels}\n" for i, labels in zip((0, 1, 2, 4, 5), ("0", "0,2", "1", "1,2", "2"))]
    for split in ("val", "test"):
        (folder / "many" / f"{split}.csv").write_text("".join(rows))
    return folder


def configured(data: Path, **changes: Any) -> RunConfig:
    settings = support.settings(data, **changes)
    settings["data"]["datasets"] = {
        "stride": _entry(data, "stride", 5, temporal_views=2),
        "segment": _entry(data, "segment", 3, sampling="segment", spatial_views=3),
        "many": _entry(data, "many", 3, multi_label=True),
    }
    settings["data"]["index"] = str(data / ".index")
    return checked(settings)


def _entry(data: Path, name: str, classes: int, **more: Any) -> dict[str, Any]:
    return {"annotations": str(data / name), "videos": str(data / name), "classes": classes, **more}


@pytest.fixture(scope="module")
def config(data: Path) -> RunConfig:
    return configured(data)


@pytest.fixture(scope="module")
def model(config: RunConfig) -> MultiTrain:
    """Weights large enough that classes differ."""
    model = MultiTrain(config.model, {"stride": 5, "segment": 3, "many": 3}, multi_label=["many"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("heads."):
                parameter.mul_(30)
    return model.eval()


@pytest.fixture(scope="module")
def reference(model: MultiTrain, config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The uninterrupted evaluation on one rank."""
    return evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path_factory.mktemp("reference"))


def on_ranks(world_size: int, model: MultiTrain, config: RunConfig, out: Path, **more: Any) -> Evaluation:
    """All ranks one after the other, rank 0 last."""
    for rank in reversed(range(world_size)):
        done = evaluate(
            model, config, ["stride", "segment", "many"], out_dir=out, rank=rank, world_size=world_size, **more
        )
    return done


def after(videos: int) -> Callable[[], bool]:
    """A stop request that comes when it has been asked for `videos` times."""
    left = [videos]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stop


def assert_same(out: Path, reference: Evaluation) -> None:
    """Bit for bit the same scores, and the same figures."""
    assert reference.folder is not None
    for name in reference.results:
        found, expected = (np.load(folder / name / "scores.npz") for folder in (out, reference.folder))
        assert sorted(found.files) == sorted(expected.files)
        for key in expected.files:
            assert found[key].tobytes() == expected[key].tobytes(), f"{name}: {key}"
    assert (out / "metrics.json").read_text() == (reference.folder / "metrics.json").read_text()


def records(out: Path) -> dict[str, int]:
    """Videos in all shards of each dataset, counting one that was scored twice twice."""
    counts = {}
    for folder in sorted(out.glob("*/shards")):
        counts[folder.parent.name] = 0
        for file in folder.iterdir():
            one = ShardReader(folder, _header(file)) if file.suffix == ".scores" else None
            if one is not None:
                one._read_scores(file)
            counts[folder.parent.name] += len(one.scores) if one else len(file.read_text().splitlines())
    return counts


def _header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return dict(json.loads(content[16 : 8 + int.from_bytes(content[:4], "little")]))


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_are_the_sums_of_the_views_probabilities(
    model: MultiTrain, config: RunConfig, reference: Evaluation
) -> None:
    for name, dataset in config.data.datasets.items():
        scores = np.load(reference.folder / name / "scores.npz")
        catalog = Catalog.open(dataset, name, "test", config.data.index or "")
        assert len(scores["index"]) == len(catalog) - (name == "stride")
        for i, row in zip(scores["index"], scores["scores"]):
            views = torch.from_numpy(load_views(catalog.path(int(i)), dataset, config.data, config.model))
            assert len(views) == dataset.temporal_views * dataset.spatial_views
            with torch.no_grad():
                expected = torch.stack([model(v[None])[name][0] for v in views]).double().sum(0)
            np.testing.assert_allclose(row, expected, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_any_number_of_ranks_gives_the_same_bits(
    model: MultiTrain, config: RunConfig, reference: Evaluation, tmp_path: Path, world_size: int
) -> None:
    assert on_ranks(world_size, model, config, tmp_path).finished
    assert_same(tmp_path, reference)
    assert records(tmp_path) == {"stride": 10, "segment": 3, "many": 5}


def test_worker_processes_give_the_same_bits(
    model: MultiTrain, data: Path, reference: Evaluation, tmp_path: Path
) -> None:
    evaluate(model, configured(data, eval__workers=2), ["stride", "segment", "many"], out_dir=tmp_path)
    assert_same(tmp_path, reference)


def test_an_unreadable_neighbour_changes_no_bit_of_the_others(
    model: MultiTrain, config: RunConfig, data: Path, reference: Evaluation, tmp_path: Path
) -> None:
    mended = tmp_path / "data"
    shutil.copytree(data, mended)
    shutil.copy(mended / "stride" / "v 0.mp4", mended / "stride" / f"v {BROKEN}.mp4")
    evaluate(model, configured(mended), ["stride"], out_dir=tmp_path / "out")
    found, expected = (np.load(f / "stride" / "scores.npz") for f in (tmp_path / "out", reference.folder))
    others = [i for i in range(10) if i != BROKEN]
    assert found["index"].tolist() == list(range(10))
    assert found["scores"][others].tobytes() == expected["scores"].tobytes()


def test_the_forward_pass_always_has_the_same_shape(model: MultiTrain, config: RunConfig, tmp_path: Path) -> None:
    shapes = set()
    hook = model.patch_embed.register_forward_hook(lambda _m, inputs, _o: shapes.add(tuple(inputs[0].shape)))
    evaluate(model, config, ["stride"], out_dir=tmp_path, rank=1, world_size=2)
    evaluate(model, config, ["stride"], out_dir=tmp_path, rank=0, world_size=2)
    hook.remove()
    assert shapes == {(4 * 2, 3, 4, 64, 64)}


def test_a_video_of_many_views_is_cut_into_several_passes(model: MultiTrain, data: Path, tmp_path: Path) -> None:
    wide = configured(data)
    entry = wide.data.datasets["segment"].model_copy(update={"temporal_views": 7})
    wide.data.datasets["segment"] = entry
    evaluate(model, wide, ["segment"], out_dir=tmp_path / "one")
    scores = np.load(tmp_path / "one" / "segment" / "scores.npz")["scores"]
    np.testing.assert_allclose(scores.sum(1), 21, rtol=1e-6)


# -- interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("videos", [0, 1, 2, 5, 9, 11])
def test_an_interrupted_evaluation_goes_on_with_any_number_of_ranks(
    model: MultiTrain, config: RunConfig, reference: Evaluation, tmp_path: Path, videos: int
) -> None:
    first = evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path, stop=after(videos))
    assert not first.finished
    assert not (tmp_path / "metrics.json").exists()
    second = evaluate(
        model, config, ["stride", "segment", "many"], out_dir=tmp_path, rank=1, world_size=3, stop=after(3)
    )
    assert not second.finished
    assert on_ranks(2, model, config, tmp_path).finished
    assert_same(tmp_path, reference)
    assert records(tmp_path) == {"stride": 10, "segment": 3, "many": 5}


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
def test_a_record_that_a_crash_has_torn_is_scored_again(
    model: MultiTrain, config: RunConfig, reference: Evaluation, tmp_path: Path, damage: str
) -> None:
    evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path)
    for file in tmp_path.glob("*/shards/*.scores"):
        content = bytearray(file.read_bytes())
        if damage == "cut":
            content = content[:-3]
        elif damage == "flipped":
            content[-5] ^= 1
        else:
            content += bytes(100)
        file.write_bytes(content)
    (tmp_path / "metrics.json").unlink()
    evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path)
    assert_same(tmp_path, reference)


def test_a_torn_line_about_an_unreadable_video_is_looked_at_again(
    model: MultiTrain, config: RunConfig, reference: Evaluation, tmp_path: Path
) -> None:
    evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path)
    (file,) = tmp_path.glob("stride/shards/*.jsonl")
    file.write_text(file.read_text()[:-4])
    evaluate(model, config, ["stride", "segment", "many"], out_dir=tmp_path)
    assert_same(tmp_path, reference)


def test_files_that_are_no_scores_are_refused_in_a_line(tmp_path: Path) -> None:
    for index, content in ((shards._HEADER_INDEX, b"[1]"), (3, b"12345")):
        (tmp_path / "rank-0.scores").write_bytes(shards._record(index, content))
        with pytest.raises(ConfigError, match=r"another evaluation|something else than scores"):
            ShardReader(tmp_path, {"dataset": "d"}).poll()


def test_what_another_rank_is_still_writing_is_read_when_it_is_whole(tmp_path: Path) -> None:
    header = {"dataset": "d"}
    writer, reader = ShardWriter(tmp_path, header, rank=1), ShardReader(tmp_path / "seen", header)
    rows = {i: np.full(3, i, np.float32) for i in range(4)}
    for i, row in rows.items():
        writer.scored(i, row)
    writer.unreadable(7, "a.mp4", "empty file")
    writer.unreadable(8, "b.mp4", "empty file")
    writer.close()
    (tmp_path / "seen").mkdir()
    for file in tmp_path.glob("rank-*"):
        content, seen = file.read_bytes(), tmp_path / "seen" / file.name
        for size in range(0, len(content) + 1, 3):  # as a network file system may show it
            seen.write_bytes(content[:size])
            reader.poll()
        seen.write_bytes(content)
        reader.poll()
    assert {i: row.tolist() for i, row in reader.scores.items()} == {i: row.tolist() for i, row in rows.items()}
    assert sorted(reader.unreadable) == [7, 8]
    assert reader.poll() == 0


def test_rank_0_waits_for_the_others_and_says_who_is_missing(
    model: MultiTrain, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"4 of 10 videos have no scores.*number 4"):
        evaluate(model, config, ["stride"], out_dir=tmp_path, world_size=2, peer_timeout=0.0)
    assert evaluate(model, config, ["stride"], out_dir=tmp_path, world_size=1).finished


def test_a_folder_of_another_evaluation_is_refused(
    model: MultiTrain, config: RunConfig, data: Path, tmp_path: Path
) -> None:
    evaluate(model, config, ["segment"], out_dir=tmp_path)
    other = MultiTrain(config.model, model.datasets, multi_label=["many"])
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.norm.bias[0] += 1
    with pytest.raises(ConfigError, match=r"another evaluation .weights"):
        evaluate(other, config, ["segment"], out_dir=tmp_path)
    with pytest.raises(ConfigError, match="precision"):
        evaluate(model, config, ["segment"], out_dir=tmp_path, precision="bf16")
    with pytest.raises(ConfigError, match="reading"):
        evaluate(model, configured(data, data__sampling_rate=2), ["segment"], out_dir=tmp_path)


# -- figures -------------------------------------------------------------------------------------------------------------


def test_unreadable_videos_are_listed_and_never_scored(reference: Evaluation) -> None:
    result = reference.results["stride"]
    assert (result["videos"], result["scored"], result["coverage"]) == (10, 9, 0.9)
    (lost,) = result["unreadable"]
    assert lost["index"] == BROKEN
    assert lost["path"].endswith(f"v {BROKEN}.mp4")
    assert lost["reason"]
    assert "(9/10)" in reference.table


def test_the_figures_are_those_of_the_scores(reference: Evaluation) -> None:
    for name in ("stride", "segment"):
        scores, result = np.load(reference.folder / name / "scores.npz"), reference.results[name]
        labels = scores["index"] % scores["scores"].shape[1]
        assert scores["labels"].tolist() == labels.tolist()
        for k in (1, 5):
            assert result[f"top{k}"] == 100 * metrics.topk_accuracy(scores["scores"], labels, k)
        assert sum(count for *_, count in result["confusion"]) == result["scored"]
        hits = sum(count for true, best, count in result["confusion"] if true == best)
        assert result["top1"] == pytest.approx(100 * hits / result["scored"])
        stored = json.loads((reference.folder / name / "metrics.json").read_text())
        assert stored == result
    assert 0 < reference.results["stride"]["top1"] < 100  # the case can tell right from wrong


def test_several_labels_a_video_are_measured_by_mean_average_precision(reference: Evaluation) -> None:
    scores, result = np.load(reference.folder / "many" / "scores.npz"), reference.results["many"]
    truth = [np.flatnonzero(row) for row in scores["labels"]]
    assert [t.tolist() for t in truth] == [[0], [0, 2], [1], [1, 2], [2]]
    expected = np.mean([metrics.average_precision(scores["scores"][:, c], scores["labels"][:, c]) for c in range(3)])
    assert result["map"] == pytest.approx(100 * expected)
    assert "confusion" not in result


def test_the_table_reads_like_the_published_one() -> None:
    published = {
        "K400": {"top1": 84.7, "top5": 96.5, "videos": 2, "scored": 2},
        "MIT": {"top1": 41.4, "top5": 69.5, "videos": 2, "scored": 2},
        "SSv2": {"top1": 65.2, "top5": 86.6, "videos": 2, "scored": 2},
    }
    assert tables.table(published) == (
        "K400 84.7/96.5 (2/2) | MIT 41.4/69.5 (2/2) | SSv2 65.2/86.6 (2/2) | average 63.8/84.2"
    )


def test_datasets_tested_one_by_one_into_one_folder_make_one_table(
    model: MultiTrain, config: RunConfig, reference: Evaluation, tmp_path: Path
) -> None:
    for name in ("many", "segment", "stride"):
        done = evaluate(model, config, [name], out_dir=tmp_path)
        assert list(done.results) == [name]
    assert done.table == reference.table
    assert (tmp_path / "table.txt").read_text() == reference.table + "\n"
    assert_same(tmp_path, reference)
    other = evaluate(model, config, ["segment"], out_dir=tmp_path / "bf16", precision="bf16")
    shutil.copytree(tmp_path / "bf16" / "segment", tmp_path / "segment", dirs_exist_ok=True)
    assert other.results["segment"]["precision"] == "bf16"
    again = evaluate(model, config, ["stride"], out_dir=tmp_path)
    assert list(again.combined) == ["stride", "many"]  # scores in another precision are no part of this table


def test_the_confusion_matrix_is_drawn(reference: Evaluation) -> None:
    assert reference.folder is not None
    for name in ("stride", "segment"):
        assert (reference.folder / name / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert not (reference.folder / "many" / "confusion.png").exists()


def test_another_datasets_head_gives_scores_without_figures(
    model: MultiTrain, config: RunConfig, tmp_path: Path
) -> None:
    done = evaluate(model, config, ["segment"], out_dir=tmp_path, head="stride")
    result = done.results["segment.by.stride"]
    assert (result["top1"], result["head"], result["scored"]) == (None, "stride", 3)
    assert np.load(tmp_path / "segment.by.stride" / "scores.npz")["scores"].shape == (3, 5)
    assert done.table == "segment.by.stride –/– (3/3)"


def test_a_name_that_is_not_known_is_one_line(model: MultiTrain, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'stride'"):
        evaluate(model, config, ["strid"], out_dir=tmp_path)
    with pytest.raises(ConfigError, match="head 'sgment' is not known"):
        evaluate(model, config, ["stride"], out_dir=tmp_path, head="sgment")


def test_a_head_of_another_size_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 5 classes, its head 4"):
        evaluate(MultiTrain(config.model, {"stride": 4}), config, ["stride"], out_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"no head in this model.*--head other"):
        evaluate(MultiTrain(config.model, {"other": 4}), config, ["stride"], out_dir=tmp_path)


# -- validation during training ------------------------------------------------------------------------------------------


def summed(
    model: MultiTrain, config: RunConfig, catalogs: dict[str, Catalog], world_size: int
) -> dict[str, dict[str, float]]:
    """Validation on several ranks, one after the other, with a real sum in between."""
    vectors: list[torch.Tensor] = []

    def keep(vector: torch.Tensor) -> torch.Tensor:
        vectors.append(vector)
        return torch.stack(vectors).sum(0)

    for rank in range(world_size):
        results = validate(model, config, catalogs, rank=rank, world_size=world_size, reduce=keep)
    return results


def test_validation_is_the_same_on_any_number_of_ranks(model: MultiTrain, config: RunConfig) -> None:
    catalogs = open_catalogs(config.data, "val", config.data.index or "")
    alone = validate(model, config, catalogs)
    assert alone == validate(model, config, catalogs)
    for world_size in (2, 3):
        for name, figures in summed(model, config, catalogs, world_size).items():
            assert figures == pytest.approx(alone[name], abs=1e-9)
    assert alone["stride"]["videos"] == 10
    assert alone["stride"]["coverage"] == 0.9
    assert set(alone["many"]) == {"top1", "top5", "map", "videos", "coverage"}
    assert 0 < alone["stride"]["top1"] < 100


def test_validation_uses_one_centred_view(model: MultiTrain, config: RunConfig) -> None:
    catalogs = open_catalogs(config.data, "val", config.data.index or "")
    hits = 0
    one = config.data.datasets["segment"].model_copy(update={"spatial_views": 1})
    for i in range(3):
        clip = torch.from_numpy(load_views(catalogs["segment"].path(i), one, config.data, config.model))
        with torch.no_grad():
            hits += int(model(clip)["segment"].argmax() == catalogs["segment"].labels(i)[0])
    shapes = set()
    hook = model.patch_embed.register_forward_hook(lambda _m, inputs, _o: shapes.add(tuple(inputs[0].shape)))
    found = validate(model, config, {"segment": catalogs["segment"]})["segment"]
    hook.remove()
    assert found["top1"] == pytest.approx(100 * hits / 3)
    assert shapes == {(4, 3, 4, 64, 64)}  # a group of four videos of one clip


def test_validation_leaves_the_model_in_training_as_it_was(model: MultiTrain, config: RunConfig) -> None:
    catalogs = open_catalogs(config.data, "val", config.data.index or "")
    expected = validate(model, config, catalogs)
    model.train()
    try:
        assert validate(model, config, catalogs) == expected  # drop-out is off meanwhile
        assert model.training
    finally:
        model.eval()
    assert all(p.grad is None for p in model.parameters())


def test_validation_stops_on_all_ranks_when_one_is_asked_to(model: MultiTrain, config: RunConfig) -> None:
    catalogs = open_catalogs(config.data, "val", config.data.index or "")
    vectors: list[torch.Tensor] = []

    def keep(vector: torch.Tensor) -> torch.Tensor:
        vectors.append(vector)
        return torch.stack(vectors).sum(0)

    assert validate(model, config, catalogs, rank=0, world_size=2, reduce=keep, stop=after(1)) == {}
    assert validate(model, config, catalogs, rank=1, world_size=2, reduce=keep) == {}
    assert vectors[0].shape == vectors[1].shape


def test_an_unreadable_video_whose_name_is_not_utf8_is_listed_and_its_results_can_be_read(tmp_path: Path) -> None:
    support.write_dataset(tmp_path / "d", 2, 2, seed=3)
    odd = os.fsdecode(b"caf\xe9.mp4")
    with (tmp_path / "d/test.csv").open("a", errors="surrogateescape") as lines:
        lines.write(f"{odd} 1\n")
    settings = support.settings(tmp_path)
    settings["data"] |= {"datasets": {"d": _entry(tmp_path, "d", 2)}, "index": str(tmp_path / "index")}
    config = checked(settings)
    model = MultiTrain(config.model, {"d": 2})
    assert evaluate(model, config, ["d"], out_dir=tmp_path / "out").finished
    assert evaluate(model, config, ["d"], out_dir=tmp_path / "out").finished  # reads the shards of before
    assert [Path(r["path"]).name for r in read_evaluation(tmp_path / "out")["d"].unreadable] == [odd]
