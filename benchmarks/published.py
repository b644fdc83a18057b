"""Read the values that the published code computed: the complete folder, and the small one that ships with the tests.

python -m benchmarks.published [--golden DIR] [--out DIR]

writes the small folder (`tests/published`, under 2 MB) from the complete one: all weights, losses, gradients and updates of the
single-dataset model; everything of the joint model that needs no backbone; every 101st element and a digest of arrays of pixels; the
two videos, losslessly encoded again with only the pictures that three views use; names and shapes of the released models. Clips of
noise are generated again from their seed. No file is copied unchanged.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "published"
WHOLE = ROOT.parent / "shared" / "golden"
SINGLE, JOINT = "tiny_k400_32x3", "tiny_multi"
INPUT_SEED, IMAGE_SEED = 1234, 3
EVERY = 101
"""Stride of the elements of an array of pixels in the small folder; coprime to its sides."""
ENTRIES = 8
"""Number of leading entries of each gradient in the values, and of hidden units of the joint model's heads in the small folder."""
CLASSES = 2
"""Number of leading rows and columns of the joint model's projections in the small folder."""


class Sample(NamedTuple):
    """Part of a large array."""

    shape: tuple[int, ...]
    values: Tensor
    """Every :data:`EVERY`-th element of the flat array."""
    sha256: str
    """Digest of all bytes; only a bit-equal result has the same."""


def matching(ours: Any, theirs: Tensor | Sample) -> tuple[np.ndarray, np.ndarray]:
    """Our array and theirs, both thinned where theirs is a sample; another shape is a ValueError."""
    a = np.asarray(ours)
    if isinstance(theirs, Sample):
        if a.shape != theirs.shape:
            raise ValueError(f"shape {a.shape}, not {theirs.shape}")
        return a.reshape(-1)[::EVERY], theirs.values.numpy()
    return a, np.asarray(theirs)


