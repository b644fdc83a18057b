"""Ours against the published code's values, quantity by quantity: writes docs/parity.md.

python -m benchmarks.parity [--golden DIR] [--out FILE] [--all]

The folder holds pairs NAME.pyth and NAME.golden.pt (weights, and what the published code computed with them), data.golden.pt
(views, augmentation) and its videos; or it is tests/published, the small form that `benchmarks/published.py` makes of such a
folder. Exit status 1 when a quantity is outside its tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import published
from multitrain.config import DataConfig, DatasetConfig, EngineConfig, LossConfig, ModelConfig, OptimConfig
from multitrain.data import randaugment_pil
from multitrain.data.randaugment import operation
from multitrain.data.spatial import Box, resize_crop, short_side_size, uniform_crop
from multitrain.data.views import load_views
from multitrain.engine.deepspeed import Engine
from multitrain.engine.schedule import Schedule
from multitrain.interop.layout import name_map
from multitrain.interop.pyslowfast import PublishedCheckpoint, read_published
from multitrain.loss import MultiDatasetLoss, Terms, informative_loss
from multitrain.model import MultiTrain

ROOT = Path(__file__).resolve().parents[1]
RELATIVE = 1e-5
"""Relative tolerance, by the largest value of a quantity."""
GRADIENT = 1e-7
"""Absolute tolerance of gradients: where the true gradient is zero, there are rounding errors only."""
PIXEL = 1e-5
"""Absolute tolerance of normalised pixels, which lie between -2 and 2.44."""
SHOWN = 5
"""Quantities of a section that the page lists without ``--all``: those with the largest differences."""
CASES = ("train_hard", "train_mixup", "train_cutmix")


@dataclass(frozen=True)
class Row:
    """One quantity."""

    what: str
    ours: str
    theirs: str
    difference: float
    """Largest absolute difference of any element."""
    relative: float
    """`difference` by the largest absolute value of theirs."""
    holds: bool


def tensors(what: str, ours: Any, theirs: Any, *, absolute: float = 0.0, relative: float = RELATIVE) -> Row:
    """Compare two arrays; the page shows their norms."""
    if np.shape(ours) != tuple(theirs.shape if isinstance(theirs, published.Sample) else np.shape(theirs)):
        return Row(what, f"shape {np.shape(ours)}", "another shape", float("nan"), float("nan"), False)
    a, b = (x.astype(np.float64) for x in published.matching(ours, theirs))
    difference = float(np.abs(a - b).max(initial=0.0))
    largest = float(np.abs(b).max(initial=0.0))
    holds = difference <= max(absolute, relative * largest)
    shown = ("" if a.ndim == 0 else "norm ") + "{:.8g}"
    values = (float(a), float(b)) if a.ndim == 0 else (np.linalg.norm(a), np.linalg.norm(b))
    share = difference / largest if largest else 0.0
    return Row(what, shown.format(values[0]), shown.format(values[1]), difference, share, holds)


class Golden:
    """A published model: ours with its weights, and the values that the published code computed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file: PublishedCheckpoint = read_published(folder / f"{name}.pyth")
        self.values: dict[str, Any] = published.values(folder, name)
        single = (
            len(self.file.datasets) == 1
            and "head.projection.weight"
            in torch.load(folder / f"{name}.pyth", weights_only=True, mmap=True)["model_state"]
        )
        self.names = name_map(self.file.config, self.file.datasets, single=single)
        clips = len(self.values["input"])
        ids = self.values["sample_dataset"] if len(self.file.datasets) > 1 else [0] * clips
        self.ids = torch.as_tensor(ids)
        multi = len(self.file.datasets) > 1
        self.loss = LossConfig() if multi else LossConfig(projection_weight=0, informative_weight=0)

    def model(self) -> MultiTrain:
        """With every dropout and drop-path probability 0, as the values were computed."""
        still = self.file.config.model_copy(update={"drop_path": 0.0, "head_dropout": 0.0})
        model = MultiTrain(still, self.file.datasets, multi_label=self.file.multi_label)
        model.load_state_dict(self.file.state)
        return model

    def clips(self, case: str) -> Tensor:
        clips: Tensor = self.values["input"]
        recipe = self.values[case]
        if case == "train_hard" or recipe.get("lam") is None:
            return clips
        if recipe["box"] is None:
            return clips * recipe["lam"] + clips.flip(0) * (1 - recipe["lam"])
        y0, y1, x0, x1 = recipe["box"]
        mixed = clips.clone()
        mixed[..., y0:y1, x0:x1] = clips.flip(0)[..., y0:y1, x0:x1]
        return mixed

    def terms(self, out: Any, case: str) -> Terms:
        labels = self.values[case].get("labels", self.values.get("labels"))
        targets = labels if isinstance(labels, dict) else {next(iter(self.file.datasets)): labels}
        return MultiDatasetLoss(self.file.datasets, self.loss)(out, targets, self.ids)


