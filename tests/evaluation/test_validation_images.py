"""Pictures of a validation show what it counted, on every number of ranks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multitrain.config import RunConfig, validate
from multitrain.data.catalog import open_catalogs
from multitrain.evaluation import validation
from multitrain.evaluation.validation_images import ValidationImages
from multitrain.model import MultiTrain
from tests import support

pytest.importorskip("matplotlib")


def test_the_confusion_is_that_of_all_ranks_and_agrees_with_the_accuracy(tiny_data: Path, tmp_path: Path) -> None:
    config: RunConfig = validate(support.settings(tiny_data))
    catalogs = open_catalogs(config.data, "val", tmp_path)
    torch.manual_seed(0)
    model = MultiTrain(config.model, {name: c.classes for name, c in catalogs.items()})
    ranks = [ValidationImages(config, catalogs, clips=2) for _ in range(2)]
    hits = dict.fromkeys(catalogs, 0.0)
    for rank, showing in enumerate(ranks):
        found = validation.validate(model, config, catalogs, rank=rank, world_size=2, observe=showing.add)
        for name, result in found.items():
            hits[name] += result["top1"] / 100 * sum(m.sum() for m in [showing._matrices[name]])
    shared = [torch.from_numpy(np.concatenate([m.ravel() for m in s._matrices.values()])) for s in ranks]
    ranks[0].share(lambda _: shared[0] + shared[1])
    for name, catalog in catalogs.items():
        matrix = ranks[0]._matrices[name]
        assert matrix.sum() == len(catalog)
        assert matrix.trace() == pytest.approx(hits[name], abs=1e-6)
        labels = [catalog.labels(i)[0] for i in range(len(catalog))]
        assert matrix.sum(1).tolist() == np.bincount(labels, minlength=catalog.classes).tolist()
    drawn = ranks[0].draw()
    assert set(drawn) == {f"val/{name}/{what}" for name in catalogs for what in ("confusion", "clips")}
    for picture in drawn.values():
        assert np.asarray(Image.open(io.BytesIO(picture)).convert("L")).std() > 5
    ranks[0].clear()
    assert "val/stride/clips" not in ranks[0].draw()
