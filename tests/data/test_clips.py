"""How many frames are held at once is a matter of memory, never of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from support import settings, write_dataset

from multitrain.config import validate
from multitrain.data import clips
from multitrain.data.catalog import open_catalogs, plan_of
from multitrain.data.clips import Task, TrainClipFn


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainClipFn:
    folder = tmp_path_factory.mktemp("clips")
    for number, (name, videos) in enumerate((("stride", 3), ("segment", 3), ("with.dot", 4))):
        write_dataset(folder / name, videos, 3, number)
    config = validate(settings(folder))
    catalogs = open_catalogs(config.data, "train", folder / "index")
    return TrainClipFn(catalogs, plan_of(config, catalogs), config)


@pytest.mark.parametrize(
    "held", [1, 80 * 64 * 3, 2 * 80 * 64 * 3, 3 * 80 * 64 * 3], ids=["none", "one", "two", "three"]
)
def test_a_clip_has_the_same_pixels_however_many_frames_are_held(
    job: TrainClipFn, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets = job.plan.samples(0, 12)
    whole, parts = np.zeros((2, len(tickets), *job.shape), job.dtype)
    for sample, out in zip(tickets, whole):
        job.run(Task(0, sample), out)
    monkeypatch.setattr(clips, "AUGMENT_BATCH_BYTES", held)
    for sample, out in zip(tickets, parts):
        job.run(Task(0, sample), out)
    assert (whole == parts).all()
    assert whole.any()