# -- the model --------------------------------------------------------------------------------------------------------


def evaluation(golden: Golden) -> Iterator[Row]:
    """Blocks, features, logits, probabilities and embeddings in eval mode."""
    model, values, seen = golden.model().eval(), golden.values, []
    hooks = [m.register_forward_hook(lambda _, __, out: seen.append(out)) for m in (model.patch_embed, *model.blocks)]
    with torch.no_grad():
        out = model.outputs(values["input"])
        probabilities = model(values["input"])
    for hook in hooks:
        hook.remove()
    for tokens, (name, shape, mean, std, corner) in zip(seen, values["eval_blocks"]):
        assert list(tokens.shape) == list(shape), name
        yield tensors(f"{name}: mean of its tokens", tokens.mean(), mean, absolute=1e-6)
        yield tensors(f"{name}: standard deviation", tokens.std(), std)
        yield tensors(f"{name}: first tokens", tokens[0, :2, :4], corner)
    yield tensors("features", out.features, values["eval_feature"])
    for name in golden.file.datasets:
        yield tensors(f"logits, {name}", out.logits[name], values["eval_logits"][name])
        yield tensors(f"probabilities, {name}", probabilities[name], values["eval_probs"][name])
    if out.expanded is not None:
        yield tensors("expander's output", out.expanded, values["eval_inf_feature"])


def training(golden: Golden, case: str) -> Iterator[Row]:
    """Logits, every loss term, and the gradient of every parameter."""
    model, expected = golden.model().train(), golden.values[case]
    out = model.outputs(golden.clips(case))
    logits = {**out.logits, **{f"{a}_{b}": z for (a, b), z in out.projected.items()}}
    for key, theirs in expected["logits"].items():
        yield tensors(f"logits, {key.replace('_', ' → ')}", logits[key].detach(), theirs)
    terms = golden.terms(out, case)
    found = {"loss_total": terms.total}
    if "loss_ce" in expected:
        found |= {"loss_ce": terms.classification, "loss_proj": terms.projection}
        found["loss_multihead"] = terms.classification + terms.projection
    if "inf_raw" in expected and out.expanded is not None:
        _, std_term, covariance_term = informative_loss(out.expanded)
        found |= {"inf_std_term": std_term, "inf_cov_term": covariance_term, "inf_raw": terms.informative}
        found["inf_weighted"] = golden.loss.informative_weight * terms.informative
    for key, ours in found.items():
        if key in expected:
            yield tensors(key, ours.detach(), expected[key])
    terms.total.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for theirs, first in expected["grad"].items():
        gradient = gradients[golden.names[theirs]]
        yield tensors(f"∂/∂ {theirs}", gradient.flatten()[: len(first)], first, absolute=GRADIENT)
        yield tensors(f"‖∂/∂ {theirs}‖", gradient.norm(), expected["grad_norm"][theirs], absolute=GRADIENT)


def steps(golden: Golden) -> Iterator[Row]:
    """Three updates by our engine (DeepSpeed, ZeRO-1, gloo) at the rates of our schedule."""
    solver = golden.file.settings["SOLVER"]
    optim = OptimConfig(
        lr=solver["BASE_LR"],
        start_lr=solver["WARMUP_START_LR"],
        end_lr=solver["COSINE_END_LR"],
        warmup_epochs=solver["WARMUP_EPOCHS"],
        weight_decay=solver["WEIGHT_DECAY"],
        clip_norm=solver["CLIP_GRAD_L2NORM"],
    )
    schedule = Schedule.of(optim, total=2 * int(solver["MAX_EPOCH"]), epoch_updates=2.0)
    model = golden.model().train()
    engine = Engine(model, optim, EngineConfig(), "fp32", torch.device("cpu"))
    idle = {
        n
        for n, p in model.named_parameters()
        if float(golden.values["train_hard"]["grad_norm"][_theirs(golden, n)]) < 1e-6
    }
    for number, step in enumerate(golden.values["steps"]):
        yield tensors(f"step {number + 1}: learning rate at epoch {number / 2}", schedule(number), step["lr"])
        loss = golden.terms(model.outputs(golden.clips("train_hard")), "train_hard").total
        yield tensors(f"step {number + 1}: loss", loss.detach(), step["loss"])
        engine.backward(loss)
        yield tensors(
            f"step {number + 1}: gradient norm before clipping", engine.update(schedule(number)), step["pre_clip_norm"]
        )
    room = 4 * sum(step["lr"] for step in golden.values["steps"])
    state = engine.copy_weights({})
    for theirs, first in golden.values["params_after_steps"].items():
        ours = golden.names[theirs]
        what = f"after three steps: {theirs}" + (" *" if ours in idle else "")
        yield tensors(what, state[ours].flatten()[: len(first)], first, absolute=room if ours in idle else 2e-7)


