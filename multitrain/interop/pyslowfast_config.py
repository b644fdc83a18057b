"""Read and write the published code's configuration text: YAML with the options of PySlowFast and of the published project.

A value that this network does not support raises an error that names the option.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from multitrain.config import ConfigError, DatasetConfig, ModelConfig
from multitrain.config.boundary import first_problem, understood
from multitrain.config.reading import parse_yaml
from multitrain.interop.layout import pairs
from multitrain.interop.protocol import options_of
from multitrain.interop.state_dict_report import abbreviated

if TYPE_CHECKING:
    import torch

HEAD_HIDDEN, EXPANDER_HIDDEN = 2048, 4096
"""Hidden widths that are constants in the published code; no option sets them."""

# Options of the published YAML of which this network supports one value: option -> that value. A missing option is
# accepted; the tensors are checked in any case.
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


def read_cfg(
    text: str, where: str | Path = "cfg", *, tensors: Mapping[str, torch.Tensor] | None = None
) -> tuple[ModelConfig, dict[str, int], tuple[str, ...], bool]:
    """Parse a published configuration to (network, classes by dataset, multi-label datasets, whether it has the single-dataset head).

    Args:
        text: YAML.
        where: the file, for messages.
        tensors: the checkpoint's tensors by published names; the two hidden widths, which the YAML does not set, come from their shapes.

    Raises:
        ConfigError: the text is not YAML, lacks an option, or sets one to a value that this network does not support.
    """
    path = Path(where)
    cfg = parse_cfg(text, path)
    with understood(
        f"{path}: its cfg has values of other kinds than such options", "use the cfg that the training code wrote"
    ):
        datasets, multi_label, single = _datasets(cfg, path)
        return _model_config(cfg, path, single=single, tensors=tensors or {}), datasets, multi_label, single


def make_cfg(
    config: ModelConfig,
    datasets: Mapping[str, int],
    multi_label: Collection[str] = (),
    sampling_rate: int = 3,
    target_fps: float = 30.0,
    tested: DatasetConfig | None = None,
) -> str:
    """The YAML text from which the published code builds this model; numbers have the types that its schema expects.

    Args:
        tested: the dataset whose test protocol is written; the published code has one protocol for all datasets.
    """
    single = len(datasets) == 1 and config.head == "linear"
    stages = list(config.stages)
    act = ["sigmoid" if d in multi_label else "softmax" for d in datasets]
    loss = ["bce_logit" if d in multi_label else "soft_cross_entropy" for d in datasets]
    count = len(datasets)
    settings: dict[str, dict[str, Any]] = {
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
            "MULTI_ADD_CROSS_PROJ": bool(pairs(config, datasets)),
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
    for section, options in (options_of(tested, config.crop) if tested else {}).items():
        settings[section] |= options
    return yaml.safe_dump(settings, allow_unicode=True)


def parse_cfg(text: str, path: Path) -> dict[str, Any]:
    """Parse the YAML text of a checkpoint's cfg. Raises ConfigError if it is not a mapping."""
    parsed = parse_yaml(text, f"{path}: its 'cfg'")
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


def _model_config(
    cfg: Mapping[str, Any], path: Path, *, single: bool, tensors: Mapping[str, torch.Tensor]
) -> ModelConfig:
    _require_scope(cfg, path)
    stages, everywhere = _stages(cfg, path)
    crop, test_crop = _need(cfg, "DATA.TRAIN_CROP_SIZE", path), _get(cfg, "DATA.TEST_CROP_SIZE")
    if test_crop is not None and test_crop != crop:
        raise ConfigError(
            f"{path}: TRAIN_CROP_SIZE {crop} and TEST_CROP_SIZE {test_crop} differ, which this network does not support; set them equal"
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
        raise ConfigError(f"{path}: this network cannot be built: {first_problem(error)}") from None


def _rows(tensors: Mapping[str, torch.Tensor], start: str, end: str, default: int) -> int:
    """First dimension of the first tensor with this prefix and suffix: a width for which the YAML has no option."""
    return next((int(t.shape[0]) for n, t in tensors.items() if n.startswith(start) and n.endswith(end)), default)


def _require_scope(cfg: Mapping[str, Any], path: Path) -> None:
    absent = object()
    wrong = []
    for option, only in IN_SCOPE.items():
        value = _get(cfg, option, absent)
        if value is not absent and value is not None and value != only:
            wrong.append(f"{option}={value!r} (only {only!r})")
    if wrong:
        raise ConfigError(f"{path}: this network is not supported: {abbreviated(wrong, most=6)}; it cannot be loaded")


def _stages(cfg: Mapping[str, Any], path: Path) -> tuple[tuple[int, ...], bool]:
    """(blocks at which a stage begins, from three options that must agree; whether every block pools its queries)."""
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
    if ones and (depth > len(strides) or ones != set(range(depth)) - set(pooled)):
        raise ConfigError(
            f"{path}: MVIT.POOL_Q_STRIDE pools queries in some blocks only ({sorted(ones)[:4]} …); all or none is supported"
        )
    everywhere = bool(_get(cfg, "MVIT.Q_POOL_ALL", False)) or bool(ones)
    return pooled, everywhere


def _kv_stride(cfg: Mapping[str, Any], path: Path) -> int:
    """Stride of keys and values in the first stage, from the adaptive option or from the per-block list derived from it."""
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
    """(classes by dataset in head order, multi-label datasets, whether the model has the single-dataset head)."""
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


__all__ = ["EXPANDER_HIDDEN", "HEAD_HIDDEN", "IN_SCOPE", "make_cfg", "parse_cfg", "read_cfg"]
