"""Published `.pyth` checkpoints, in and out.

A `.pyth` file is a torch archive of ``epoch`` (0-based), ``model_state`` (tensors by name), ``optimizer_state`` and
``cfg`` (the YAML text of the whole configuration). The network is read from that text and checked against the tensors;
an option that this network does not have is refused by name. Files are opened with ``weights_only=True``: no code in a
downloaded file runs.

Names: the backbone's are the same on both sides. Heads: ``head.heads.D.*`` ↔ ``heads.D.*``; a single dataset's
``head.projection.*`` ↔ ``heads.D.*``; ``head.cross_dataset_heads.A_B.weight`` ↔ ``projections.A.B.weight``.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.matching import POSITIONS, Shape, compare, listed, require_all, shapes
from multitrain.model.heads import escape

if TYPE_CHECKING:
    import torch

HEAD_HIDDEN, EXPANDER_HIDDEN = 2048, 4096
"""Hidden widths that the published code fixes (facts: no option sets them)."""


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
    epoch: int
    """0-based number of the last finished epoch."""
    cfg: str = field(repr=False)
    """The configuration as the file has it, YAML text."""
    optimizer_state: Any = field(repr=False, default=None)

    @property
    def settings(self) -> dict[str, Any]:
        """`cfg`, parsed."""
        return _parse_cfg(self.cfg, Path("cfg"))


class UnfitWeights(ConfigError):
    """Weights of a network that this one cannot compute; `reasons` has every tensor that does not fit, and why."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


# What the published YAML can say and this network cannot do: option -> the one value that is in scope. An option that
# is absent is in scope; the tensors are checked in any case.
IN_SCOPE: dict[str, object] = {
    "MODEL.MODEL_NAME": "MViT",
    "MODEL.ARCH": "mvit",
    "MODEL.MULTI_USE_MOCO": False,
    "DETECTION.ENABLE": False,
    "DATA.INPUT_CHANNEL_NUM": [3],
    "DATA.MEAN": [0.45, 0.45, 0.45],
    "DATA.STD": [0.225, 0.225, 0.225],
    "DATA.REVERSE_INPUT_CHANNEL": False,
    "MVIT.CLS_EMBED_ON": False,
    "MVIT.SEP_POS_EMBED": True,
    "MVIT.REL_POS_EMBED": False,
    "MVIT.REL_POS_SPATIAL": False,
    "MVIT.REL_POS_TEMPORAL": False,
    "MVIT.USE_ABS_POS": True,
    "MVIT.USE_FIXED_SINCOS_POS": False,
    "MVIT.USE_MEM": False,
    "MVIT.MODE": "conv",
    "MVIT.NORM": "layernorm",
    "MVIT.POOL_FIRST": False,
    "MVIT.POOL_SKIP_USE_CONV": False,
    "MVIT.POOL_KVQ_KERNEL": [3, 3, 3],
    "MVIT.CHANNEL_EXPAND_FRONT": True,
    "MVIT.QKV_BIAS": True,
    "MVIT.SEPARATE_QKV": False,
    "MVIT.fixed_attn_scale": False,
    "MVIT.NORM_STEM": False,
    "MVIT.PATCH_2D": False,
    "MVIT.PATCH_KERNEL": [3, 7, 7],
    "MVIT.PATCH_STRIDE": [2, 4, 4],
    "MVIT.PATCH_PADDING": [1, 3, 3],
    "MVIT.NO_NORM_BEFORE_AVG": False,
    "MVIT.DROPOUT_RATE": 0.0,
    "MVIT.LAYER_SCALE_INIT_VALUE": 0.0,
    "MVIT.REV.ENABLE": False,
}


def read_pyth(
    path: str | Path, *, strict: bool = True
) -> tuple[ModelConfig, dict[str, int], dict[str, torch.Tensor], int]:
    """The network, datasets (classes by name, in head order), tensors by our names, and epoch of a `.pyth` file.

    Raises:
        ConfigError: see :func:`read_published`.
    """
    file = read_published(path, strict=strict)
    return file.config, file.datasets, file.state, file.epoch