def _theirs(golden: Golden, ours: str) -> str:
    return next(theirs for theirs, own in golden.names.items() if own == ours)


# -- the data ---------------------------------------------------------------------------------------------------------


def views(values: dict[str, Any], folder: Path, decoder: Any) -> Iterator[Row]:
    """Test-time views of the videos."""
    model = ModelConfig(frames=8, crop=64, depth=4, stages=(1, 3))
    for case, expected in values["test"].items():
        temporal, spatial = {"1x5": (5, 1), "3x1": (1, 3), "3x2": (2, 3)}[case.rsplit("_", 1)[1]]
        is_ssv2 = case.startswith("ssv2")
        entry = DatasetConfig(
            annotations="a",
            videos="v",
            classes=1,
            sampling="segment" if is_ssv2 else "stride",
            temporal_views=temporal,
            spatial_views=spatial,
            test_short_side=256 if spatial == 1 and not is_ssv2 else None,
        )
        path = folder / "videos" / expected[0]["path"]
        own = load_views(path, entry, DataConfig(datasets={"d": entry}, decoder=decoder), model)
        for view in expected:
            what = f"{case}, view {view['st_idx']} ({decoder})"
            yield tensors(what, own[view["st_idx"]], view["frames"], absolute=PIXEL)


def augmentations(values: dict[str, Any]) -> Iterator[Row]:
    """Every RandAugment operation, bit for bit, with the exact backend."""
    image = values["randaug_image"].numpy()[None]
    for name, case in values["randaug"].items():
        theirs, sign = name.rsplit("_", 1)
        own_name = theirs.removesuffix("Increasing").removesuffix("Rel")
        op = operation(own_name, 7.0, -1.0 if sign == "a" else 1.0, increasing=True)
        yield tensors(
            f"{theirs}{tuple(case['args'])}", randaugment_pil.apply(image, [op])[0], case["out"], relative=0.0
        )


def primitives(spatial: dict[str, Any]) -> Iterator[Row]:
    """Short-side resizes, uniform crops, random resized crops."""
    x = spatial["x"]
    height, width = x.shape[2:]
    for key, theirs in spatial.items():
        if key.startswith("short"):
            size = short_side_size(height, width, int(key.removeprefix("short")))
            yield tensors(f"short side {key.removeprefix('short')}", _resized(x, size), theirs, absolute=PIXEL)
        elif key.startswith("crop"):
            turned = key.startswith("cropT")
            side, position = (int(v) for v in key.removeprefix("cropT" if turned else "crop").split("_"))
            frames = x.permute(3, 2, 0, 1) if turned else x.permute(2, 3, 0, 1)
            box = uniform_crop(*frames.shape[:2], side, position)
            what = f"crop {side} at {position} of {frames.shape[0]}×{frames.shape[1]}"
            yield tensors(what, box.cut(frames.numpy()).transpose(2, 3, 0, 1), theirs, relative=0.0)
    top, left, h, w = spatial["rrc_params_50x83"][4]
    own = _resized(x[:, :, top : top + h, left : left + w], tuple(spatial["rrc_seed4"].shape[2:]))
    yield tensors("random resized crop", own, spatial["rrc_seed4"], absolute=PIXEL)


def _resized(x: Tensor, size: tuple[int, ...]) -> np.ndarray:
    frames = x.permute(1, 2, 3, 0).contiguous().numpy()
    whole = Box(0, 0, size[0], size[1])
    return np.stack([resize_crop(f, whole[2:], whole) for f in frames]).transpose(3, 0, 1, 2)


# -- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Parity with the published code

Written by `python -m benchmarks.parity`; do not edit. *Theirs* is what the published code (commit 1672311) computed on a CPU in
fp32 with the same weights, clips and labels; *ours* is computed now, by the code that trains and tests. Tensors are shown by
their norm. *Difference* is the largest absolute difference of any element, *relative* the same by the largest value of theirs.
A quantity holds when it is within {relative:g} of the largest value; gradients within {gradient:g}, pixels within {pixel:g}
absolutely; RandAugment and crops in every bit.