def same_bits(ours: np.ndarray, theirs: Tensor | Sample) -> bool:
    """Whether every element is equal."""
    if isinstance(theirs, Sample):
        return ours.shape == theirs.shape and digest(ours) == theirs.sha256
    return np.array_equal(ours, theirs.numpy())


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def noise(seed: int, *shape: int) -> Tensor:
    """Normal float32 numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- reading ----------------------------------------------------------------------------------------------------------


def models(folder: Path) -> list[str]:
    """Names of the models of which `folder` has weights and values."""
    found = {p.name.partition(".")[0] for p in (*folder.glob("*.golden.pt"), *folder.glob("*.npz"))}
    return sorted(name for name in found if (folder / f"{name}.pyth").is_file())


def has_data(folder: Path) -> bool:
    """Whether `folder` has the values of views and augmentation."""
    return any((folder / name).is_file() for name in ("data.golden.pt", "data.npz"))


def values(folder: Path, name: str) -> dict[str, Any]:
    """What the published code computed for a model, or with ``name="data"`` for the views and the augmentation.

    Arrays of pixels of the small folder are a :class:`Sample`.
    """
    if (folder / f"{name}.golden.pt").is_file():
        whole: dict[str, Any] = torch.load(folder / f"{name}.golden.pt", weights_only=False)
        return whole
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    rest = json.loads(arrays.pop("rest").tobytes())
    read: dict[str, Any] = _tensors(rest, {k: torch.from_numpy(a) for k, a in arrays.items()}, "")
    if name == "data":
        read["spatial"]["x"] = noise(IMAGE_SEED, 3, 2, 50, 83)
    else:
        read["input"] = noise(INPUT_SEED, 6, 3, 8, 64, 64)
    return read


def _tensors(node: Any, arrays: Mapping[str, Tensor], where: str) -> Any:
    if isinstance(node, dict) and "sha256" in node:
        return Sample(tuple(node["shape"]), arrays[where], node["sha256"])
    if isinstance(node, dict) and "array" in node:
        return arrays[where]
    if isinstance(node, dict) and "values" in node:
        return torch.tensor(node["values"])
    if isinstance(node, dict):
        return {k: _tensors(v, arrays, f"{where}/{k}") for k, v in node.items()}
    return [_tensors(v, arrays, f"{where}/{n}") for n, v in enumerate(node)] if isinstance(node, list) else node


def names(folder: Path = SMALL) -> dict[str, dict[str, dict[str, Any]]]:
    """``tensors``: names and shapes of the released models ``multi`` and ``k400``; ``options``: kinds of the values in a cfg."""
    read: dict[str, dict[str, dict[str, Any]]] = json.loads(gzip.decompress((folder / "names.json.gz").read_bytes()))
    return read


# -- writing ----------------------------------------------------------------------------------------------------------


def _split(node: Any, where: str, arrays: dict[str, np.ndarray], thin: int, whole: tuple[str, ...]) -> Any:
    """`node` for JSON; its larger tensors go to `arrays`, those of more than `thin` elements as a sample."""
    if isinstance(node, Tensor):
        if node.numel() <= ENTRIES:  # a file of its own costs more
            return {"values": node.tolist()}
        array, thinned = node.numpy(), node.numel() > thin and where not in whole
        arrays[where] = array.reshape(-1)[::EVERY] if thinned else array
        return {"shape": list(array.shape), "sha256": digest(array)} if thinned else {"array": True}
    if isinstance(node, dict):
        return {str(k): _split(v, f"{where}/{k}", arrays, thin, whole) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_split(v, f"{where}/{n}", arrays, thin, whole) for n, v in enumerate(node)]
    return node


def _write(path: Path, content: dict[str, Any], thin: int = 10**9, whole: tuple[str, ...] = ()) -> None:
    arrays: dict[str, np.ndarray] = {}
    rest = json.dumps(_split(content, "", arrays, thin, whole))
    np.savez_compressed(path, rest=np.frombuffer(rest.encode(), np.uint8), **arrays)


def _kept(whole: dict[str, Any]) -> dict[str, Any]:
    """The values of a model without its clips and its text."""
    kept = {k: v for k, v in whole.items() if k not in ("cfg", "torch", "input", "optimizer_groups")}
    kept["steps"] = [{k: float(v) for k, v in step.items()} for step in whole["steps"]]
    return kept


def _parts(state: dict[str, Tensor], datasets: Mapping[str, int]) -> dict[str, Tensor]:
    """First hidden units and classes of the joint model's heads, projections and expander."""
    parts = {}
    for name in (*(f"head.heads.{d}" for d in datasets), "expander"):
        parts |= {f"{name}.fc1.{p}": state[f"{name}.fc1.{p}"][:ENTRIES].clone() for p in ("weight", "bias")}
    for a in datasets:
        for b in (b for b in datasets if b != a):
            weight = state[f"head.cross_dataset_heads.{a}_{b}.weight"]
            parts[f"rows.{a}_{b}"] = weight[:CLASSES].clone()
            parts[f"columns.{a}_{b}"] = weight[:, :CLASSES].clone()
    return parts


def _write_models(golden: Path, out: Path) -> None:
    from multitrain.interop.pyslowfast import read_published, write_pyth
    from multitrain.interop.pyslowfast_config import make_cfg

    file = read_published(golden / f"{SINGLE}.pyth")
    cfg = yaml.safe_load(make_cfg(file.config, file.datasets, tested=None))
    cfg["SOLVER"] = {k: v for k, v in file.settings["SOLVER"].items() if isinstance(v, (int, float))}
    write_pyth(
        out / f"{SINGLE}.pyth", file.config, file.datasets, file.state, epoch=file.epoch, cfg=yaml.safe_dump(cfg)
    )
    single = _kept(values(golden, SINGLE))
    for case in ("train_mixup", "train_cutmix"):
        single[case]["logits"] = {}
    _write(out / f"{SINGLE}.npz", single)
    joint = _kept(values(golden, JOINT))
    state = torch.load(golden / f"{JOINT}.pyth", weights_only=True)["model_state"]
    joint["parts"] = _parts(state, {"kinetics": 400, "mit": 305, "ssv2": 174})
    for doubled in ("eval_probs", "eval_logits", "eval_inf_feature", "eval_blocks", "params_after_steps", "masks"):
        joint.pop(doubled)
    for case in ("train_mixup", "train_cutmix"):  # what the mixing of labels is compared with
        joint[case] = {k: v for k, v in joint[case].items() if k in ("lam", "lam_raw", "box", "labels", "input_sum")}
    _write(out / f"{JOINT}.npz", joint)