def read_published(path: str | Path, *, strict: bool = True) -> Published:
    """Everything a `.pyth` file holds, checked.

    Args:
        path: the file.
        strict: the tensors must be exactly those of the network in the file's configuration. Otherwise unknown ones
            are dropped and missing ones stay missing; other shapes are an error in any case.

    Raises:
        ConfigError: no such file, damaged, holding code, without configuration, an option outside this network's scope
            (named), or tensors that contradict the configuration (named).
    """
    path = Path(path)
    content = _load_archive(path)
    published: dict[str, torch.Tensor] = content["model_state"]
    reasons = _official_mvit(published)
    if reasons:
        raise _official_error(path, published, reasons)
    if not isinstance(content.get("cfg"), str):
        raise ConfigError(
            f"{path}: holds no 'cfg' text, so its network is not known; use the checkpoint as the training code wrote it"
        )
    config, datasets, multi_label, single = read_cfg(content["cfg"], path, tensors=published)
    names = name_map(config, datasets, single=single)
    wanted = layout(config, datasets)
    ours = {names.get(name, name): tensor for name, tensor in published.items()}
    report = compare(shapes(ours), wanted)
    if strict or report.reshaped:
        require_all(
            report, str(path), "the tensors contradict the file's own cfg; the file was changed after it was written"
        )
    state = {name: ours[name].clone() for name in ours if name in wanted}
    return Published(
        config,
        datasets,
        multi_label,
        state,
        int(content.get("epoch", 0)),
        content["cfg"],
        content.get("optimizer_state"),
    )


