"""A trained model with the reading of video files: predicts the action in a file."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from multitrain.config import ConfigError, DatasetConfig, ModelConfig, RunConfig, nearest
from multitrain.config.class_names import read_class_names
from multitrain.data.views import load_views, short_side
from multitrain.interop.layout import layout
from multitrain.interop.positions import resize_positions, resized_config
from multitrain.interop.state_dict_report import LoadReport
from multitrain.interop.weights import Weights, read_model, read_names
from multitrain.model import MultiTrain


class Predictor(MultiTrain):
    """A :class:`~multitrain.model.MultiTrain` that reads video files and knows the names of its classes.

    Args:
        config, datasets, multi_label: of the model.
        run: how each dataset's clips are read.
        class_names: names by label, for the datasets whose names are known; others are shown by number.
        report: what became of the tensors of the file that it was loaded from.
    """

    def __init__(
        self,
        config: ModelConfig,
        datasets: dict[str, int],
        *,
        run: RunConfig,
        multi_label: Sequence[str] = (),
        class_names: Mapping[str, Sequence[str]] | None = None,
        report: LoadReport | None = None,
    ) -> None:
        super().__init__(config, datasets, multi_label=multi_label)
        self.run = run
        self.report = report or LoadReport((), (), ())
        """Which tensors of the file are the model's: matched, missing, unexpected, reshaped."""
        self.class_names = {name: list(names) for name, names in (class_names or {}).items()}

    def predict(
        self, path: str | Path, top: int = 5, *, views: Literal["centre", "test"] = "centre"
    ) -> dict[str, list[tuple[str, float]]]:
        """The most probable classes of a video in each dataset's label space.

        Args:
            path: a video file.
            top: classes to return for each dataset; all when it has fewer.
            views: ``centre``: one clip from the middle, centre crop; ``test``: all views of the dataset's multi-view
                test, several times slower.

        Returns:
            By dataset, in head order: (label, probability) with the best first. Labels are class names, or the class's
            number as text where names are not known.

        Raises:
            VideoError: the file cannot be read; it says why.
            ConfigError: `views` is not known, or the network answers with NaN.
        """
        if views not in ("centre", "test"):
            raise ConfigError(f"views={views!r}: {nearest(views, ['centre', 'test'])}")
        return {name: self._best(name, row, top) for name, row in self.probabilities_of(path, views=views).items()}

    def probabilities_of(
        self, path: str | Path, *, views: Literal["centre", "test"] = "centre"
    ) -> dict[str, torch.Tensor]:
        """Mean probabilities over the views of a video, by dataset: float32 [K] on the CPU. Errors as :meth:`predict`."""
        features: dict[tuple[object, ...], torch.Tensor] = {}
        out = {}
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                for name in self.datasets:
                    settings = self._reading(name, views)
                    same = self._pixels(settings)
                    if same not in features:
                        clips = torch.from_numpy(load_views(path, settings, self.run.data, self.config))
                        features[same] = self.features(clips.to(self.device))
                    out[name] = self.probabilities(name, self.heads.of(name)(features[same])).mean(0).cpu()
                    _require_numbers(path, name, out[name])
        finally:
            self.train(was_training)
        return out

    def reconfigure(self, run: RunConfig) -> None:
        """Read clips as `run` says, and look for names of classes in its annotation folders where none are known.

        Raises:
            ConfigError: `run` is of another network.
        """
        if run.model != self.run.model:
            raise ConfigError("model: the network is that of the weights and cannot be changed")
        self.run = run
        for name, classes in self.datasets.items():
            if name not in self.class_names and name in run.data.datasets:
                names = read_names(run.data.datasets[name].model_dump(), classes)
                if names:
                    self.class_names[name] = names

    def label(self, dataset: str, index: int) -> str:
        """The name of a class, or its number as text."""
        names = self.class_names.get(dataset)
        return names[index] if names else str(index)

    def _reading(self, name: str, views: str) -> DatasetConfig:
        settings = self.run.data.datasets[name]
        return settings if views == "test" else settings.model_copy(update={"temporal_views": 1, "spatial_views": 1})

    def _pixels(self, settings: DatasetConfig) -> tuple[object, ...]:
        """Settings that determine the pixels of a clip; datasets with equal settings share the clips."""
        return settings.sampling, settings.temporal_views, settings.spatial_views, short_side(settings, self.config)

    def _best(self, name: str, row: torch.Tensor, top: int) -> list[tuple[str, float]]:
        order = torch.argsort(row, descending=True, stable=True)[: max(top, 0)]
        return [(self.label(name, int(i)), float(row[i])) for i in order]


