"""All readers of user input: the functions, and the command lines that call them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from benchmarks.fuzzing.judge import Call
from benchmarks.fuzzing.material import CLASSES, TEXTS, Material, videos
from launch import resume
from multitrain import cli
from multitrain.config import ConfigError, DatasetConfig, compose, load
from multitrain.config.class_names import read_class_names
from multitrain.data import decode, packs
from multitrain.data.catalog import Catalog
from multitrain.data.tools import importing
from multitrain.engine import checkpoint as checkpoints
from multitrain.engine import unreadable
from multitrain.evaluation.scored import read_evaluation
from multitrain.interop.pyslowfast import read_published
from multitrain.interop.weights import read_weights
from multitrain.order.batch import BatchShapeError
from multitrain.records import events, metrics

REFUSALS: tuple[type[Exception], ...] = (ConfigError, decode.VideoError, BatchShapeError)
"""Exceptions with which a reader may refuse its input; a user sees any other as a traceback."""


class Reader(NamedTuple):
    seeds: list[bytes]
    """Valid inputs."""
    call: Call
    every: int = 1
    """The reader takes part in every n-th round of cases; more than 1 for slow readers."""


def readers(material: Material) -> dict[str, Reader]:
    """All readers by name; those of command lines begin with the command."""
    kinds = (_texts, _files, _packs, _videos, _commands)
    called = {name: reader for kind in kinds for name, reader in kind(material)}
    return {
        **called,
        **{f"$ {name}": Reader(called[name].seeds, partial(_shelled, called[name].call), 50) for name in SHELLED},
    }


# -------------------------------------------------------------------------------------------------------- functions


def _texts(_: Material) -> Iterator[tuple[str, Reader]]:
    calls: dict[str, Call] = {
        "csv": partial(_catalog, False),
        "multi-label csv": partial(_catalog, True),
        "class list": partial(_file, "classes.txt", read_class_names),
        "class list json": partial(_file, "classes.json", read_class_names),
        "yaml group": _group,
        "overrides": lambda folder, data: compose(words(data)),
    }
    for name, call in calls.items():
        yield name, Reader([text.encode() for text in TEXTS[name]], call)
    for form in ("kinetics", "moments", "something", "activitynet"):
        yield f"import {form}", Reader([text.encode() for text in TEXTS[form]], partial(_import, form))


def words(data: bytes) -> list[str]:
    """A command line with one word per line. NUL bytes, which the system cannot pass, are removed."""
    return [os.fsdecode(line) for line in data.replace(b"\0", b"").split(b"\n") if line]


def _file(name: str, read: Callable[[Path], Any], folder: Path, data: bytes) -> None:
    (folder / name).write_bytes(data)
    read(folder / name)


def _catalog(multi_label: bool, folder: Path, data: bytes) -> None:
    (folder / "train.csv").write_bytes(data)
    (folder / "c.mp4").touch()
    dataset = DatasetConfig(annotations=str(folder), videos=str(folder), classes=5, multi_label=multi_label)
    catalog = Catalog.open(dataset, "mine", "train", folder / "index")
    for i in range(min(3, len(catalog))):
        catalog.path(i)


def _group(folder: Path, data: bytes) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/mine.yaml").write_bytes(data)
    compose(["data=mine"], config_dirs=[folder])


def _import(form: str, folder: Path, data: bytes) -> None:
    suffix = ".csv" if form in ("kinetics", "moments") else ".json"
    file, names = folder / f"train{suffix}", folder / "names.txt"
    file.write_bytes(data)
    names.write_text("flipping,0\nrun,1\n")
    if form == "something":
        names = folder / "labels.json"
        names.write_text('{"Holding something next to something": "0"}')
    importing.read(form, [file], names if form in ("moments", "something") else None)


def _files(material: Material) -> Iterator[tuple[str, Reader]]:
    run = material.run
    of_checkpoint = material.checkpoint.relative_to(run)
    of_scores = material.evaluation.relative_to(run)
    targets: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "config.yaml": (Path("config.yaml"), load),
        "events": (Path("events.jsonl"), lambda r: events.read(r / "events.jsonl")),
        "metrics": (Path("metrics.jsonl"), lambda r: metrics.read(r / "metrics.jsonl")),
        "manifest": (of_checkpoint / "manifest.json", _newest),
        "state": (of_checkpoint / "state.json", _with_manifest),
        "checkpoint weights": (of_checkpoint / "model.safetensors", _with_manifest),
        "skipped.jsonl": (
            Path("skipped.jsonl"),
            lambda r: unreadable.UnreadableTracker({"stride": 9}, 0.5).add_file(r / "skipped.jsonl"),
        ),
        "overrides.yaml": (Path("overrides.yaml"), resume.history),
        "results": (of_scores / "metrics.json", lambda r: read_evaluation(r / of_scores)),
        "scores": (of_scores / "stride/scores.npz", lambda r: read_evaluation(r / of_scores)),
    }
    for name, (target, read) in targets.items():
        yield name, Reader([(run / target).read_bytes()], partial(_in_copy, run, target, read))
    weights = material.safetensors
    config = weights.with_suffix(".json") if weights.with_suffix(".json").exists() else weights.parent / "config.json"
    yield ".pyth", Reader([material.pyth.read_bytes()], partial(_file, "m.pyth", read_published))
    yield "safetensors", Reader([weights.read_bytes()], partial(_beside, config, weights))
    plain = material.folder / "plain" / weights.name  # which nothing but config.json describes
    plain.parent.mkdir(exist_ok=True)
    save_file(load_file(weights), plain)
    yield "config.json", Reader([config.read_bytes()], partial(_beside, plain, config))


def _in_copy(tree: Path, target: Path, read: Callable[[Path], Any], folder: Path, data: bytes) -> Any:
    """Call `read` on a copy of `tree` in which the file `target` contains `data`."""
    copy = folder / tree.name
    shutil.copytree(tree, copy, copy_function=os.link)
    (copy / target).unlink()
    (copy / target).write_bytes(data)
    return read(copy)


def _newest(run: Path) -> None:
    """Read the newest valid checkpoint of a run."""
    folder, _ = checkpoints.newest_verified(run / "checkpoints")
    if folder is not None:
        checkpoints.read(folder)


def _with_manifest(run: Path) -> None:
    """Read a checkpoint whose manifest was rewritten to match its files, as an attacker could do."""
    folder = checkpoints.listed(run / "checkpoints")[0]
    state = checkpoints.json.loads((folder / "manifest.json").read_text())
    for name in state["files"]:
        content = (folder / name).read_bytes()
        state["files"][name] = {**state["files"][name], "bytes": len(content), **_digest(state["files"][name], content)}
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(checkpoints.json.dumps(state))
    _newest(run)


def _digest(entry: dict[str, Any], content: bytes) -> dict[str, str]:
    import hashlib

    return {name: hashlib.new(name, content).hexdigest() for name in entry if name in hashlib.algorithms_available}


def _beside(other: Path, file: Path, folder: Path, data: bytes) -> None:
    """Read the model from `file`, which contains `data`, and `other`."""
    shutil.copy(other, folder / other.name)
    (folder / file.name).write_bytes(data)
    read_weights(folder / next(name for name in (file.name, other.name) if name.endswith(".safetensors")))


def _packs(material: Material) -> Iterator[tuple[str, Reader]]:
    for file in sorted(f for f in material.pack.iterdir() if f.is_file() and f.name[0] != "."):
        kind = "pack shard" if file.suffix == ".tar" else f"pack {file.name}"
        yield kind, Reader([file.read_bytes()], partial(_in_copy, material.pack, Path(file.name), _unpacked))
    shard = next(material.pack.glob("*.tar"))
    yield "tar without index", Reader([shard.read_bytes()], partial(_file, "loose.tar", _member))


def _unpacked(folder: Path) -> None:
    packs.forget()
    pack = packs.open_pack(folder)
    for name in videos() if pack is None else [stored.name for stored in pack][:9]:
        _frames(folder / name)


def _member(tar: Path) -> None:
    packs.forget()
    _frames(Path(f"{tar}::{videos()[0]}"))


def _videos(material: Material) -> Iterator[tuple[str, Reader]]:
    for name in videos():
        yield f"video {name}", Reader([(material.videos / name).read_bytes()], partial(_file, name, _frames))


def _frames(path: Path) -> None:
    with decode.open_video(path) as video:
        count = video.frame_count
        video.frames([0, count // 2, count - 1])


# ----------------------------------------------------------------------------------------------------- command lines


def _commands(material: Material) -> Iterator[tuple[str, Reader]]:
    run, overrides = material.run, [text.encode() for text in TEXTS["overrides"]]
    yield "submit WORDS", Reader(overrides, lambda folder, data: _submit([*words(data), "dry_run=true"]))
    yield "submit data", Reader([_group_of(material).encode()], _submit_data, 2)
    yield (
        "flops WORDS",
        Reader(
            [b"model.depth=3\nmodel.stages=[1]\nmodel.frames=4\nmodel.crop=64"],
            lambda folder, data: main("flops", *words(data)),
            20,
        ),
    )
    for name in videos():
        seed = (material.videos / name).read_bytes()
        yield f"predict {name}", Reader([seed], partial(_predict, material, name), 2)
    yield "predict .pyth", Reader([material.pyth.read_bytes()], partial(_predict_by, material), 5)
    for verb in ("status", "report", "compare"):
        for file in ("events.jsonl", "metrics.jsonl", "config.yaml"):
            call = partial(_in_copy, run, Path(file), partial(_verb_of_run, verb))
            yield f"{verb} {file}", Reader([(run / file).read_bytes()], call, 50 if verb == "report" else 2)
    yield "data check csv", Reader([b"stride.mp4 0\nother.mp4 1\n", b"a.mp4 0\n"], partial(_check, material))
    yield "data resize segments", Reader([TEXTS["segments"][0].encode()], _resize, 5)
    listed = "".join(f"{material.videos / name}\n" for name in videos()[:2]).encode()
    yield "embed --list", Reader([listed], partial(_embed, material), 2)
    yield "data import csv", Reader([TEXTS["kinetics"][0].encode()], _import_verb)
    yield "convert .pyth", Reader([material.pyth.read_bytes()], _convert, 5)


SHELLED = ("submit WORDS", "predict h264.mp4", "status events.jsonl", "data check csv", "convert .pyth")
"""Command lines that are also run in a separate process."""

_ROOT = Path(__file__).resolve().parents[2]
_shell = ContextVar("shell", default=False)


def _shelled(call: Call, folder: Path, data: bytes) -> int:
    """`call` with the command started as from a shell."""
    token = _shell.set(True)
    try:
        return int(call(folder, data))
    finally:
        _shell.reset(token)


def main(*arguments: str | Path) -> int:
    """Run a command in this or in a separate process; return its exit status."""
    words = [str(a) for a in arguments]
    if not _shell.get():
        return cli.main(words)
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "multitrain", *words]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode


def _group_of(material: Material) -> str:
    """A YAML group of an existing dataset."""
    place = material.folder / "data/stride"
    return f"datasets:\n  mine: {{annotations: {place}, videos: {place}, classes: 5, flip: true}}\nworkers: 2\n"


def _submit_data(folder: Path, data: bytes) -> int:
    (folder / "data").mkdir()
    (folder / "data/mine.yaml").write_bytes(data)
    words_ = ["data=mine", f"runs={folder}/runs", "cluster=local", "nodes=1", "gpus=1", "dry_run=true"]
    return _submit([*words_, "--config-dir", str(folder)])


def _submit(arguments: list[str]) -> int:
    return main("submit", *arguments)


def _predict(material: Material, name: str, folder: Path, data: bytes) -> int:
    (folder / name).write_bytes(data)
    return main("predict", folder / name, "--checkpoint", material.safetensors)


def _predict_by(material: Material, folder: Path, data: bytes) -> int:
    (folder / "m.pyth").write_bytes(data)
    return main("predict", material.videos / videos()[0], "--checkpoint", folder / "m.pyth")


def _verb_of_run(verb: str, run: Path) -> int:
    flags = ["--out", run.parent / "page", "--clips", "0"] if verb == "report" else []
    runs = [run, run] if verb == "compare" else [run]
    return main(verb, *runs, *flags)


def _check(material: Material, folder: Path, data: bytes) -> int:
    for split in ("train", "val", "test"):
        (folder / f"{split}.csv").write_bytes(data)
    shutil.copy(material.videos / videos()[0], folder / "stride.mp4")
    (folder / "data").mkdir()
    group = f"datasets: {{mine: {{annotations: {folder}, videos: {folder}, classes: 5}}}}\n"
    (folder / "data/mine.yaml").write_text(group)
    return main("data", "check", "data=mine", "--config-dir", folder, "--workers", "1", "--out", folder / "out")


def _resize(folder: Path, data: bytes) -> int:
    """There is no video to cut: the lines are read, and each fails."""
    (folder / "videos").mkdir()
    (folder / "segments.csv").write_bytes(data)
    flags = ["--segments", folder / "segments.csv", "--workers", "1"]
    return main("data", "resize", folder / "videos", folder / "out", *flags)


def _embed(material: Material, folder: Path, data: bytes) -> int:
    (folder / "list.txt").write_bytes(data)
    return main("embed", material.safetensors, "--list", folder / "list.txt", "--out", folder / "features.npz")


def _import_verb(folder: Path, data: bytes) -> int:
    (folder / "train.csv").write_bytes(data)
    return main("data", "import", "kinetics", folder / "train.csv", "--out", folder / "out")


def _convert(folder: Path, data: bytes) -> int:
    (folder / "m.pyth").write_bytes(data)
    return main("convert", folder / "m.pyth", folder / "m.safetensors")


__all__ = ["CLASSES", "REFUSALS", "Reader", "main", "readers", "words"]
