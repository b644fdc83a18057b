"""`multitrain load --check`: every kind of file is named with its sizes, and with what to do where it is not read; no code in it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import write_random_run

from multitrain import cli
from multitrain.config import ConfigError, compose
from multitrain.interop.convert import convert
from multitrain.interop.inspection import inspect, preset
from multitrain.interop.layout import layout
from tests.interop.test_official import release

Said = tuple[int, str, str]


class Harmful:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("harm-was-done"),)  # type: ignore[return-value]


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


TORCHVISION = tensors(conv_proj__weight=(4, 3, 3, 7, 7), pos_encoding__class_token=(4,), head__1__weight=(400, 4))
VIT = tensors(blocks__0__attn__qkv__weight=(6, 2), patch_embed__proj__weight=(2, 3, 2, 16, 16), head__weight=(400, 2))
VIDEOMAE = tensors(videomae__encoder__layer__0__x=(2,), videomae__embeddings__patch_embeddings__projection__weight=(2,))
RESNET = tensors(layer1__0__conv1__weight=(2, 3, 3, 3), fc__weight=(1000, 2))


def write(path: Path, content: object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)  # type: ignore[arg-type]
    else:
        torch.save(content, path)
    return path


FOREIGN: dict[str, tuple[object, list[str]]] = {
    "a.safetensors": (TORCHVISION, ["a .safetensors file (MViT of torchvision)", "head.1 (400)", "own (docs/backbones.md)"]),
    "b.pth": (
        {"state_dict": {f"module.{n}": t for n, t in VIT.items()}, "epoch": 3, "optimizer": {"state": {}}},
        ["vision transformer", "(from state_dict without module.)", "epoch 3, optimizer (1 entries)", "head (400)"],
    ),
    "c.bin": (VIDEOMAE, ["a torch archive (VideoMAE of transformers)", "2 tensors, 4 numbers, float32"]),
    "d.pt": ({"model": RESNET, "model_ema": RESNET}, ["ResNet", "fc (1000)", "'model_ema' as well"]),
    "e.pyth": ({"model_state": RESNET, "x": Harmful()}, ["holds Python objects beside tensors, which could run code"]),
    "f.pyth": (b"<!DOCTYPE html><html></html>", ["a web page", "download the weights again"]),
    "g.pyth": (b"", ["an empty file"]),
    "h.pt": (b"version https://git-lfs.github.com/spec/v1\n", ["a pointer of Git LFS", "git lfs pull"]),
    "i.h5": (b"\x89HDF\r\n", ["an HDF5 file"]),
    "j.pyth.gz": (b"\x1f\x8b\x08", ["a gzip file", "unpack it"]),
    "k.pyth": (b"no weights", ["cannot be read as weights"]),
    "l.pt": ({"words": "only"}, ["is not a checkpoint of a model"]),
    "m.safetensors": (b"\x10\0\0\0\0\0\0\0{}              ", ["a .safetensors file", "there is no tensor in it"]),
    "n.safetensors": (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", ["cannot be read as weights", "not a whole .safetensors file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_is_named_and_not_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = FOREIGN[name]
    found = inspect(write(tmp_path / name, content))
    text = "\n".join(found.lines())
    for part in expected:
        assert part in text, text
    assert found.problem is not None
    assert text.count("problem") == 1
    assert not (tmp_path / "harm-was-done").exists()


def test_a_hostile_header_is_only_text(tmp_path: Path) -> None:
    names = {"{0.__class__}": torch.zeros(1), "a." * 200_000: torch.zeros(1), "blocks.1\x1b[31m.x": torch.zeros(1)}
    save_file(names, tmp_path / "x.safetensors", {"{0.__class__.__mro__}": "{path}"})
    found = inspect(tmp_path / "x.safetensors")
    assert found.kind == "a .safetensors file"
    assert found.beside == ("{0.__class__.__mro__} in its header",)
    os.mkfifo(tmp_path / "pipe.pyth")
    assert "neither a file nor a folder" in str(inspect(tmp_path / "pipe.pyth").problem)


def test_folders_of_other_programs_are_named(tmp_path: Path) -> None:
    deepspeed, transformers, distributed = (tmp_path / name for name in ("ds", "hf", "dcp"))
    (deepspeed / "global_step4").mkdir(parents=True)
    write(deepspeed / "global_step4" / "mp_rank_00_model_states.pt", {"a": Harmful()})
    (deepspeed / "latest").write_text("global_step4")
    transformers.mkdir()
    (transformers / "config.json").write_text('{"model_type": "videomae", "architectures": ["VideoMAEModel"]}')
    write(transformers / "model.safetensors", VIDEOMAE)
    distributed.mkdir()
    (distributed / ".metadata").write_bytes(b"")
    (distributed / "__0_0.distcp").write_bytes(b"")
    for folder, said in (
        (deepspeed, "a checkpoint of DeepSpeed"),
        (transformers, "the transformers library (VideoMAEModel)"),
        (distributed, "a distributed checkpoint of torch"),
    ):
        found = inspect(folder)
        assert said in found.kind
        assert found.problem
        if folder != transformers:
            assert inspect(folder).tensors == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no checkpoint" in str(inspect(empty).problem)


def test_weights_that_are_read_here_have_no_problem(joint_pyth: Path, tmp_path: Path) -> None:
    run = write_random_run(tmp_path)
    (checkpoint,) = (run / "checkpoints").glob("update-*")
    convert(run, tmp_path / "one.safetensors")
    official = release(tmp_path)
    heads = {"stride": 5, "segment": 3, "with.dot": 4}
    kinds = {
        run: ("weights of MultiTrain (checkpoints/update-", heads),
        checkpoint: ("weights of MultiTrain (model.safetensors)", heads),
        tmp_path / "one.safetensors": ("weights of MultiTrain", heads),
        joint_pyth: ("the published code of MultiTrain", {"kinetics": 400, "mit": 305, "ssv2": 174}),
        official: ("an official MViT or MViTv2", {"kinetics": 5}),
    }
    for path, (kind, classes) in kinds.items():
        found = inspect(path)
        assert kind in found.kind
        assert (found.problem, dict(found.heads)) == (None, classes)
        assert found.lines()[-1] == "loads    with multitrain.load and init_from"
    assert "MViTv2, 4 blocks of 16 to 64 channels, clips of 4 × 32²" in "\n".join(inspect(official).lines())
    renamed = official.rename(tmp_path / "release.pt")
    assert inspect(renamed).problem == "only files called .pyth are loaded; rename it to release.pyth"


def test_a_release_without_its_text_is_recognised_by_its_names(tmp_path: Path) -> None:
    content = torch.load(release(tmp_path), weights_only=True)
    file = write(tmp_path / "bare.pyth", {"model_state": content["model_state"]})
    found = inspect(file)
    assert "MViT or MViTv2 of PySlowFast" in found.kind
    assert found.network == "4 blocks of 16 to 64 channels, for clips"
    assert (found.problem, dict(found.heads)) == (None, {"head.projection": 5})


@pytest.mark.parametrize("name", ["mvitv2_s", "mvitv2_b", "mvitv2_l", "mvit_b16_16x4", "mvit_b24_32x3"])
def test_the_override_that_chooses_a_network_is_named(name: str) -> None:
    config = compose([f"model={name}"]).model
    other = config.model_copy(update={"channels": "bgr", "head": "linear", "drop_path": 0.3})
    assert preset(other) == f"model={name}"
    assert preset(config.model_copy(update={"frames": 6})) == ""


def test_nothing_at_a_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder, nor a run of that name"):
        inspect(tmp_path / "nothing.pyth")


@pytest.fixture
def load(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*words: object) -> Said:
        status = cli.main(["load", *map(str, words)])
        return status, *capsys.readouterr()  # type: ignore[return-value]

    return run


def test_the_verb_says_what_a_run_would_load_and_its_exit_status_whether_it_would(
    load: Callable[..., Said], tmp_path: Path
) -> None:
    config = compose(["experiment=k400", "model=mvitv2_s"])
    state = {n: torch.zeros(s) for n, s in layout(config.model, {"kinetics": 7}).items() if not n.startswith("heads.")}
    file = write(tmp_path / "MViTv2.pyth", {"model_state": state})
    status, out, _ = load("--check", file)
    assert (status, out.splitlines()[-1].startswith("loads    with init_from, in the network that model=")) == (0, True)
    status, out, _ = load("--check", file, "experiment=k400", "model=mvitv2_s")
    assert status == 0
    assert f"run      init_from: {len(state)} tensors copied, 2 left at their initial values (heads.kinetics)" in out
    assert "  fresh: heads.kinetics.weight" in out.splitlines()
    status, out, _ = load("--check", file, "experiment=k400", "model=mvitv2_b")
    assert status == 1
    assert "problem  a run would refuse it: " in out
    assert "  blocks.16.norm1.weight: not in the file; this network needs it" in out.splitlines()
    assert load("--check", tmp_path / "nothing.pyth")[0] == 2
    status, _, err = load("--check", file, "model.dept=3")
    assert (status, err.count("\n")) == (2, 1)


def test_the_result_is_one_json_object(load: Callable[..., Said], joint_pyth: Path) -> None:
    status, out, _ = load("--check", joint_pyth, "--json")
    found = json.loads(out)
    assert (status, found["problem"], found["run"]) == (0, None, None)
    assert found["heads"] == {"kinetics": 400, "mit": 305, "ssv2": 174}
    status, out, _ = load("--check", joint_pyth, "--json", "experiment=k400")
    assert status == 1
    assert json.loads(out)["run"]["problem"]