The first table counts all quantities; below it are the {shown} of each section that differ most. `--all --out FILE` lists every one.

`python -m benchmarks.parity --golden tests/published --out FILE` compares with the part of these values that ships with the tests
(all of the single model, and of the joint one its loss, projections and hidden layers); the tests do so in every run.

Frames are not among these quantities where the decoder differs: of MPEG-4 in AVI (UT-Interaction), decord returns pictures one to
three frames too early after a seek, and so does the published code; in 26 of 26 such files our frames differ from its with
`data.decoder=pyav`, which shows what ffmpeg shows, and in 21 with `data.decoder=decord`. Edit lists and AV1 differ too.

{summary}
"""
STARRED = (
    "\\* The true gradient is zero here (softmax does not see a bias of all keys, the covariance no shift), and AdamW divides by "
    "the gradient's size: the sign of a rounding error decides each step, in the published code as in ours.\n"
)


def page(sections: dict[str, list[Row]], shown: int | None = SHOWN) -> str:
    """The whole page: a table of the worst of each section, then the `shown` quantities of each that differ most (None: all)."""
    lines = ["| | quantities | outside | largest relative difference | of |", "|---|---|---|---|---|"]
    for title, rows in sections.items():
        worst = max((r for r in rows if not r.what.endswith("*")), key=_deviation)
        size = f"{worst.difference:.1e} (absolute)" if "∂" in worst.what else f"{worst.relative:.1e}"
        lines.append(f"| {title} | {len(rows)} | {sum(not r.holds for r in rows)} | {size} | {worst.what} |")
    text = HEAD.format(relative=RELATIVE, gradient=GRADIENT, pixel=PIXEL, shown=SHOWN, summary="\n".join(lines))
    for title, rows in sections.items():
        rows = sorted(rows, key=lambda r: (r.holds, -_deviation(r)))[:shown] if shown else rows
        text += f"\n## {title}\n\n| quantity | ours | theirs | difference | relative |\n|---|---|---|---|---|\n"
        for r in rows:
            mark = "" if r.holds else " **outside**"
            text += f"| {r.what} | {r.ours} | {r.theirs} | {r.difference:.1e}{mark} | {r.relative:.1e} |\n"
        if any(r.what.endswith("*") for r in rows):
            text += f"\n{STARRED}"
    return text


def _deviation(row: Row) -> float:
    """What a row is judged by: the absolute difference of a gradient, the relative one of everything else."""
    return row.difference if "∂" in row.what else row.relative


def compare(folder: Path) -> dict[str, list[Row]]:
    """Every quantity of every golden file in `folder`, by section."""
    sections: dict[str, list[Row]] = {}
    for name in published.models(folder):
        golden = Golden(folder, name)
        sections[f"{name}, testing"] = list(evaluation(golden))
        for case in (c for c in CASES if c in golden.values):
            sections[f"{name}, {case.replace('_', ' ')}"] = list(training(golden, case))
        if "steps" in golden.values:
            sections[f"{name}, three updates"] = list(steps(golden))
    if published.has_data(folder):
        values = published.values(folder, "data")
        sections["test-time views"] = list(views(values, folder, "pyav"))
        with contextlib.suppress(ImportError):
            import decord  # noqa: F401

            sections["test-time views"] += list(views(values, folder, "decord"))
        sections["RandAugment at magnitude 7"] = list(augmentations(values))
        sections["spatial primitives"] = list(primitives(values["spatial"]))
    return sections


def main(arguments: list[str] | None = None) -> int:
    """Writes the page; the exit status is 1 when a quantity is outside its tolerance."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/parity.py", description="Compare with the published values."
    )
    parser.add_argument(
        "--golden", type=Path, default=published.WHOLE, help="folder of the values; tests/published ships"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md", help="page to write")
    parser.add_argument("--all", action="store_true", help="list every quantity, not only those that differ most")
    parser.add_argument("--full", action="store_true", help="as for the other benchmarks; changes nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not given.golden.is_dir():
        print(f"{given.golden}: no such folder; give the published code's values with --golden", file=sys.stderr)
        return 2
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sections = compare(given.golden)
    given.out.write_text(page(sections, None if given.all else SHOWN), encoding="utf-8")
    outside = [f"{title}: {r.what}" for title, rows in sections.items() for r in rows if not r.holds]
    print(f"{given.out}: {sum(map(len, sections.values()))} quantities, {len(outside)} outside their tolerance")
    for line in outside:
        print(f"  {line}")
    return 1 if outside else 0


if __name__ == "__main__":
    raise SystemExit(main())
