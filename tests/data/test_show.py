"""`data show` and `data stats` show what training does: the same clips, and the same draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import settings

from multitrain.config import validate
from multitrain.data.catalog import open_catalogs, plan_of
from multitrain.data.loader import TrainLoader
from multitrain.data.mix import finalize_batch
from multitrain.data.show import clips_of, picture
from multitrain.data.spatial import MEAN, STD
from multitrain.data.tools.stats import balance, collect, draws, text
from multitrain.order import solve


@pytest.mark.parametrize("update", [0, 2])
def test_what_is_shown_is_what_training_gets(tiny_data: Path, tmp_path: Path, update: int) -> None:
    config = validate(settings(tiny_data, augment__mix_probability=1.0))
    catalogs = open_catalogs(config.data, "train", tmp_path)
    plan = plan_of(config, catalogs)
    shown = clips_of(config, catalogs, plan, update, 8)
    shape = solve(16, nodes=1, gpus=1, micro_batch=8, group=config.group)
    with TrainLoader(catalogs, plan, shape, 0, config, update, update + 1) as loader:
        batch = next(iter(loader))
    ready = finalize_batch(
        batch, config.data, {n: c.classes for n, c in catalogs.items()}, config.augment, "cpu", config.seed
    )
    pixels = (ready.clips.permute(0, 2, 3, 4, 1).numpy() * STD + MEAN).clip(0, 1) * 255
    assert len(shown) == len(pixels) == 8 * config.augment.copies
    for number, clip in enumerate(shown):
        assert np.abs(clip.frames - pixels[number]).max() <= 0.51
        name = plan.sources[int(batch.dataset[number])].name
        assert clip.dataset == name
        target = ready.targets[name][number]
        assert clip.weights[0][1] == pytest.approx(float(target.max()))
    assert picture(shown[:2], "two clips").startswith(b"\x89PNG")


def test_draws_are_counted_in_the_real_order(tiny_data: Path, tmp_path: Path) -> None:
    config = validate(settings(tiny_data, data__proportions="temperature", data__temperature=2.0, updates=50))
    catalogs = open_catalogs(config.data, "train", tmp_path)
    found = draws(config, plan_of(config, catalogs))["datasets"]
    roots = {name: np.sqrt(len(c)) for name, c in catalogs.items()}
    for name, d in found.items():
        assert d["share"] == pytest.approx(roots[name] / sum(roots.values()), abs=0.01)
        assert d["passes"] == pytest.approx(d["share"] * 50 * 16 / len(catalogs[name]))
    everything, _ = collect(config, tmp_path, 4, {})
    assert everything["datasets"]["stride"]["videos"] == {"train": 14, "val": 14, "test": 14}
    assert everything["datasets"]["stride"]["seconds"][1] == pytest.approx(0.4)
    assert "with.dot" in text(everything)


def test_balance() -> None:
    even = balance(np.array([0, 1, 2, 0, 1, 2]), 4)
    assert (even["empty"], even["smallest"], even["largest"], round(even["effective"], 6)) == (1, 0, 2, 3.0)
    hot = balance(np.array([[True, True], [True, False]]), 2)
    assert hot["counts"] == [2, 1]
