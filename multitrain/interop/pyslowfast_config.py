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
from multitrain.config.mvitv2 import MVITV2
from multitrain.config.reading import parse_yaml
from multitrain.interop.cfg_values import get, kv_stride, need, require_scope, stages
from multitrain.interop.layout import pairs
from multitrain.interop.official_config import is_official, official_backbone, official_options
from multitrain.interop.protocol import options_of

if TYPE_CHECKING:
    import torch

OFFICIAL_DATASET = "kinetics"
"""The official default of ``TRAIN.DATASET``."""

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
        "MVIT": _backbone_options(config),
        "TRAIN": {"DATASET": next(iter(datasets)) if single else "multi_dataset_seq"},
        "TEST": {"DATASET": next(iter(datasets))},
    }
    if config.channels == "bgr":
        settings["DATA"]["REVERSE_INPUT_CHANNEL"] = True
    if config.backbone == MVITV2:
        settings["DATA"] |= {"MEAN": list(config.mean), "STD": list(config.std)}
    for section, options in (options_of(tested, config.crop) if tested else {}).items():
        settings[section] |= options
    return yaml.safe_dump(settings, allow_unicode=True)


def _backbone_options(config: ModelConfig) -> dict[str, Any]:
    """The options of ``MVIT``."""
    changes = list(config.stages)
    common = {
        "MODE": "conv",
        "NORM": "layernorm",
        "PATCH_KERNEL": [3, 7, 7],
        "PATCH_STRIDE": [2, 4, 4],
        "PATCH_PADDING": [1, 3, 3],
        "EMBED_DIM": config.width,
        "NUM_HEADS": config.heads,
        "MLP_RATIO": float(config.mlp_ratio),
        "DROPPATH_RATE": float(config.drop_path),
        "DROPOUT_RATE": 0.0,
        "DEPTH": config.depth,
        "DIM_MUL": [[s, 2.0] for s in changes],
        "HEAD_MUL": [[s, 2.0] for s in changes],
        "POOL_KVQ_KERNEL": [3, 3, 3],
        "POOL_KV_STRIDE_ADAPTIVE": [1, config.kv_stride, config.kv_stride],
    }
    if config.backbone == MVITV2:
        return common | official_options(config)
    return common | {
        "CLS_EMBED_ON": False,
        "SEP_POS_EMBED": True,
        "REL_POS_EMBED": False,
        "QKV_BIAS": True,
        "POOL_Q_STRIDE": [[s, 1, 2, 2] for s in changes],
        "CHANNEL_EXPAND_FRONT": True,
        "POOL_SKIP_USE_CONV": False,
        "Q_POOL_ALL": config.pool_q_everywhere,
        "Q_POOL_RESIDUAL": config.residual_q,
    }


def describes_network(text: str, path: Path) -> bool:
    """Whether a configuration text sets the sizes of a network: the size of clips and the number of blocks. Raises ConfigError."""
    cfg = parse_cfg(text, path)
    return all(get(cfg, option) is not None for option in ("DATA.NUM_FRAMES", "DATA.TRAIN_CROP_SIZE", "MVIT.DEPTH"))


def parse_cfg(text: str, path: Path) -> dict[str, Any]:
    """Parse the YAML text of a checkpoint's cfg. Raises ConfigError if it is not a mapping."""
    parsed = parse_yaml(text, f"{path}: its 'cfg'")
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: its 'cfg' holds no settings; use the checkpoint as the training code wrote it")
    return parsed


