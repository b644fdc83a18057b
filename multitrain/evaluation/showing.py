"""Pictures of a validation: confusion by dataset and clips with predictions, from the scores that it makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from multitrain.config import RunConfig
from multitrain.evaluation.pictures import Example, confusion, film_strips
from multitrain.evaluation.shards import Scores

if TYPE_CHECKING:
    import torch

    from multitrain.data.catalog import Catalog


class Showing:
    """Collects what a validation says of its videos on this rank; rank 0 draws.

    Args:
        config: of the run.
        catalogs: of the validation split, by dataset.
        clips: videos of each dataset that are shown, of those that rank 0 scores.
    """

    def __init__(self, config: RunConfig, catalogs: Mapping[str, Catalog], clips: int = 3) -> None:
        self._config = config
        self._catalogs = catalogs
        self._clips = clips
        self._names = {name: catalog.class_names for name, catalog in catalogs.items()}
        self.clear()

    def clear(self) -> None:
        """Forget what was seen; at the start of each validation."""
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
        """
        matrices, seen = self._matrices, self._seen  # of this validation, whatever comes meanwhile
        drawn = {}
        for name, matrix in matrices.items():
            drawn[f"val/{name}/confusion"] = confusion({name: matrix.astype(int)}, {name: self._labels(name)})
        for name in self._catalogs:
            examples = self._examples(name, seen[name])
            if examples:
                drawn[f"val/{name}/clips"] = film_strips(examples, [name])
        return drawn

    def _examples(self, name: str, seen: list[tuple[int, Scores]]) -> list[Example]:
        from multitrain.data.decode import VideoError, open_video

        catalog, labels, found = self._catalogs[name], self._labels(name), []
        for index, scores in seen:
            try:
                with open_video(catalog.path(index), self._config.data.decoder) as video:
                    frames = video.frames(np.linspace(0, video.frame_count - 1, 6).round().astype(int))
            except VideoError:
                continue
            best = [(labels[k], float(scores[k])) for k in np.argsort(-scores, kind="stable")[:3]]
            truth = tuple(labels[k] for k in catalog.labels(index))
            found.append(Example(name, frames, truth, {name: best}))
        return found

    def _labels(self, name: str) -> list[str]:
        return self._names[name] or [str(k) for k in range(self._catalogs[name].classes)]
