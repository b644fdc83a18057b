"""`experiment=k400_mit_ssv2_reference` does the published run's arithmetic: real ranks against its formulas written out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, excite, settings, start_ranks, wait, write_run
from torch import Tensor
from torch.nn import functional as F

from multitrain.config import RunConfig, compose
from multitrain.data.catalog import open_catalogs, sources
from multitrain.data.loader import TrainLoader
from multitrain.data.mix import draw_mixing, finalize_batch
from multitrain.data.random import KeyedRNG
from multitrain.engine.schedule import Schedule
from multitrain.model.multitrain import MultiTrain
from multitrain.order import Plan, solve

REFERENCE = compose(["experiment=k400_mit_ssv2_reference"])
RANKS, MICRO, BATCH = 2, 4, 16


def test_the_settings_are_the_published_ones() -> None:
    c = REFERENCE
    assert (c.nodes, c.gpus, c.micro_batch, c.effective_batch) == (2, 8, 4, 512)
    assert solve(512, nodes=2, gpus=8, micro_batch=4, group=c.group).accumulation == 8
    assert c.optim.clip_norm == 1.0 * c.world_size
    assert c.optim.eps == pytest.approx(1e-8 * c.world_size)  # AdamW of g/16 with 1e-8 is AdamW of g with 16e-8
    assert (c.optim.lr, c.optim.start_lr, c.optim.end_lr) == (2 * 2e-4, 2 * 2e-6, 2 * 2e-6)  # × 2 machines
    assert (c.optim.weight_decay, c.optim.betas, c.epochs, c.optim.warmup_epochs) == (0.05, (0.9, 0.999), 50, 10)
    assert (c.augment.mix_group * c.augment.copies, c.augment.mix_across_datasets) == (8, True)
    assert (c.augment.smoothing_classes, c.augment.label_smoothing) == (700, 0.1)
    assert (c.augment.mixup_alpha, c.augment.cutmix_alpha, c.augment.cutmix_probability) == (0.8, 1.0, 0.5)
    assert (c.model.dropout_logits, c.model.head_dropout, c.model.drop_path) == (True, 0.5, 0.1)
    assert (c.loss.scope, c.loss.informative_weight, c.loss.std_weight) == ("micro", 0.1, 25)
    assert (c.data.mixture, c.data.decoder, c.augment.backend, c.precision) == ("concat", "decord", "pil", "fp16")
    schedule = Schedule.of(c.optim, 50 * 2389, 2389.31)
    assert schedule(0) == 4e-6
    assert schedule(10 * 2389.31) == pytest.approx(4e-4)


def test_an_update_is_that_of_the_published_formulas(tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks of four videos, accumulation two: losses and clipped gradient, dropout and drop path on."""
    changes = {
        "name": "reference",
        "gpus": RANKS,
        "micro_batch": MICRO,
        "effective_batch": BATCH,
        "data__mixture": REFERENCE.data.mixture,
        "data__decoder": "decord" if importlib.util.find_spec("decord") else "pyav",
        "model__dropout_logits": REFERENCE.model.dropout_logits,
        "loss": REFERENCE.loss.model_dump(),
        "augment": REFERENCE.augment.model_dump(),
        "optim__clip_norm": 1.0 * RANKS,
        "optim__eps": 1e-8 * RANKS,
    }
    run, config = write_run(tmp_path, settings(tiny_data, **changes))
    log = run / "log.txt"
    codes = wait(start_ranks([str(ROOT / "tests/engine/one_update.py"), str(run)], RANKS, log=log))
    assert codes == [0] * RANKS, log.read_text()[-5000:]
    ours = torch.load(run / "update.pt", weights_only=False)
    theirs = published_update(config, tmp_path)
    assert theirs["mixed across datasets"] > 0
    assert 0.4 < theirs["logits dropped"] < 0.6
    assert theirs["norm"] > 1.0, "the clip does nothing here"
    for key in ("classification", "projection", "informative"):
        assert ours["record"][f"loss_{key}"] == pytest.approx(theirs[key], rel=5e-6), key
    assert ours["record"]["grad_norm"] == pytest.approx(RANKS * theirs["norm"], rel=1e-4)
    biggest = max(g.abs().max().item() for g in theirs["gradient"].values())
    for name, expected in theirs["gradient"].items():
        if name == "expander.fc2.bias" or name.endswith("norm_k.bias"):
            continue  # zero but for rounding
        error = (ours["gradient"][name] / RANKS - expected).norm() / max(expected.norm().item(), 1e-4 * biggest)
        assert error < 5e-4, f"{name}: relative error {error:.2e}"