def _model_config(
    cfg: Mapping[str, Any], path: Path, *, single: bool, tensors: Mapping[str, torch.Tensor]
) -> ModelConfig:
    crop, test_crop = need(cfg, "DATA.TRAIN_CROP_SIZE", path), get(cfg, "DATA.TEST_CROP_SIZE")
    if test_crop is not None and test_crop != crop:
        raise ConfigError(
            f"{path}: TRAIN_CROP_SIZE {crop} and TEST_CROP_SIZE {test_crop} differ, which this network does not support; set them equal"
        )
    mlp = not single and bool(get(cfg, "MODEL.MULTI_USE_MLP", False))
    values = {
        "frames": need(cfg, "DATA.NUM_FRAMES", path),
        "crop": crop,
        "channels": "bgr" if get(cfg, "DATA.REVERSE_INPUT_CHANNEL", False) else "rgb",
        "head": "mlp" if mlp else "linear",
        "head_hidden": _rows(tensors, "head.heads.", ".fc1.weight", HEAD_HIDDEN),
        "head_dropout": get(cfg, "MODEL.DROPOUT_RATE", 0.5),
        "dropout_logits": mlp,
        "projections": not single and bool(get(cfg, "MODEL.MULTI_ADD_CROSS_PROJ", False)),
        "expander": bool(get(cfg, "MODEL.USE_INF_LOSS", False)) and bool(get(cfg, "MODEL.USE_INF_EXPANDER", True)),
        "expander_hidden": _rows(tensors, "expander.", "fc1.weight", EXPANDER_HIDDEN),
        **(official_backbone(cfg, path) if is_official(cfg) else _published_backbone(cfg, path)),
    }
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: this network cannot be built: {first_problem(error)}") from None


def _published_backbone(cfg: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of `ModelConfig` for the backbone of the published code."""
    require_scope(cfg, path, IN_SCOPE)
    changes, everywhere = stages(cfg, path)
    return {
        "depth": need(cfg, "MVIT.DEPTH", path),
        "width": need(cfg, "MVIT.EMBED_DIM", path),
        "heads": need(cfg, "MVIT.NUM_HEADS", path),
        "stages": changes,
        "kv_stride": kv_stride(cfg, path),
        "mlp_ratio": get(cfg, "MVIT.MLP_RATIO", 4.0),
        "pool_q_everywhere": everywhere,
        "residual_q": bool(get(cfg, "MVIT.Q_POOL_RESIDUAL", False)),
        "drop_path": get(cfg, "MVIT.DROPPATH_RATE", 0.0),
    }


def _rows(tensors: Mapping[str, torch.Tensor], start: str, end: str, default: int) -> int:
    """First dimension of the first tensor with this prefix and suffix: a width for which the YAML has no option."""
    return next((int(t.shape[0]) for n, t in tensors.items() if n.startswith(start) and n.endswith(end)), default)


def _datasets(cfg: Mapping[str, Any], path: Path) -> tuple[dict[str, int], tuple[str, ...], bool]:
    """(classes by dataset in head order, multi-label datasets, whether the model has the single-dataset head)."""
    single = not get(cfg, "MODEL.USE_MULTI_HEAD", False)
    if single:
        dataset = get(cfg, "TRAIN.DATASET") or (OFFICIAL_DATASET if is_official(cfg) else None)
        names, classes = [dataset or need(cfg, "TRAIN.DATASET", path)], [need(cfg, "MODEL.NUM_CLASSES", path)]
        acts = [get(cfg, "MODEL.HEAD_ACT", "softmax")]
    else:
        names, classes = need(cfg, "MODEL.MULTI_DATASETS", path), need(cfg, "MODEL.MULTI_NUM_CLASSES", path)
        acts = get(cfg, "MODEL.MULTI_HEAD_ACT") or ["softmax"] * len(names)
    if len(names) != len(classes) or len(acts) < len(names) or len(set(names)) != len(names) or not names:
        raise ConfigError(
            f"{path}: its cfg lists datasets {names}, class counts {classes} and activations {acts}, which do not belong together"
        )
    if not set(acts[: len(names)]) <= {"softmax", "sigmoid"}:
        raise ConfigError(f"{path}: head activations {acts}; only softmax and sigmoid are supported")
    multi_label = tuple(n for n, a in zip(names, acts) if a == "sigmoid")
    return {str(n): int(c) for n, c in zip(names, classes)}, multi_label, single


__all__ = ["EXPANDER_HIDDEN", "HEAD_HIDDEN", "IN_SCOPE", "describes_network", "make_cfg", "parse_cfg", "read_cfg"]
