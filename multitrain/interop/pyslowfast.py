"""Published `.pyth` checkpoints, in and out.

A `.pyth` file is a torch archive of ``epoch`` (0-based), ``model_state`` (tensors by name), ``optimizer_state`` and
``cfg`` (the YAML text of the whole configuration). The network is read from that text and checked against the tensors;
an option that this network does not have is refused by name. Files are opened with ``weights_only=True``: no code in a
downloaded file runs.

Names: the backbone's are the same on both sides. Heads: ``head.heads.D.*`` ↔ ``heads.D.*``; a single dataset's
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
from multitrain.interop.layout import layout, name_map, pairs, require_possible
from multitrain.interop.matching import Report, compare, listed, require_all, shapes
from multitrain.interop.official import refusal
from multitrain.interop.optimizer_state import Grouping, published_state
from multitrain.interop.published_cfg import EXPANDER_HIDDEN, HEAD_HIDDEN, make_cfg, parse_cfg, read_cfg

if TYPE_CHECKING:
    import torch

_KNOWN = ("epoch", "optimizer_state", "cfg")


@dataclass(frozen=True)
class Published:
    """A `.pyth` file, understood."""

    config: ModelConfig
    datasets: dict[str, int]
    """Classes by dataset, in head order."""
    multi_label: tuple[str, ...]
    """Datasets whose head ends in a sigmoid."""
    state: dict[str, torch.Tensor] = field(repr=False)
    """Tensors by our names, in the file's order and dtypes."""
    report: Report = field(repr=False)
    """Which tensors of the file the network took."""
    epoch: int
    """0-based number of the last finished epoch."""
    cfg: str = field(repr=False)
    """The configuration as the file has it, YAML text."""
    optimizer_state: Any = field(repr=False, default=None)
    extras: dict[str, Any] = field(repr=False, default_factory=dict)
    """What else the file holds, e.g. the ``scaler_state`` of mixed precision."""

    @property
    def settings(self) -> dict[str, Any]:
        """`cfg`, parsed."""
        return parse_cfg(self.cfg, Path("cfg"))


def read_pyth(
    path: str | Path, *, strict: bool = True
) -> tuple[ModelConfig, dict[str, int], dict[str, torch.Tensor], int]:
    """The network, datasets (classes by name, in head order), tensors by our names, and epoch of a `.pyth` file.

    Raises:
        ConfigError: see :func:`read_published`.
    """
    file = read_published(path, strict=strict)
    return file.config, file.datasets, file.state, file.epoch


def read_published(path: str | Path, *, strict: bool = True, copy: str | None = None) -> Published:
    """Everything a `.pyth` file holds, checked.

    Args:
        path: the file.
        strict: the tensors must be exactly those of the network in the file's configuration. Otherwise those that do not
            fit are left out, and reported.
        copy: the set of weights to take, see :func:`multitrain.interop.archive.open_archive`.

    Raises:
        ConfigError: no such file, damaged, holding code, without configuration, an option outside this network's scope
            (named), tensors that contradict the configuration (named), or NaN and infinities in them.
    """
    path = Path(path)
    published, content, notes = open_archive(path, copy)
    refused = refusal(path, published)
    if refused is not None:
        raise refused
    if not isinstance(content.get("cfg"), str):
        raise ConfigError(
            f"{path}: holds no 'cfg' text, so its network is not known; use the checkpoint as the training code wrote it"
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
    return Published(
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
    """The tensors of any `.pyth` file of the MViT family, by the names of a model of ours; those unknown keep theirs.

    Second, which of several sets of weights these are, see :class:`multitrain.interop.archive.Archive`.

    For starting from files whose configuration says nothing or another network: official releases. Raises ConfigError.
    """
    found = open_archive(path)
    names = name_map(config, datasets, single=len(datasets) == 1)
    state = _by_our_names(found.state, names)
    require_weights(path, {name: tensor for name, tensor in state.items() if name in set(names.values())})
    return state, found.notes


def has_published_cfg(path: Path) -> bool:
    """Whether a `.pyth` file says what its network is, and is not of the official layout. Raises ConfigError."""
    found = open_archive(path)
    return isinstance(found.content.get("cfg"), str) and refusal(path, found.state) is None


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
    placed: Callable[[Path], AbstractContextManager[Path]] = replacing,
) -> None:
    """Writes tensors of our names as a `.pyth` file that the published code can build and load.

    Args:
        path: written under a temporary name, then renamed.
        config, datasets, state: of the model; `state` must hold exactly its tensors.
        epoch: 0-based number of the last finished epoch.
        multi_label: datasets whose head ends in a sigmoid.
        cfg: YAML text to keep, e.g. of the file that the weights came from; made from `config` when not given.
        optimizer_state: kept as it is; that of an AdamW before its first step when not given.
        grouping: parameter groups of the state that is made: see :mod:`multitrain.interop.optimizer_state`.
        extras: what else the file holds.
        sampling_rate, target_fps, tested: for the configuration text, see
            :func:`multitrain.interop.published_cfg.make_cfg`.
        placed: gives the temporary path for `path`, as :func:`multitrain.files.replacing`.

    Raises:
        ConfigError: `state` does not fit, `cfg` describes another network, or two pairs of dataset names collide.

    Warns:
        UserWarning: the published code cannot load the file fully (widths or names that it does not allow).
    """
    import torch

    path = Path(path)
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
    with placed(path) as temporary:
        torch.save(content, temporary)


def _by_our_names(published: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors by our names where they have one."""
    return {names.get(name, name): tensor for name, tensor in published.items()}


def _difference(
    named: Mapping[str, int], parsed: ModelConfig, datasets: Mapping[str, int], config: ModelConfig
) -> str | None:
    """Where a configuration text describes another model than `config` with the heads `datasets`; None where it does not."""
    if dict(named) != dict(datasets):
        return f"datasets {dict(named)} in the text, {dict(datasets)} in the weights"
    theirs, ours = _architecture(parsed, named), _architecture(config, datasets)
    differs = [
        f"{key} is {theirs[key]} in the text, {ours[key]} in the weights" for key in ours if theirs[key] != ours[key]
    ]
    return listed(differs) if differs else None


def _architecture(config: ModelConfig, datasets: Mapping[str, int]) -> dict[str, Any]:
    """What determines the function computed in evaluation, as it is built: dropout rates, unused widths and the projections
    of a single dataset are left out."""
    unused = {"drop_path", "head_dropout", "dropout_logits", "head_hidden", "expander_hidden"}
    return config.model_dump(exclude=unused) | {"projections": bool(pairs(config, datasets))}


def _not_publishable(config: ModelConfig, datasets: Mapping[str, int], *, single: bool) -> list[str]:
    """Why the published code cannot load all of this model, one line a reason."""
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
    "Published",
    "has_published_cfg",
    "read_published",
    "read_pyth",
    "read_tensors",
    "write_pyth",
]