def load(
    path: str | Path,
    *,
    class_names: Mapping[str, str | Path | Sequence[str]] | None = None,
    strict: bool = True,
    frames: int | None = None,
    crop: int | None = None,
) -> Predictor:
    """The model stored at `path`, on the CPU in eval mode; its `report` lists how every tensor of the file was used.

    Args:
        path: a published `.pyth` file, a run's folder, a checkpoint's folder, or a `.safetensors` file.
        class_names: by dataset, a list of names or a file with one name a line; takes precedence over names found with
            the weights (stored, or a file in the dataset's annotation folder).
        strict: refuse weights that are not exactly those of their model. Otherwise tensors that the file lacks have fresh
            values, and a warning names them.
        frames, crop: size of the clips to be given, when another than the file's: position tables are interpolated.

    Raises:
        ConfigError: no model there, damaged, or class names that do not fit.
    """
    weights, run = read_model(path, strict=strict)
    absent = [name for name in weights.datasets if name not in run.data.datasets]
    if absent:
        raise ConfigError(
            f"{path}: its configuration has no data.datasets.{absent[0]}, which its weights have a head for; restore its config.yaml"
        )
    for note in weights.report.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    config = resized_config(weights.config, frames, crop)
    state = weights.state
    if config != weights.config:
        state = resize_positions(state, weights.config, config.frames, config.crop)
        run = run.model_copy(update={"model": config})
    names = weights.class_names | _given_names(class_names or {}, weights)
    if weights.report.fresh:
        _require_affordable(path, weights)
    with torch.device("meta"):
        model = Predictor(
            config,
            weights.datasets,
            run=run,
            multi_label=weights.multi_label,
            class_names=names,
            report=weights.report,
        )
    if weights.report.fresh:
        model.to_empty(device="cpu").initialise(run.seed)
        warnings.warn(f"{path}: {weights.report}: {', '.join(weights.report.fresh)}", stacklevel=2)
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()},
        assign=True,
        strict=strict,
    )
    return model.eval()


MOST_FRESH = 1_000_000_000
"""Maximum number of elements that a file's description may require beyond the tensors in the file."""


def _require_affordable(path: str | Path, weights: Weights) -> None:
    """Raises ConfigError when the tensors that a file lacks would take more memory than any network of this kind."""
    shapes = layout(weights.config, weights.datasets)
    fresh = sum(math.prod(shapes[name]) for name in weights.report.fresh)
    if fresh > MOST_FRESH:
        raise ConfigError(
            f"{path}: describes {fresh:,} numbers that it does not hold; write it again, or load it strictly"
        )


def _require_numbers(path: str | Path, dataset: str, probabilities: torch.Tensor) -> None:
    """Raises ConfigError when an output is not a probability: the weights overflow."""
    if not bool(torch.isfinite(probabilities).all()):
        raise ConfigError(
            f"{path}: the head of {dataset} answers with NaN; the weights are unusable, use an older checkpoint"
        )


def _given_names(given: Mapping[str, str | Path | Sequence[str]], weights: Weights) -> dict[str, list[str]]:
    out = {}
    for name, source in given.items():
        if name not in weights.datasets:
            raise ConfigError(
                f"class names for {name!r}, which is no dataset of this model; {nearest(name, weights.datasets)}"
            )
        classes = weights.datasets[name]
        if isinstance(source, (str, Path)):
            names = read_class_names(Path(source))
            if len(names) != classes:
                raise ConfigError(
                    f"{source}: not a file of {classes} class names, which {name} has; it has {len(names)}"
                )
        else:
            names = [str(n) for n in source]
            if len(names) != classes:
                raise ConfigError(
                    f"{len(names)} class names for {name}, which has {classes} classes; give one for each"
                )
        out[name] = names
    return out
