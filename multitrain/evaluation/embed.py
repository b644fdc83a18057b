"""Features of videos before the heads, for retrieval, maps and other classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from multitrain.config import ConfigError
from multitrain.data.decode import VideoError
from multitrain.data.views import load_views
from multitrain.files import output_file
from multitrain.plot_style import COLOURS, figure, label, png
from multitrain.text import printable

if TYPE_CHECKING:
    from multitrain.evaluation.predictor import Predictor

MAKER = "embed, nearest"
"""The commands whose output files may be replaced: see :mod:`multitrain.files`."""
_NAMED = 60
"""Maximum number of groups that a map's legend names."""
_MARKS = "osv^DPX*"


class Item(NamedTuple):
    """A video to embed."""

    path: str
    dataset: str = ""
    """Dataset whose sampling is used to read it; empty: the model's first dataset."""
    label: str = ""


@dataclass
class Embeddings:
    """Features of N videos."""

    items: list[Item]
    features: np.ndarray
    """float32 [N, C], the mean over a video's clips."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reasons by path."""


def embed(
    model: Predictor,
    items: Sequence[Item],
    *,
    views: str = "centre",
    progress: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Features of each video that can be read, in order.

    Args:
        views: ``centre``, one clip from the middle, or ``test``, the mean over all views of the multi-view test.
    """
    kept: list[Item] = []
    rows: list[np.ndarray] = []
    unreadable: dict[str, str] = {}
    model.eval()
    first = next(iter(model.datasets))
    with torch.inference_mode():
        for number, item in enumerate(items, 1):
            settings = model._reading(item.dataset or first, views)
            try:
                clips = torch.from_numpy(load_views(item.path, settings, model.run.data, model.config))
            except VideoError as error:
                unreadable[item.path] = error.reason
            else:
                rows.append(model.features(clips.to(model.device)).float().mean(0).cpu().numpy())
                kept.append(item)
            if progress:
                progress(number, len(items))
    features = np.stack(rows) if rows else np.zeros((0, model.dim), np.float32)
    return Embeddings(kept, features, unreadable)


def write(found: Embeddings, out: Path) -> None:
    """Write path, dataset, label and features of each video to a ``.npz`` or ``.parquet`` file, atomically.

    Raises:
        ConfigError: another kind of file, another file in its place, or pyarrow is not installed.
    """
    columns = {name: [printable(getattr(i, name)) for i in found.items] for name in ("path", "dataset", "label")}
    if out.suffix == ".npz":
        arrays: dict[str, Any] = {n: np.array(c, str) for n, c in columns.items()}
        with output_file(out, MAKER, sources(found)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, features=found.features, **arrays)
    elif out.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ConfigError(
                f"{out}: .parquet needs pyarrow; pip install 'multitrain[parquet]', or write .npz"
            ) from None
        table = pyarrow.table({**columns, "features": list(found.features)})
        with output_file(out, MAKER, sources(found)) as temporary:
            parquet.write_table(table, temporary)
    else:
        raise ConfigError(f"{out}: features are written as .npz or .parquet")


def sources(found: Embeddings) -> list[Path]:
    """The videos, which no output may replace."""
    return [Path(path) for path in (*(item.path for item in found.items), *found.unreadable)]


def principal_components(features: np.ndarray) -> np.ndarray:
    """The two principal components of features [N, C]: float64 [N, 2]; the largest entry of each axis points upwards."""
    centred = features.astype(np.float64) - features.mean(0, keepdims=True)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((len(features), 2))
    for axis in range(min(2, len(values))):
        sign = np.sign(right[axis][np.argmax(np.abs(right[axis]))]) or 1.0
        axes[:, axis] = sign * left[:, axis] * values[axis]
    return axes


def feature_map(found: Embeddings) -> bytes:
    """Two maps of the features' principal components, coloured by dataset and by class, as PNG. Raises ConfigError: no video."""
    if not found.items:
        raise ConfigError("no video could be read, so there is nothing to draw")
    places = principal_components(found.features)
    drawn, axes = figure(2, 1, width=14, height=6)
    for axis, title, of in zip(axes[0], ("By dataset", "By class"), ("dataset", "label")):
        names = np.array([getattr(i, of) or "?" for i in found.items])
        groups = list(dict.fromkeys(names))
        for number, group in enumerate(groups):
            here = places[names == group]
            colour, mark = COLOURS[number % len(COLOURS)], _MARKS[number // len(COLOURS) % len(_MARKS)]
            axis.scatter(here[:, 0], here[:, 1], s=18, color=colour, marker=mark, alpha=0.75, label=label(group))
        axis.set_title(f"{title}, features of {len(found.items)} videos", loc="left", size=10)
        axis.set_xlabel("first principal component")
        axis.set_ylabel("second principal component")
        if len(groups) <= _NAMED:
            axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(groups) // 31)
    return png(drawn)
