"""Read and write published `.pyth` checkpoints.

A `.pyth` file is a torch archive of ``epoch`` (0-based), ``model_state`` (tensors by name), ``optimizer_state`` and
``cfg`` (the YAML text of the whole configuration). The reader takes the network from that text and checks it against the tensors; an
error names any option that this network does not support. Files are opened with ``weights_only=True``, so that code in a
downloaded file does not run.

Names: the backbone's are the same. Heads: ``head.heads.D.*`` ↔ ``heads.D.*``; for a single dataset,
``head.projection.*`` ↔ ``heads.D.*``; ``head.cross_dataset_heads.A_B.weight`` ↔ ``projections.A.B.weight``.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multitrain.config import ConfigError, DatasetConfig, ModelConfig
from multitrain.config.boundary import understood
from multitrain.files import replacing
from multitrain.interop.archive import open_archive, require_weights
from multitrain.interop.incompatible_checkpoints import official_tensors
from multitrain.interop.layout import layout, name_map, pairs, require_possible
from multitrain.interop.optimizer_state import Grouping, published_state
from multitrain.interop.pyslowfast_config import (
    EXPANDER_HIDDEN,
    HEAD_HIDDEN,
    describes_network,
    make_cfg,
    parse_cfg,
    read_cfg,
)
from multitrain.interop.state_dict_report import LoadReport, abbreviated, compare, require_all, shapes

if TYPE_CHECKING:
    import torch

_KNOWN = ("epoch", "optimizer_state", "cfg")


@dataclass(frozen=True)
class PublishedCheckpoint:
    """The parsed and checked content of a `.pyth` file."""

    config: ModelConfig
    datasets: dict[str, int]
    """Classes by dataset, in head order."""
    multi_label: tuple[str, ...]
    """Datasets whose head ends in a sigmoid."""
    state: dict[str, torch.Tensor] = field(repr=False)
    """Tensors by MultiTrain's names, in the file's order and dtypes."""
    report: LoadReport = field(repr=False)
    """The comparison of the file's tensors with the network's."""
    epoch: int
    """0-based number of the last finished epoch."""
    cfg: str = field(repr=False)
    """The configuration text of the file, YAML."""
    optimizer_state: Any = field(repr=False, default=None)
    extras: dict[str, Any] = field(repr=False, default_factory=dict)
    """Other content of the file, e.g. the ``scaler_state`` of mixed precision."""

    @property
    def settings(self) -> dict[str, Any]:
        """`cfg`, parsed."""
        return parse_cfg(self.cfg, Path("cfg"))


def read_pyth(
    path: str | Path, *, strict: bool = True
) -> tuple[ModelConfig, dict[str, int], dict[str, torch.Tensor], int]:
    """Read a `.pyth` file: (network, classes by dataset in head order, tensors by MultiTrain's names, epoch).

    Raises:
        ConfigError: see :func:`read_published`.
    """
    file = read_published(path, strict=strict)
    return file.config, file.datasets, file.state, file.epoch


def read_published(path: str | Path, *, strict: bool = True, copy: str | None = None) -> PublishedCheckpoint:
    """Read and check everything in a `.pyth` file.

    Args:
        path: the file.
        strict: whether the tensors must be exactly those of the network in the file's configuration. If not, tensors that do not
            fit are left out and reported.
        copy: the set of weights to take, see :func:`multitrain.interop.archive.open_archive`.

    Raises:
        ConfigError: the file is missing, damaged, contains code or has no configuration; an option is not supported (named);
            tensors contradict the configuration (named), or contain NaN or infinities.
    """
    path = Path(path)
    archive = open_archive(path, copy)
    published, content, notes = archive.state, archive.content, archive.notes
    if not isinstance(content.get("cfg"), str):
        start = (
            "; to start a run from it: model=mvitv2_s init_from=… (or _b, _l)" if official_tensors(published) else ""
        )
        raise ConfigError(
            f"{path}: holds no 'cfg' text, so its network is unknown; use the checkpoint as the training code wrote it{start}"
        )
    config, datasets, multi_label, single = read_cfg(content["cfg"], path, tensors=published)
    require_possible(path, config, datasets, len(published))
    with understood(f"{path}: its cfg describes no network", "use the cfg that the training code wrote"):
        ours = _by_our_names(published, name_map(config, datasets, single=single))
        report = compare(shapes(ours), layout(config, datasets))
    if strict:
        require_all(
            report,
            f"{path}: its tensors are not those of the network in its own cfg",
            "load it with the code that wrote it, or start from what fits: init_from",
        )
    state = {name: ours[name].clone() for name in ours if name in set(report.matched)}
    require_weights(path, state)
    with understood(f"{path}: its 'epoch' is no number", "save it again with a trusted torch"):
        epoch = int(content.get("epoch", 0))
    return PublishedCheckpoint(
        config,
        datasets,
        multi_label,
        state,
        replace(report, notes=notes),
        epoch,
        content["cfg"],
        content.get("optimizer_state"),
        {key: value for key, value in content.items() if key not in _KNOWN},
    )


def read_tensors(
    path: Path, config: ModelConfig, datasets: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read the tensors of any `.pyth` file of the MViT family, for initial weights from a file without a usable cfg (official releases).

    Returns:
        (tensors, by MultiTrain's names where they have one; notes as in :class:`multitrain.interop.archive.Archive`).

    Raises:
        ConfigError: see :func:`multitrain.interop.archive.open_archive`.
    """
    found = open_archive(path)
    names = name_map(config, datasets, single=len(datasets) == 1)
    state = _by_our_names(found.state, names)
    require_weights(path, {name: tensor for name, tensor in state.items() if name in set(names.values())})
    return state, found.notes


def has_published_cfg(path: Path) -> bool:
    """Whether a `.pyth` file has a cfg text that describes a network. Raises ConfigError."""
    content = open_archive(path).content
    return isinstance(content.get("cfg"), str) and describes_network(content["cfg"], path)


def write_pyth(
    path: str | Path,
    config: ModelConfig,
    datasets: Mapping[str, int],
    state: Mapping[str, torch.Tensor],
    *,
    epoch: int = 0,
    multi_label: Collection[str] = (),
    cfg: str | None = None,
    optimizer_state: Any = None,
    grouping: Grouping = "ddp",
    extras: Mapping[str, Any] | None = None,
    sampling_rate: int = 3,
    target_fps: float = 30.0,
    tested: DatasetConfig | None = None,
    atomic_writer: Callable[[Path], AbstractContextManager[Path]] = replacing,
) -> None:
    """Write tensors with MultiTrain's names as a `.pyth` file that the published code can build and load.

    Args:
        path: written under a temporary name, then renamed.
        config, datasets, state: of the model; `state` must hold exactly its tensors.
        epoch: 0-based number of the last finished epoch.
        multi_label: datasets whose head ends in a sigmoid.
        cfg: YAML text to store, e.g. of the file from which the weights came (default: made from `config`).
        optimizer_state: stored as it is (default: the state of AdamW before its first step).
        grouping: parameter groups of the default optimizer state: see :mod:`multitrain.interop.optimizer_state`.
        extras: further content of the file.
        sampling_rate, target_fps, tested: for the configuration text, see
            :func:`multitrain.interop.pyslowfast_config.make_cfg`.
        atomic_writer: context manager that gives the temporary path for `path`, as :func:`multitrain.files.replacing` does.

    Raises:
        ConfigError: `state` does not fit, `cfg` describes another network, or two projections get the same published name.

    Warns:
        UserWarning: the published code cannot load the whole file (it does not support a width or a name).
    """
    import torch

    path = Path(path)
    if config.own_backbone:
        raise ConfigError(
            f"{path}: the .pyth format cannot hold model.backbone={config.backbone}; write a .safetensors file"
        )
    datasets = dict(datasets)
    wanted = layout(config, datasets)
    require_all(compare(shapes(state), wanted), str(path), "the weights are not those of the model to be written")
    text = cfg if cfg is not None else make_cfg(config, datasets, multi_label, sampling_rate, target_fps, tested)
    parsed, named, _, single = read_cfg(text, path)
    if (difference := _difference(named, parsed, datasets, config)) is not None:
        raise ConfigError(
            f"{path}: the configuration text (cfg) that belongs to the weights describes another model: {difference}; "
            "convert the file that they came from, or the run"
        )
    names = name_map(config, datasets, single=single)
    for problem in _not_publishable(config, datasets, single=single):
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    if optimizer_state is None:
        optimizer_state = published_state(wanted, grouping)
    content = {
        "epoch": epoch,
        "model_state": OrderedDict((theirs, state[ours].detach().cpu().clone()) for theirs, ours in names.items()),
        "optimizer_state": optimizer_state,
        "cfg": text,
        **(extras or {}),
    }
    with atomic_writer(path) as temporary:
        torch.save(content, temporary)


def _by_our_names(published: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors by MultiTrain's names; a tensor without one keeps its name."""
    return {names.get(name, name): tensor for name, tensor in published.items()}


def _difference(
    named: Mapping[str, int], parsed: ModelConfig, datasets: Mapping[str, int], config: ModelConfig
) -> str | None:
    """How the model in a configuration text differs from `config` with the heads `datasets`; None if it does not."""
    if dict(named) != dict(datasets):
        return f"datasets {dict(named)} in the text, {dict(datasets)} in the weights"
    theirs, ours = _architecture(parsed, named), _architecture(config, datasets)
    differs = [
        f"{key} is {theirs[key]} in the text, {ours[key]} in the weights" for key in ours if theirs[key] != ours[key]
    ]
    return abbreviated(differs) if differs else None


def _architecture(config: ModelConfig, datasets: Mapping[str, int]) -> dict[str, Any]:
    """The options that determine what the model computes in eval mode; without dropout rates, unused widths, and the projections
    of a model with one dataset."""
    unused = {"drop_path", "head_dropout", "dropout_logits", "head_hidden", "expander_hidden"}
    return config.model_dump(exclude=unused) | {"projections": bool(pairs(config, datasets))}


def _not_publishable(config: ModelConfig, datasets: Mapping[str, int], *, single: bool) -> list[str]:
    """The reasons why the published code cannot load all of this model, one line each."""
    problems = []
    if config.head == "mlp" and config.head_hidden != HEAD_HIDDEN:
        problems.append(
            f"model.head_hidden={config.head_hidden}: the published code builds {HEAD_HIDDEN} and skips these tensors"
        )
    if config.expander and config.expander_hidden != EXPANDER_HIDDEN:
        problems.append(
            f"model.expander_hidden={config.expander_hidden}: the published code builds {EXPANDER_HIDDEN} and skips these tensors"
        )
    bad = [d for d in datasets if ("_" in d or "." in d) and not single]
    if bad:
        problems.append(
            f"dataset {bad[0]!r}: the published code splits names at '_' and cannot hold '.'; rename it before training there"
        )
    return problems


__all__ = [
    "PublishedCheckpoint",
    "has_published_cfg",
    "read_published",
    "read_pyth",
    "read_tensors",
    "write_pyth",
]