def read_cfg(
    text: str, where: str | Path = "cfg", *, tensors: Mapping[str, torch.Tensor] | None = None
) -> tuple[ModelConfig, dict[str, int], tuple[str, ...], bool]:
    """The network that a configuration describes: its settings, datasets, multi-label datasets, and whether its head is
    the single-dataset one.

    Args:
        text: YAML.
        where: the file, for messages.
        tensors: by published names; they give the two hidden widths that the YAML has no option for.

    Raises:
        ConfigError: not YAML, an option missing, or one outside this network's scope (named).
    """
    path = Path(where)
    cfg = _parse_cfg(text, path)
    datasets, multi_label, single = _datasets(cfg, path)
    return _model_config(cfg, path, single=single, tensors=tensors or {}), datasets, multi_label, single


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
    sampling_rate: int = 3,
    target_fps: float = 30.0,
) -> None:
    """Writes tensors of our names as a `.pyth` file that the published code can build and load.

    Args:
        path: written under a temporary name, then renamed.
        config, datasets, state: of the model; `state` must hold exactly its tensors.
        epoch: 0-based number of the last finished epoch.
        multi_label: datasets whose head ends in a sigmoid.
        cfg: YAML text to keep, e.g. of the file that the weights came from; made from `config` when not given.
        optimizer_state: kept as it is.
        sampling_rate, target_fps: for the configuration text.

    Raises:
        ConfigError: `state` does not fit, `cfg` describes another network, or two pairs of dataset names collide.

    Warns:
        UserWarning: the published code cannot load the file fully (widths or names that it does not allow).
    """
    import torch

    path = Path(path)
    datasets = dict(datasets)
    require_all(
        compare(shapes(state), layout(config, datasets)),
        str(path),
        "the weights are not those of the model to be written",
    )
    text = cfg if cfg is not None else make_cfg(config, datasets, multi_label, sampling_rate, target_fps)
    parsed, named, _, single = read_cfg(text, path)
    if named != datasets or _architecture(parsed) != _architecture(config):
        raise ConfigError(
            f"{path}: the cfg text describes another model than the weights; leave cfg out to have it made"
        )
    names = name_map(config, datasets, single=single)
    for problem in _not_publishable(config, datasets, single=single):
        warnings.warn(f"{path}: {problem}", stacklevel=2)
    tensors = OrderedDict((theirs, state[ours].detach().cpu().clone()) for theirs, ours in names.items())
    content = {
        "epoch": epoch,
        "model_state": tensors,
        "optimizer_state": optimizer_state if optimizer_state is not None else {"state": {}, "param_groups": []},
        "cfg": text,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def layout(config: ModelConfig, datasets: Mapping[str, int]) -> dict[str, Shape]:
    """Name and shape of every tensor of the model, by our names in the published order, without building it."""
    grid = config.crop // 4
    out: dict[str, Shape] = {
        "pos_embed_spatial": (1, grid * grid, config.width),
        "pos_embed_temporal": (1, config.frames // 2, config.width),
        "patch_embed.proj.weight": (config.width, 3, 3, 7, 7),
        "patch_embed.proj.bias": (config.width,),
    }
    wide = config.width
    for i in range(config.depth):
        changes = i in config.stages
        out.update(
            _block_layout(
                f"blocks.{i}.", wide, wide * (2 if changes else 1), config, pools_q=changes or config.pool_q_everywhere
            )
        )
        wide *= 2 if changes else 1
    _affine(out, "norm", wide)
    for name, classes in datasets.items():
        head = f"heads.{escape(name)}"
        if config.head == "mlp":
            _affine(out, f"{head}.fc1", config.head_hidden, wide)
            _affine(out, f"{head}.fc2", classes, config.head_hidden)
        else:
            _affine(out, head, classes, wide)
    for source, target in _pairs(config, datasets):
        out[f"projections.{escape(source)}.{escape(target)}.weight"] = (datasets[target], datasets[source])
    if config.expander:
        _affine(out, "expander.fc1", config.expander_hidden, wide)
        _affine(out, "expander.fc2", wide, config.expander_hidden)
    return out


def name_map(config: ModelConfig, datasets: Mapping[str, int], *, single: bool) -> dict[str, str]:
    """Published name → our name of every tensor, in the published order.

    Args:
        config, datasets: of the model.
        single: the one head is ``head.projection`` (``USE_MULTI_HEAD: false``).

    Raises:
        ConfigError: dataset names that make two published projection names the same.
    """
    theirs: dict[str, str] = {}
    for ours in layout(config, datasets):
        theirs[ours] = ours
        for name in datasets:
            prefix = f"heads.{escape(name)}."
            if ours.startswith(prefix):
                theirs[ours] = ("head.projection." if single else f"head.heads.{name}.") + ours.removeprefix(prefix)
    for source, target in _pairs(config, datasets):
        theirs[f"projections.{escape(source)}.{escape(target)}.weight"] = (
            f"head.cross_dataset_heads.{source}_{target}.weight"
        )
    back = {v: k for k, v in theirs.items()}
    if len(back) != len(theirs):
        raise ConfigError(
            f"datasets {', '.join(datasets)}: the published names of two projections are the same, because names are joined with '_'; "
            "rename a dataset, or use .safetensors"
        )
    return back


def make_cfg(
    config: ModelConfig,
    datasets: Mapping[str, int],
    multi_label: Collection[str] = (),
    sampling_rate: int = 3,
    target_fps: float = 30.0,
) -> str:
    """YAML text from which the published code builds this model; numbers have the types that its schema checks."""
    single = len(datasets) == 1 and config.head == "linear"
    stages = list(config.stages)
    act = ["sigmoid" if d in multi_label else "softmax" for d in datasets]
    loss = ["bce_logit" if d in multi_label else "soft_cross_entropy" for d in datasets]
    count = len(datasets)
    settings = {
        "DATA": {
            "NUM_FRAMES": config.frames,
            "SAMPLING_RATE": sampling_rate,
            "TARGET_FPS": int(target_fps) if float(target_fps).is_integer() else float(target_fps),
            "TRAIN_CROP_SIZE": config.crop,
            "TEST_CROP_SIZE": config.crop,
            "INPUT_CHANNEL_NUM": [3],
            "MULTI_LABEL": not single,
            "DECODING_BACKEND": "decord",
            "USE_OFFSET_SAMPLING": True,
        },
        "MODEL": {
            "ARCH": "mvit",
            "MODEL_NAME": "MViT",
            "NUM_CLASSES": next(iter(datasets.values())) if single else sum(datasets.values()),
            "DROPOUT_RATE": float(config.head_dropout),
            "HEAD_ACT": act[0] if single else "softmax",
            "LOSS_FUNC": loss[0] if single else "soft_cross_entropy",
            "USE_MULTI_HEAD": not single,
            "MULTI_USE_MLP": config.head == "mlp",
            "MULTI_DATASETS": list(datasets),
            "MULTI_NUM_CLASSES": list(datasets.values()),
            "MULTI_HEAD_ACT": act,
            "MULTI_LOSS_FUNCS": loss,
            "MULTI_LOSS_WEIGHTS": [1.0] * count,
            "MULTI_REPLICAS": [1] * count,
            "MULTI_ADD_CROSS_PROJ": bool(_pairs(config, datasets)),
            "USE_INF_LOSS": config.expander,
            "USE_INF_EXPANDER": config.expander,
        },
        "MVIT": {
            "MODE": "conv",
            "NORM": "layernorm",
            "CLS_EMBED_ON": False,
            "SEP_POS_EMBED": True,
            "REL_POS_EMBED": False,
            "PATCH_KERNEL": [3, 7, 7],
            "PATCH_STRIDE": [2, 4, 4],
            "PATCH_PADDING": [1, 3, 3],
            "EMBED_DIM": config.width,
            "NUM_HEADS": config.heads,
            "MLP_RATIO": float(config.mlp_ratio),
            "QKV_BIAS": True,
            "DROPPATH_RATE": float(config.drop_path),
            "DROPOUT_RATE": 0.0,
            "DEPTH": config.depth,
            "DIM_MUL": [[s, 2.0] for s in stages],
            "HEAD_MUL": [[s, 2.0] for s in stages],
            "POOL_KVQ_KERNEL": [3, 3, 3],
            "POOL_KV_STRIDE_ADAPTIVE": [1, config.kv_stride, config.kv_stride],
            "POOL_Q_STRIDE": [[s, 1, 2, 2] for s in stages],
            "CHANNEL_EXPAND_FRONT": True,
            "POOL_SKIP_USE_CONV": False,
            "Q_POOL_ALL": config.pool_q_everywhere,
            "Q_POOL_RESIDUAL": config.residual_q,
        },
        "TRAIN": {"DATASET": next(iter(datasets)) if single else "multi_dataset_seq"},
        "TEST": {"DATASET": next(iter(datasets))},
    }
    return yaml.safe_dump(settings, allow_unicode=True)


# -- reading the archive ---------------------------------------------------------------------------------------------


def _load_archive(path: Path) -> dict[str, Any]:
    import torch

    if not path.is_file():
        raise ConfigError(
            f"{path}: {'is a folder, not a .pyth file' if path.is_dir() else 'no such file'}; give the checkpoint's path"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path}: holds Python objects beside tensors, which could run code, or is no torch file; "
            "re-save only its model_state and cfg with a trusted torch"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: damaged or no torch file ({first[:160]}); copy or download it again") from None
    state = content.get("model_state") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ConfigError(
            f"{path}: has no 'model_state' with tensors, so it is not a published checkpoint; see docs for what can be read"
        )
    return dict(content)


def _parse_cfg(text: str, path: Path) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: its 'cfg' is not YAML ({' '.join(str(error).split())[:160]}); the file is damaged"
        ) from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: its 'cfg' holds no settings; use the checkpoint as the training code wrote it")
    return parsed


def _get(cfg: Mapping[str, Any], dotted: str, default: object = None) -> Any:
    node: Any = cfg
    for part in dotted.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def _need(cfg: Mapping[str, Any], dotted: str, path: Path) -> Any:
    value = _get(cfg, dotted)
    if value is None:
        raise ConfigError(
            f"{path}: its cfg does not set {dotted}, so its network is not known; use the cfg that the training code wrote"
        )
    return value


# -- the network from the configuration text -------------------------------------------------------------------------


def _model_config(
    cfg: Mapping[str, Any], path: Path, *, single: bool, tensors: Mapping[str, torch.Tensor]
) -> ModelConfig:
    _require_scope(cfg, path)
    stages, everywhere = _stages(cfg, path)
    crop, test_crop = _need(cfg, "DATA.TRAIN_CROP_SIZE", path), _get(cfg, "DATA.TEST_CROP_SIZE")
    if test_crop is not None and test_crop != crop:
        raise ConfigError(
            f"{path}: TRAIN_CROP_SIZE {crop} and TEST_CROP_SIZE {test_crop} differ, which the network cannot serve; set them equal"
        )
    mlp = not single and bool(_get(cfg, "MODEL.MULTI_USE_MLP", False))
    values = {
        "frames": _need(cfg, "DATA.NUM_FRAMES", path),
        "crop": crop,
        "depth": _need(cfg, "MVIT.DEPTH", path),
        "width": _need(cfg, "MVIT.EMBED_DIM", path),
        "heads": _need(cfg, "MVIT.NUM_HEADS", path),
        "stages": stages,
        "kv_stride": _kv_stride(cfg, path),
        "mlp_ratio": _get(cfg, "MVIT.MLP_RATIO", 4.0),
        "pool_q_everywhere": everywhere,
        "residual_q": bool(_get(cfg, "MVIT.Q_POOL_RESIDUAL", False)),
        "drop_path": _get(cfg, "MVIT.DROPPATH_RATE", 0.0),
        "head": "mlp" if mlp else "linear",
        "head_hidden": _rows(tensors, "head.heads.", ".fc1.weight", HEAD_HIDDEN),
        "head_dropout": _get(cfg, "MODEL.DROPOUT_RATE", 0.5),
        "dropout_logits": mlp,
        "projections": not single and bool(_get(cfg, "MODEL.MULTI_ADD_CROSS_PROJ", False)),
        "expander": bool(_get(cfg, "MODEL.USE_INF_LOSS", False)) and bool(_get(cfg, "MODEL.USE_INF_EXPANDER", True)),
        "expander_hidden": _rows(tensors, "expander.", "fc1.weight", EXPANDER_HIDDEN),
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{path}: a network that cannot be built here: {where + ': ' if where else ''}{message}"
        ) from None


def _rows(tensors: Mapping[str, torch.Tensor], start: str, end: str, default: int) -> int:
    """First dimension of the first tensor so named: a width that the YAML has no option for."""
    return next((int(t.shape[0]) for n, t in tensors.items() if n.startswith(start) and n.endswith(end)), default)


def _require_scope(cfg: Mapping[str, Any], path: Path) -> None:
    absent = object()
    wrong = []
    for option, only in IN_SCOPE.items():
        value = _get(cfg, option, absent)
        if value is not absent and value is not None and value != only:
            wrong.append(f"{option}={value!r} (only {only!r})")
    if wrong:
        raise ConfigError(f"{path}: a network outside what is supported: {listed(wrong, most=6)}; it cannot be loaded")


def _stages(cfg: Mapping[str, Any], path: Path) -> tuple[tuple[int, ...], bool]:
    """Blocks that change stage, from the three options that must agree; and whether every block pools its queries."""
    depth = _need(cfg, "MVIT.DEPTH", path)
    strides = {int(e[0]): tuple(e[1:]) for e in _get(cfg, "MVIT.POOL_Q_STRIDE") or []}
    pooled = tuple(sorted(b for b, s in strides.items() if s == (1, 2, 2)))
    odd = {b: s for b, s in strides.items() if s not in ((1, 2, 2), (1, 1, 1))}
    if odd:
        block, stride = next(iter(odd.items()))
        raise ConfigError(f"{path}: MVIT.POOL_Q_STRIDE {list(stride)} at block {block}; only [1, 2, 2] is supported")
    for option in ("DIM_MUL", "HEAD_MUL"):
        factors = {int(b): float(f) for b, f in _get(cfg, f"MVIT.{option}") or [] if float(f) != 1.0}
        if any(f != 2.0 for f in factors.values()):
            raise ConfigError(f"{path}: MVIT.{option} {factors}; only a factor of 2.0 is supported")
        if tuple(sorted(factors)) != pooled:
            raise ConfigError(
                f"{path}: MVIT.{option} at blocks {sorted(factors)}, MVIT.POOL_Q_STRIDE at {list(pooled)}; "
                "only networks that halve the grid and double channels and heads at the same blocks are supported"
            )
    ones = {b for b, s in strides.items() if s == (1, 1, 1)}
    rest = set(range(depth)) - set(pooled)
    if ones and ones != rest:
        raise ConfigError(
            f"{path}: MVIT.POOL_Q_STRIDE pools queries in some blocks only ({sorted(ones)[:4]} …); all or none is supported"
        )
    everywhere = bool(_get(cfg, "MVIT.Q_POOL_ALL", False)) or (bool(rest) and ones == rest)
    return pooled, everywhere


def _kv_stride(cfg: Mapping[str, Any], path: Path) -> int:
    """First-stage stride of keys and values, from the adaptive option or from the list that is derived from it."""
    adaptive = _get(cfg, "MVIT.POOL_KV_STRIDE_ADAPTIVE")
    if adaptive:
        if len(adaptive) != 3 or adaptive[0] != 1 or adaptive[1] != adaptive[2]:
            raise ConfigError(f"{path}: MVIT.POOL_KV_STRIDE_ADAPTIVE {adaptive}; only [1, s, s] is supported")
        return int(adaptive[1])
    entries = {int(e[0]): tuple(int(v) for v in e[1:]) for e in _get(cfg, "MVIT.POOL_KV_STRIDE") or []}
    stages, _ = _stages(cfg, path)
    first = entries.get(0, (1, 1, 1))[1]
    stride = first
    for block in range(int(_need(cfg, "MVIT.DEPTH", path))):
        stride = max(stride // 2, 1) if block in stages else stride
        if entries.get(block, (1, 1, 1)) != (1, stride, stride):
            raise ConfigError(
                f"{path}: MVIT.POOL_KV_STRIDE {list(entries.get(block, ()))} at block {block} where [1, {stride}, {stride}] "
                "follows from block 0; only strides that halve at every stage change are supported"
            )
    return first


def _datasets(cfg: Mapping[str, Any], path: Path) -> tuple[dict[str, int], tuple[str, ...], bool]:
    """Classes by dataset in head order, the multi-label ones, and whether the head is the single-dataset one."""
    single = not _get(cfg, "MODEL.USE_MULTI_HEAD", False)
    if single:
        names, classes = [_need(cfg, "TRAIN.DATASET", path)], [_need(cfg, "MODEL.NUM_CLASSES", path)]
        acts = [_get(cfg, "MODEL.HEAD_ACT", "softmax")]
    else:
        names, classes = _need(cfg, "MODEL.MULTI_DATASETS", path), _need(cfg, "MODEL.MULTI_NUM_CLASSES", path)
        acts = _get(cfg, "MODEL.MULTI_HEAD_ACT") or ["softmax"] * len(names)
    if len(names) != len(classes) or len(acts) < len(names) or len(set(names)) != len(names) or not names:
        raise ConfigError(
            f"{path}: its cfg lists datasets {names}, class counts {classes} and activations {acts}, which do not belong together"
        )
    if not set(acts[: len(names)]) <= {"softmax", "sigmoid"}:
        raise ConfigError(f"{path}: head activations {acts}; only softmax and sigmoid are supported")
    multi_label = tuple(n for n, a in zip(names, acts) if a == "sigmoid")
    return {str(n): int(c) for n, c in zip(names, classes)}, multi_label, single


# -- layout ----------------------------------------------------------------------------------------------------------


def _affine(out: dict[str, Shape], name: str, *shape: int) -> None:
    out[f"{name}.weight"] = shape
    out[f"{name}.bias"] = shape[:1]


def _block_layout(at: str, into: int, wide: int, config: ModelConfig, *, pools_q: bool) -> dict[str, Shape]:
    out: dict[str, Shape] = {}
    head = config.width // config.heads
    hidden = int(wide * config.mlp_ratio)
    _affine(out, at + "norm1", into)
    _affine(out, at + "attn.qkv", 3 * wide, into)
    _affine(out, at + "attn.proj", wide, wide)
    for which in ("q", "k", "v") if pools_q else ("k", "v"):
        out[f"{at}attn.pool_{which}.weight"] = (head, 1, 3, 3, 3)
        _affine(out, f"{at}attn.norm_{which}", head)
    _affine(out, at + "norm2", wide)
    _affine(out, at + "mlp.fc1", hidden, wide)
    _affine(out, at + "mlp.fc2", wide, hidden)
    if into != wide:
        _affine(out, at + "proj_max_pool", wide, into)
    return out


def _pairs(config: ModelConfig, datasets: Mapping[str, int]) -> list[tuple[str, str]]:
    """(source, target) of every projection, in the published order: for each target, its sources."""
    if not config.projections:
        return []
    return [(source, target) for target in datasets for source in datasets if source != target]


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What determines the function computed in evaluation; dropout rates and unused widths left out."""
    unused = {"drop_path", "head_dropout", "dropout_logits", "head_hidden", "expander_hidden"}
    return config.model_dump(exclude=unused)


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


# -- other people's networks -----------------------------------------------------------------------------------------

_OFFICIAL: Sequence[tuple[str, str]] = (
    ("rel_pos_", "relative position embedding; this network adds absolute tables"),
    ("cls_token", "class token; this network averages all tokens"),
    ("pos_embed_class", "position of a class token"),
)


def _official_mvit(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensors of the official MViT/MViTv2 layout that this network cannot use, each with the reason; empty for others."""
    reasons = {n: why for n in state for mark, why in _OFFICIAL if mark in n}
    for name in state:
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) == 4 and parts[2] == "proj":
            reasons[name] = "another projection of channels; this network's proj_max_pool takes the un-normalised input"
    return reasons


def _official_error(path: Path, state: Mapping[str, torch.Tensor], reasons: Mapping[str, str]) -> UnfitWeights:
    absent = [n for n in POSITIONS if n not in state]
    by_reason: dict[str, list[str]] = {}
    for name, why in reasons.items():
        by_reason.setdefault(why, []).append(name)
    said = "; ".join(f"{len(names)} × {why} ({listed(names, most=2)})" for why, names in by_reason.items())
    lacks = f"; it has no {' and '.join(absent)}" if absent else ""
    return UnfitWeights(
        f"{path}: an official MViT checkpoint, which this network cannot compute: {said}{lacks}; "
        "start from a published MultiTrain checkpoint instead",
        reasons,
    )


__all__ = [
    "EXPANDER_HIDDEN",
    "HEAD_HIDDEN",
    "IN_SCOPE",
    "Published",
    "UnfitWeights",
    "layout",
    "make_cfg",
    "name_map",
    "read_cfg",
    "read_published",
    "read_pyth",
    "write_pyth",
]