def published_update(config: RunConfig, runs: Path) -> dict[str, Any]:
    """The update as the published code computes it, from its formulas: the mean over ranks of the gradients that only the
    own rows of a gathered batch carry, which is 1/ranks of the true one, clipped to 1."""
    catalogs = open_catalogs(config.data, "train", runs / ".index")
    plan = Plan(
        sources(config.data, catalogs),
        seed=config.seed,
        effective_batch=BATCH,
        mixture=config.data.mixture,
        group=config.group,
    )
    shape = solve(BATCH, nodes=1, gpus=RANKS, micro_batch=MICRO, group=config.group)
    loaders = [TrainLoader(catalogs, plan, shape, rank, config, 0, 1) for rank in range(RANKS)]
    batches = [list(loader) for loader in loaders]
    for loader in loaders:
        loader.close()
    classes = {n: c.classes for n, c in catalogs.items()}
    model = MultiTrain(config.model, classes)
    model.initialise(config.seed)
    excite(model)
    model.train()
    sums: dict[str, float] = {"classification": 0.0, "projection": 0.0, "informative": 0.0}
    crossed, dropped = 0, []
    for micro in range(shape.accumulation):
        parts = [published_mix(config, classes, batches[rank][micro]) for rank in range(RANKS)]
        crossed += sum(p["crossed"] for p in parts)
        clips, ids, keys = (torch.cat([p[k] for p in parts]) for k in ("clips", "dataset", "keys"))
        targets = {n: torch.cat([p["targets"][n] for p in parts]) for n in classes}
        out = model.outputs(clips, keys)
        dropped.append(torch.cat([z.flatten() for z in out.logits.values()]).eq(0).float().mean().item())
        terms = published_loss(classes, out, targets, ids)
        (terms["total"] / shape.accumulation / RANKS).backward()
        for key in sums:
            sums[key] += terms[key].item() / shape.accumulation
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    gradient = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    found = {"gradient": gradient, "norm": norm, "mixed across datasets": crossed}
    return {**sums, **found, "logits dropped": sum(dropped) / len(dropped)}


def published_mix(config: RunConfig, classes: dict[str, int], batch: Any) -> dict[str, Any]:
    """All clips of a rank mixed with the batch turned round, whatever their datasets; smoothing with 700 classes."""
    plain = config.augment.model_copy(update={"mix_probability": 0.0, "label_smoothing": 0.0})
    given = finalize_batch(batch, config.data, classes, plain, "cpu", config.seed)
    side = config.model.crop
    mixing = draw_mixing(config.augment, side, side, KeyedRNG("mix", config.seed, batch.start))
    lam, clips = mixing.share, given.clips
    if mixing.box is None:
        mixed = lam * clips + (1 - lam) * clips.flip(0)
    else:
        b = mixing.box
        rows, columns = slice(b.top, b.top + b.height), slice(b.left, b.left + b.width)
        mixed = clips.clone()
        mixed[..., rows, columns] = clips.flip(0)[..., rows, columns]
    off = 0.1 / 700
    on = 0.9 + off
    smooth = {n: y * on + (1 - y) * off for n, y in given.targets.items()}
    targets = {n: lam * s + (1 - lam) * s.flip(0) for n, s in smooth.items()}
    crossed = int((given.dataset != given.dataset.flip(0)).sum())
    return {"clips": mixed, "targets": targets, "dataset": given.dataset, "keys": given.keys, "crossed": crossed}


def published_loss(classes: dict[str, int], out: Any, targets: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """CE of each clip in its own label space, the mean of the projections into it, and the informative loss of the batch."""
    n, names = len(ids), list(classes)
    classification = projection = torch.zeros(())
    for number, name in enumerate(names):
        mask = (ids == number).float()

        def entropy(z: Tensor, y: Tensor = targets[name]) -> Tensor:
            return -(y * F.log_softmax(z, 1)).sum(1)

        classification = classification + (mask * entropy(out.logits[name])).sum() / n
        for other in names:
            if other != name:
                across = entropy(out.projected[other, name]) / (len(names) - 1)
                projection = projection + (mask * across).sum() / n
    e = out.expanded - out.expanded.mean(0)
    std = torch.sqrt(e.var(0) + 1e-4)
    covariance = e.T @ e / (n - 1)
    spread = F.relu(1 - std).mean()
    shared = (covariance.square().sum() - covariance.diagonal().square().sum()) / e.shape[1]
    informative = 25 * spread + shared
    total = classification + projection + 0.1 * informative
    return {"total": total, "classification": classification, "projection": projection, "informative": informative}