def _write_data(golden: Path, out: Path) -> None:
    data = values(golden, "data")
    data["spatial"].pop("x")
    data["test"] = {case: [v for v in views if v["st_idx"] in VIEWS[case]] for case, views in data["test"].items()}
    _write(out / "data.npz", data, thin=1000, whole=("/randaug_image",))
    for case, views in data["test"].items():
        path = Path("videos") / views[0]["path"]
        _write_video(golden / path, out / path, _shown(golden / path, case))


VIEWS = {"kinetics_1x5": (0, 2, 4), "ssv2_3x1": (0, 1, 2)}
"""Views of a video in the small folder."""


def _shown(path: Path, case: str) -> set[int]:
    """Frames that these views take, as our own code picks them: what is written is compared with the whole folder's values."""
    from multitrain.config import DataConfig, DatasetConfig
    from multitrain.data.decode import open_video
    from multitrain.data.frames import view_indices

    kind: dict[str, Any] = {"temporal_views": 5} if case == "kinetics_1x5" else {"sampling": "segment"}
    entry = DatasetConfig(annotations="a", videos="v", classes=1, **kind)
    with open_video(path) as video:
        taken = view_indices(entry, DataConfig(datasets={"d": entry}), video.frame_count, video.fps, 8)
    return {int(n) for n in (taken[list(VIEWS[case])] if len(taken) == 5 else taken).reshape(-1)}


LOSSLESS = {"qp": "0", "preset": "veryslow"}


def _write_video(source: Path, target: Path, shown: set[int]) -> None:
    """Every picture of `source` at its own time, without loss; those that no view takes repeat the one before."""
    import av

    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as container, av.open(str(target), "w") as written:
        stream = container.streams.video[0]
        copy = written.add_stream("libx264", rate=Fraction(stream.average_rate or 30))
        copy.width, copy.height, copy.pix_fmt, copy.options = stream.width, stream.height, "yuv420p", LOSSLESS
        kept = None
        for number, frame in enumerate(container.decode(stream)):
            kept = frame.to_ndarray() if kept is None or number in shown else kept
            again = av.VideoFrame.from_ndarray(kept, format="yuv420p")
            again.pts, again.time_base = frame.pts, frame.time_base
            written.mux(copy.encode(again))
        written.mux(copy.encode(None))


def _write_names(golden: Path, facts: Path, out: Path) -> None:
    """Names and shapes of the released models' tensors, and the kind of value of each option."""
    listings = {}
    for name in ("multi", "k400"):
        rows = (line.split(maxsplit=1) for line in (facts / f"reference-keys-{name}.txt").read_text().splitlines()[1:])
        listings[name] = {row[0]: yaml.safe_load(row[1]) for row in rows if row}
    cfg = yaml.safe_load(torch.load(golden / f"{JOINT}.pyth", weights_only=True)["cfg"])
    kinds = {
        s: {o: type(v).__name__ for o, v in options.items()} for s, options in cfg.items() if isinstance(options, dict)
    }
    text = json.dumps({"tensors": listings, "options": kinds}, separators=(",", ":"))
    (out / "names.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def main(arguments: list[str] | None = None) -> int:
    """Writes the small folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description="Write the small folder.")
    parser.add_argument("--golden", type=Path, default=WHOLE, help="the whole folder")
    parser.add_argument("--out", type=Path, default=SMALL, help="the small folder")
    given = parser.parse_args(arguments)
    if not given.golden.is_dir():
        print(f"{given.golden}: no such folder; give the published code's values with --golden", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    _write_models(given.golden, given.out)
    _write_data(given.golden, given.out)
    _write_names(given.golden, given.golden.parent / "facts", given.out)
    size = sum(p.stat().st_size for p in given.out.rglob("*") if p.is_file())
    print(f"{given.out}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
