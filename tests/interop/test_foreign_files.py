"""Checkpoints of other people: found under any usual name, and refused in one line, quickly, when they cannot be used."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import multitrain
from multitrain.cli import main
from multitrain.config import ConfigError
from multitrain.interop import json_tensors
from multitrain.interop.convert import convert
from multitrain.interop.layout import layout
from multitrain.interop.start import initialise_from
from multitrain.interop.weights import HEADER, read_model, read_weights
from multitrain.model import MultiTrain
from tests import support
from tests.interop.test_pyslowfast import NAMES, SMALL, edit, weights, with_option, write

CFG = "cfg"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pyth"
    write(path, SMALL, NAMES, epoch=3)
    return path


def renamed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


# -- under other names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "backbone.", "_orig_mod.module.", "module._orig_mod.model.backbone."]
)
def test_the_prefixes_of_wrappers_are_taken_off_in_any_order(good: Path, tmp_path: Path, prefix: str) -> None:
    expected = read_weights(good)
    file = edit(good, tmp_path / "a.pyth", model_state=renamed(prefix))
    found = read_weights(file)
    assert found.state.keys() == expected.state.keys()
    assert all(torch.equal(found.state[n], t) for n, t in expected.state.items())
    model = MultiTrain(SMALL, NAMES)
    assert not initialise_from(model, file).fresh


def test_prefixes_of_a_safetensors_file_are_taken_off_too(good: Path, tmp_path: Path) -> None:
    state = weights(SMALL, NAMES)
    description = {"model": SMALL.model_dump(mode="json"), "datasets": NAMES}
    save_file(renamed("_orig_mod.module.")(state), tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    assert read_weights(tmp_path / "a.safetensors").state.keys() == state.keys()


def test_backbone_and_head_may_have_different_prefixes_but_no_tensor_two_values(good: Path, tmp_path: Path) -> None:
    def split(state: dict[str, Any]) -> dict[str, Any]:
        return {("model." if n.startswith("head") else "model.backbone.") + n: t for n, t in state.items()}

    assert not read_weights(edit(good, tmp_path / "a.pyth", model_state=split)).report.fresh
    twice = edit(good, tmp_path / "b.pyth", model_state=lambda s: s | renamed("module.")(s))
    with pytest.raises(ConfigError, match="twice, under other prefixes"):
        read_weights(twice)


AVERAGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "model_ema": lambda state, average: {"model_state": state, "model_ema": average},
    "state_dict_ema": lambda state, average: {"state_dict": state, "state_dict_ema": renamed("module.")(average)},
    "ema": lambda state, average: {"model": renamed("module.")(state), "ema": {"decay": 0.99, "module": average}},
    "ema_model": lambda state, average: {
        "state_dict": renamed("model.")(state) | renamed("ema_model.module.")(average)
    },
    "model_ema (a prefix, with its counters)": lambda state, average: {
        "model_state": state
        | renamed("model_ema.module.")(average)
        | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    },
    "ema_state_dict": lambda state, average: {
        "model": state,
        "ema_state_dict": renamed("module.")(average) | {"steps": torch.tensor(7)},
    },
}


@pytest.mark.parametrize("name", AVERAGES)
def test_which_of_trained_and_averaged_weights_was_taken_is_said_and_either_can_be_had(
    good: Path, tmp_path: Path, name: str
) -> None:
    content = torch.load(good, weights_only=True)
    average = {n: t + 1 for n, t in content["model_state"].items()}
    file = tmp_path / "a.pyth"
    torch.save({"cfg": content[CFG], **AVERAGES[name](content["model_state"], average)}, file)
    name = name.split()[0]
    with pytest.warns(UserWarning, match=rf"the trained weights; the file holds '{name}' as well"):
        model = multitrain.load(file)
    assert torch.equal(model.state_dict()["norm.bias"], content["model_state"]["norm.bias"])
    done = convert(file, tmp_path / "b.safetensors", copy=name)
    assert any(f"taken from '{name}', a moving average" in note for note in done.notes)
    assert torch.equal(read_weights(done.target).state["norm.bias"], average["norm.bias"])
    with pytest.raises(ConfigError, match=r"no weights under 'emma'"):
        convert(file, tmp_path / "c.safetensors", copy="emma")


def test_a_file_with_an_average_only_gives_that_and_says_so(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    torch.save({"cfg": content[CFG], "model_ema": {"module": content["model_state"]}}, tmp_path / "a.pyth")
    found = read_weights(tmp_path / "a.pyth")
    assert found.report.notes == ("weights taken from 'model_ema', a moving average of the weights",)


PREFIXES_OF_AVERAGES = ("ema.", "model_ema.", "ema_model.", "model_ema.module.", "module.model_ema.")


@pytest.mark.parametrize("prefix", PREFIXES_OF_AVERAGES)
def test_averaged_weights_in_a_file_of_nothing_but_tensors_are_told_from_the_trained_ones(
    tmp_path: Path, prefix: str
) -> None:
    state = weights(SMALL, NAMES)
    average = {n: t + 1 for n, t in state.items()}
    name = prefix.removeprefix("module.").split(".")[0]
    description = {"model": SMALL.model_dump(mode="json"), "datasets": NAMES}
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    save_file(state | renamed(prefix)(average), both, {HEADER: json.dumps(description)})
    save_file(renamed(prefix)(average), alone, {HEADER: json.dumps(description)})
    torch.save(state | renamed(prefix)(average), tmp_path / "both.pyth")
    torch.save(renamed(prefix)(average), tmp_path / "alone.pyth")
    trained = f"the names without such a prefix, the trained weights; the file holds '{name}' as well"
    for file in ("both.safetensors", "both.pyth", "alone.safetensors", "alone.pyth"):
        model = MultiTrain(SMALL, NAMES)
        said = str(initialise_from(model, tmp_path / file))
        expected, what = (state, trained) if "both" in file else (average, f"'{name}', a moving average of the weights")
        assert f"weights taken from {what}" in said, file
        assert torch.equal(model.state_dict()["norm.bias"], expected["norm.bias"]), file
    done = convert(both, tmp_path / "c.safetensors", copy=name)
    assert torch.equal(read_weights(done.target).state["norm.bias"], average["norm.bias"])
    with pytest.raises(ConfigError, match=r"no weights under 'emma'"):
        convert(both, tmp_path / "d.safetensors", copy="emma")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_average_beside_the_weights_is_kept_through_our_formats(good: Path, tmp_path: Path) -> None:
    content = torch.load(good, weights_only=True)
    torch.save(content | {"model_ema": content["model_state"]}, tmp_path / "a.pyth")
    convert(tmp_path / "a.pyth", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pyth")
    assert torch.load(tmp_path / "c.pyth", weights_only=True)["model_ema"].keys() == content["model_state"].keys()


# -- what cannot be meant -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(good: Path, tmp_path: Path, value: float) -> None:
    def broken(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"norm.bias": torch.full_like(state["norm.bias"], value)}

    file = edit(good, tmp_path / "a.pyth", model_state=broken)
    state = broken(weights(SMALL, NAMES))
    description = {"model": SMALL.model_dump(mode="json"), "datasets": NAMES}
    save_file(state, tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    for path in (file, tmp_path / "a.safetensors"):
        with pytest.raises(ConfigError, match=r"1 of \d+ tensors hold NaN or infinite numbers \(norm\.bias\)"):
            multitrain.load(path)
        with pytest.raises(ConfigError, match="NaN or infinite"):
            initialise_from(MultiTrain(SMALL, NAMES), path)


@pytest.mark.parametrize("kind", ["int64", "int8", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_another_type_than_floating_point_are_refused_by_name(good: Path, tmp_path: Path, kind: str) -> None:
    def cast(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"norm.bias": state["norm.bias"].to(getattr(torch, kind))}

    description = {"model": SMALL.model_dump(mode="json"), "datasets": NAMES}
    files = [edit(good, tmp_path / "a.pyth", model_state=cast), edit(good, tmp_path / "b.pyth", model_state=cast)]
    torch.save({"model_state": torch.load(files[1], weights_only=True)["model_state"]}, files[1])  # without a cfg
    save_file(cast(weights(SMALL, NAMES)), tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    says = rf"1 of \d+ tensors are no weights.*\(norm\.bias: {kind}\)"
    for path in (files[0], tmp_path / "a.safetensors"):
        with pytest.raises(ConfigError, match=says):
            multitrain.load(path)
    for path in (*files, tmp_path / "a.safetensors"):
        with pytest.raises(ConfigError, match=says):
            initialise_from(MultiTrain(SMALL, NAMES), path)


def test_counters_that_are_no_weights_of_the_model_are_let_be(good: Path, tmp_path: Path) -> None:
    counted = edit(
        good,
        tmp_path / "a.pyth",
        model_state=lambda s: s | {"head.num_batches_tracked": torch.tensor(3), "n_averaged": torch.tensor(7)},
    )
    content = torch.load(counted, weights_only=True)
    torch.save({"model_state": content["model_state"]}, counted)
    assert "norm.bias" in initialise_from(MultiTrain(SMALL, NAMES), counted).matched


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 0}, "depth=0: input should be greater than or equal to 1"),
        ({"heads": 3}, "width=16 is not a multiple of heads=3"),
        ({"width": "wide"}, "width='wide': input should be a valid integer"),
        ({"what": 1}, "what is an unknown option"),
    ],
)
def test_a_description_of_no_network_is_said_in_our_words(
    good: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    description = {"model": SMALL.model_dump(mode="json") | change, "datasets": NAMES}
    save_file(weights(SMALL, NAMES), tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    with pytest.raises(ConfigError) as caught:
        read_weights(tmp_path / "a.safetensors")
    assert says in str(caught.value)
    assert "ValidationError" not in str(caught.value)
    assert "further" not in str(caught.value)


def test_large_numbers_are_no_infinities(good: Path, tmp_path: Path) -> None:
    big = edit(
        good, tmp_path / "a.pyth", model_state=lambda s: s | {"norm.bias": torch.full_like(s["norm.bias"], 3e38)}
    )
    assert read_weights(big).state["norm.bias"][0] == 3e38


def test_tensors_of_another_network_are_said_without_a_guess_at_why(good: Path, tmp_path: Path) -> None:
    other = edit(good, tmp_path / "a.pyth", model_state=lambda s: {n: t for n, t in s.items() if "norm" not in n})
    with pytest.raises(ConfigError, match="tensors missing") as caught:
        read_weights(other)
    assert "changed after" not in str(caught.value)


def _zip(path: Path, entries: dict[str, bytes], kind: int) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def hostile_archives(folder: Path, good: Path) -> dict[str, Path]:
    """Files that a stranger may give, by what is wrong with them."""
    content = torch.load(good, weights_only=True)
    cfg = yaml.safe_load(content[CFG])
    made: dict[str, Path] = {}

    def save(name: str, **changes: Any) -> None:
        made[name] = folder / f"{len(made)}.pyth"
        torch.save(content | changes, made[name])

    for option, values in {
        "MVIT.DEPTH": [10**8, "deep", -1, [3], None, 10**400],
        "MVIT.EMBED_DIM": [10**12, "wide", {}],
        "MVIT.DIM_MUL": [7, [[1]], [["x", 2.0]], {"a": 1}],
        "MVIT.POOL_Q_STRIDE": [[[1]], "x", [["a", 1, 2, 2]]],
        "MVIT.POOL_KV_STRIDE_ADAPTIVE": [5, [1, "x", "x"]],
        "MODEL.MULTI_NUM_CLASSES": [[10**18, 10**18, 10**18], ["x", 1, 2], 5, [[1], 2, 3]],
        "MODEL.MULTI_DATASETS": [7, [1, 2, 3], [[], {}, 3], ["a/b", "..", "c"]],
        "MODEL.MULTI_HEAD_ACT": [3, [[], [], []]],
        "DATA.NUM_FRAMES": [10**9, "many"],
        "DATA.TRAIN_CROP_SIZE": [10**9],
        "DATA.SAMPLING_RATE": [[], "x", 0],
        "DATA.TRAIN_JITTER_SCALES": [5, ["x"]],
        "DATA.PATH_LABEL_SEPARATOR": [[1]],
        "TEST.NUM_ENSEMBLE_VIEWS": ["x", -4, [1]],
    }.items():
        for value in values:
            save(f"{option}={str(value)[:30]}", cfg=with_option(option, value)(content[CFG]))
    save("sections are lists", cfg=yaml.safe_dump({k: [1] for k in cfg}))
    save("deep cfg", cfg="[" * 20_000)
    save("aliases", cfg="a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
    ))  # fmt: skip
    save("epoch is text", epoch="last")
    save("expanded head", model_state={n: t[:1].expand(10**10, *t.shape[1:]) if t.dim() == 1 else t
                                       for n, t in content["model_state"].items()})  # fmt: skip
    save("sparse", model_state={n: t.to_sparse() for n, t in content["model_state"].items()})
    save("no tensors", model_state={"a": 1})
    save("a list of weights", model_state=[torch.zeros(1)])
    made["compressed"] = folder / "compressed.pyth"
    with zipfile.ZipFile(good) as plain:
        _zip(made["compressed"], {n: plain.read(n) for n in plain.namelist()} | {"good/pad": bytes(1 << 24)},
             zipfile.ZIP_DEFLATED)  # fmt: skip
    made["text"] = folder / "text.pyth"
    made["text"].write_text("<html>404</html>")
    made["cut off"] = folder / "cut.pyth"
    made["cut off"].write_bytes(good.read_bytes()[:-5000])
    made["empty"] = folder / "empty.pyth"
    made["empty"].touch()
    made["a plain pickle"] = folder / "pickle.pyth"
    made["a plain pickle"].write_bytes(pickle.dumps({"model_state": {}, "cfg": "x"}))
    return made


def test_archives_that_cannot_be_used_are_refused_in_one_line(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what, path in hostile_archives(tmp_path, good).items():
        status = main(["convert", str(path), str(tmp_path / "out.safetensors")])
        said = capsys.readouterr().err
        assert status == 2, what
        assert said.count("\n") == 1, (what, said)
        assert str(path) in said, (what, said)
        assert not (tmp_path / "out.safetensors").exists(), what


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_lies_beside_the_weights_and_cannot_be_kept_is_named(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubling: list[Any] = []
    for _ in range(60):
        doubling = [doubling, doubling]
    monkeypatch.setattr(json_tensors, "MAX_VALUES", 2000)
    for extra in (doubling, {("a", 1): 2}, [[[]]] * 2000):
        torch.save(torch.load(good, weights_only=True) | {"more": extra}, tmp_path / "a.pyth")
        with pytest.raises(ConfigError, match="--weights-only"):
            convert(tmp_path / "a.pyth", tmp_path / "b.safetensors")
        convert(tmp_path / "a.pyth", tmp_path / "b.safetensors", weights_only=True)
        (tmp_path / "b.safetensors").unlink()


def _safetensors(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def test_safetensors_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"norm.bias": torch.zeros(4)}
    model = SMALL.model_dump(mode="json")
    descriptions: dict[str, Any] = {
        "depth": {"model": model | {"depth": 10**8, "stages": []}, "datasets": NAMES},
        "classes": {"model": model, "datasets": {"a": 10**15, "b": 10**15}},
        "classes of text": {"model": model, "datasets": {"a": "many"}},
        "datasets are a list": {"model": model, "datasets": [1, 2]},
        "many datasets": {"model": model, "datasets": {str(i): 2 for i in range(50_000)}},
        "model is a list": {"model": [], "datasets": NAMES},
        "names are numbers": {"model": model, "datasets": NAMES, "class_names": 5},
        "names are no lists": {"model": model, "datasets": NAMES, "class_names": {"a": 7}},
        "labels": {"model": model, "datasets": NAMES, "multi_label": 5},
        "run": {"model": model, "datasets": NAMES, "run": {"data": []}},
        "a list": [1],
    }
    files = {}
    for what, description in descriptions.items():
        files[what] = tmp_path / f"{len(files)}.safetensors"
        save_file(small, files[what], {HEADER: json.dumps(description)})
    deep = tmp_path / "deep.safetensors"
    save_file(small, deep, {HEADER: "[" * 100_000})
    files["deep"] = deep
    files["huge header"] = _safetensors(tmp_path / "h.safetensors", b"{}")
    files["huge header"].write_bytes(struct.pack("<Q", 2**62) + b"{}")
    files["header is a list"] = _safetensors(tmp_path / "l.safetensors", b"[1]")
    files["tensors beyond the end"] = _safetensors(
        tmp_path / "b.safetensors",
        json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode(),
    )
    for what, path in files.items():
        status = main(["convert", str(path), str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert status == 2, what
        assert said.count("\n") == 1, (what, said)
        assert str(path) in said, (what, said)


def test_what_a_file_lacks_is_not_made_up_without_bounds(tmp_path: Path) -> None:
    description = {"model": SMALL.model_dump(mode="json"), "datasets": {"a": 10**15, "b": 10**15}}
    state = {n: t for n, t in weights(SMALL, NAMES).items() if not n.startswith(("heads", "projections"))}
    save_file(state, tmp_path / "a.safetensors", {HEADER: json.dumps(description)})
    with pytest.raises(ConfigError, match=r"numbers that it does not hold|less than or equal to"):
        multitrain.load(tmp_path / "a.safetensors", strict=False)


def test_clips_that_no_computer_holds_are_refused(good: Path, tmp_path: Path) -> None:
    for size in ({"crop": 10**7}, {"frames": 10**7}):
        with pytest.raises(ConfigError, match="are not possible"):
            convert(good, tmp_path / "a.pyth", **size)


@pytest.mark.parametrize(
    "manifest", ["null", '{"files": null}', '{"files": []}', '{"files": {"a": 1}}', "[" * 50_000, '{"files": {}}', "{"]
)
def test_a_manifest_of_other_values_is_damage(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "update-00000001"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_weights(folder)
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        read_weights(tmp_path)


# -- the protocol of the test --------------------------------------------------------------------------------------------


def own_run(folder: Path, crop: int, **first: Any) -> Path:
    """A converted folder whose run has datasets of its own, each tested in its own way."""
    values = support.settings(folder / "data")
    values["model"] = support.MODEL | {"crop": crop}
    values["data"]["datasets"]["stride"] |= {"temporal_views": 5, **first}
    values["data"]["datasets"]["segment"] |= {"spatial_views": 3, "flip": False}
    values["data"]["datasets"]["with.dot"] |= {"flip": False, "temporal_views": 2, "test_short_side": 2 * crop}
    _, config = support.write_run(folder / "runs", values)
    names = {name: d.classes for name, d in config.data.datasets.items()}
    described = {
        "model": config.model.model_dump(mode="json"),
        "datasets": names,
        "run": config.model_dump(mode="json"),
        "class_names": {"segment": ["walk", "run", "stand"]},
    }
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator) for n, s in layout(config.model, names).items()}  # type: ignore[arg-type]
    save_file(state, folder / "own.safetensors", {HEADER: json.dumps(described)})
    return folder / "own.safetensors"


OPTIONS = ("sampling", "flip", "temporal_views", "spatial_views", "test_short_side", "separator")


@pytest.mark.parametrize("crop", [64, 96])
def test_a_run_converted_to_pyth_and_back_is_tested_as_before(tmp_path: Path, crop: int) -> None:
    source = own_run(tmp_path, crop)
    before, run = read_model(source)
    done = convert(source, tmp_path / "a.pyth")
    after, again = read_model(tmp_path / "a.pyth")
    for name, dataset in run.data.datasets.items():
        for option in OPTIONS:
            assert getattr(again.data.datasets[name], option) == getattr(dataset, option), (name, option)
        assert again.data.datasets[name].short_side(crop) == dataset.short_side(crop)
    assert after.class_names == before.class_names
    options = yaml.safe_load(torch.load(tmp_path / "a.pyth", weights_only=True)[CFG])
    assert (options["TEST"]["NUM_ENSEMBLE_VIEWS"], options["TEST"]["NUM_SPATIAL_CROPS"]) == (5, 1)
    assert options["DATA"]["TRAIN_JITTER_SCALES"][0] == round(crop * 8 / 7)
    lost = [note for note in done.notes if "one protocol for all" in note]
    assert [note.split(":")[0] for note in lost] == ["segment", "with.dot"]
    assert "5 × 1 views" in lost[0]
    assert "1 × 3 views" in lost[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_published_options_alone_say_how_a_dataset_is_tested(good: Path, tmp_path: Path) -> None:
    """A file of PySlowFast itself, of a dataset that this project does not know."""
    single = SMALL.model_copy(update={"head": "linear", "projections": False, "expander": False})
    write(tmp_path / "a.pyth", single, {"mine": 4})

    def tested(text: str) -> str:
        for option, value in {
            "TEST.NUM_ENSEMBLE_VIEWS": 10,
            "TEST.NUM_SPATIAL_CROPS": 3,
            "DATA.RANDOM_FLIP": False,
        }.items():
            text = with_option(option, value)(text)
        return text

    run = read_model(edit(tmp_path / "a.pyth", tmp_path / "b.pyth", cfg=tested))[1]
    mine = run.data.datasets["mine"]
    assert (mine.temporal_views, mine.spatial_views, mine.flip) == (10, 3, False)


def test_another_crop_keeps_the_proportion_of_the_short_side(tmp_path: Path) -> None:
    convert(own_run(tmp_path, 64), tmp_path / "big.pyth", crop=128)
    run = read_model(tmp_path / "big.pyth")[1]
    assert run.data.datasets["with.dot"].test_short_side == 256
    assert run.data.datasets["stride"].short_side(128) == 146
