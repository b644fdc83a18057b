"""Plots of a validation: confusion matrices and clips with predictions, from the validation's own scores.

They are drawn in a separate process, which then ends: matplotlib and a decoder in the training process would leak memory at every
validation (seen: 230 MB after 20 validations) and delay its updates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from multitrain.config import RunConfig
from multitrain.data.pool import open_pool
from multitrain.evaluation.pictures import Example, confusion, film_strips
from multitrain.evaluation.shards import Scores

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog

POLL_SECONDS = 0.5
PATIENCE = 300.0
"""Timeout for the plots of one dataset, in seconds."""


class ValidationImages:
    """Collects the predictions of a validation on this rank; rank 0 draws.

    Args:
        config: of the run.
        catalogs: of the validation split, by dataset.
        clips: number of videos shown per dataset, from those that rank 0 scores.
    """

    def __init__(self, config: RunConfig, catalogs: Mapping[str, Catalog], clips: int = 3) -> None:
        self._config = config
        self._catalogs = catalogs
        self._clips = clips
        self._names = {name: catalog.class_names for name, catalog in catalogs.items()}
        self.clear()

    def clear(self) -> None:
        """Clear the collected predictions; called at the start of each validation."""
        self._matrices: dict[str, np.ndarray] = {
            n: np.zeros((c.classes, c.classes)) for n, c in self._catalogs.items() if not c.multi_label
        }
        self._seen: dict[str, list[tuple[int, Scores]]] = {name: [] for name in self._catalogs}

    def add(self, name: str, index: int, scores: Scores | None) -> None:
        """The scores of one video, float32 [K]; None when it could not be read."""
        if scores is None:
            return
        if name in self._matrices:
            self._matrices[name][self._catalogs[name].labels(index)[0], int(scores.argmax())] += 1
        if len(self._seen[name]) < self._clips:
            self._seen[name].append((index, scores))

    def share(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Sum the confusion over ranks; a collective of one float64 tensor of Σ K² elements."""
        import torch

        sizes = [m.size for m in self._matrices.values()]
        if not sizes:
            return
        total = reduce(torch.from_numpy(np.concatenate([m.ravel() for m in self._matrices.values()]))).numpy()
        parts = np.split(total, np.cumsum(sizes)[:-1])
        shapes = {name: m.shape for name, m in self._matrices.items()}
        self._matrices = {n: p.reshape(shape) for (n, shape), p in zip(shapes.items(), parts, strict=True)}

    def draw(self) -> dict[str, bytes]:
        """PNG pictures by TensorBoard name. On rank 0, after :meth:`share`.

        Raises:
            ConfigError: matplotlib is not installed.
            LoaderError: the drawing process died or raised an error.
        """
        drawing = _DrawImages(self._config, dict(self._catalogs), self._names, self._matrices, self._seen)
        drawn: dict[str, bytes] = {}
        with contextlib.closing(open_pool(drawing, list(self._catalogs), workers=1, ahead=1)) as pool:
            while True:
                try:
                    answer = pool.next(POLL_SECONDS)
                except StopIteration:
                    return drawn
                if answer is not None:
                    drawn |= answer.result


@dataclass
class _DrawImages:
    """Draws the images of each dataset; a :class:`multitrain.data.pool.WorkerFn` whose tasks are names of datasets.

    `names`: class names by dataset, None where unknown. `matrices`: int [K, K] by dataset. `seen`: by dataset, (index, scores) of the
    videos to show.
    """

    config: RunConfig
    catalogs: dict[str, Catalog]
    names: dict[str, list[str] | None]
    matrices: dict[str, np.ndarray]
    seen: dict[str, list[tuple[int, Scores]]]
    shape: tuple[int, ...] = (1,)
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    answer_timeout: float = PATIENCE

    def warm_up(self) -> None:
        """Nothing to import in advance."""

    def describe(self, task: str) -> str:
        """What is drawn, for error messages."""
        return f"the pictures of {task}"

    def run(self, task: str, out: np.ndarray) -> dict[str, bytes]:
        """PNG pictures of the dataset `task` by TensorBoard name; `out` is not used."""
        drawn = {}
        if task in self.matrices:
            matrix = self.matrices[task].astype(int)
            drawn[f"val/{task}/confusion"] = confusion({task: matrix}, {task: self._labels(task)})
        examples = self._examples(task)
        if examples:
            drawn[f"val/{task}/clips"] = film_strips(examples, [task])
        return drawn

    def _examples(self, name: str) -> list[Example]:
        from multitrain.data.decode import VideoError, open_video

        catalog, labels, found = self.catalogs[name], self._labels(name), []
        for index, scores in self.seen[name]:
            try:
                with open_video(catalog.path(index), self.config.data.decoder) as video:
                    frames = video.frames(np.linspace(0, video.frame_count - 1, 6).round().astype(int))
            except VideoError:
                continue
            best = [(labels[k], float(scores[k])) for k in np.argsort(-scores, kind="stable")[:3]]
            truth = tuple(labels[k] for k in catalog.labels(index))
            found.append(Example(name, frames, truth, {name: best}))
        return found

    def _labels(self, name: str) -> list[str]:
        return self.names[name] or [str(k) for k in range(self.catalogs[name].classes)]
