"""The official MViT and MViTv2 releases: from PySlowFast's configuration text to the options of this network, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multitrain.config import ConfigError, ModelConfig
from multitrain.config.mvitv2 import MVITV2
from multitrain.interop.cfg_values import get, kv_stride, need, require_scope, stages

PUBLISHED_ONLY = ("CHANNEL_EXPAND_FRONT", "Q_POOL_ALL", "Q_POOL_RESIDUAL", "REL_POS_EMBED")
"""Options of ``MVIT`` that only the published code of this method has."""

OFFICIAL_ONLY = ("DIM_MUL_IN_ATT", "RESIDUAL_POOLING", "REL_POS_SPATIAL", "REL_POS_TEMPORAL", "USE_ABS_POS")
"""Options of ``MVIT`` that a text of the official code has."""

IN_SCOPE: dict[str, object] = {
    "MODEL.MODEL_NAME": "MViT",
    "MODEL.ARCH": "mvit",
    "DETECTION.ENABLE": False,
    "MASK.ENABLE": False,
    "DATA.INPUT_CHANNEL_NUM": [3],
    "MVIT.USE_FIXED_SINCOS_POS": False,
    "MVIT.MODE": "conv",
    "MVIT.NORM": "layernorm",
    "MVIT.POOL_FIRST": False,
    "MVIT.POOL_KVQ_KERNEL": [3, 3, 3],
    "MVIT.PATCH_2D": False,
    "MVIT.PATCH_KERNEL": [3, 7, 7],
    "MVIT.PATCH_STRIDE": [2, 4, 4],
    "MVIT.PATCH_PADDING": [1, 3, 3],
    "MVIT.DROPOUT_RATE": 0.0,
    "MVIT.LAYER_SCALE_INIT_VALUE": 0.0,
    "MVIT.REV.ENABLE": False,
}
"""Options of which one value is supported."""


def is_official(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration text is of the official code, not of the published code of this method."""
    options = get(cfg, "MVIT")
    if not isinstance(options, Mapping) or any(name in options for name in PUBLISHED_ONLY):
        return False
    return any(name in options for name in OFFICIAL_ONLY) or bool(options.get("CLS_EMBED_ON"))


def official_backbone(cfg: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The options of `ModelConfig` for the backbone; an option that the text does not set has the official default.

    Raises:
        ConfigError: an option has a value that is not supported (named).
    """
    require_scope(cfg, path, IN_SCOPE)
    changes, everywhere = stages(cfg, path)
    if not (get(cfg, "MVIT.POOL_KV_STRIDE_ADAPTIVE") or get(cfg, "MVIT.POOL_KV_STRIDE")):
        raise ConfigError(f"{path}: its cfg pools no keys and values (MVIT.POOL_KV_STRIDE), which is not supported")
    absolute, separate = get(cfg, "MVIT.USE_ABS_POS", True), get(cfg, "MVIT.SEP_POS_EMBED", False)
    return {
        "backbone": MVITV2,
        "mean": get(cfg, "DATA.MEAN") or (0.45, 0.45, 0.45),
        "std": get(cfg, "DATA.STD") or (0.225, 0.225, 0.225),
        "depth": need(cfg, "MVIT.DEPTH", path),
        "width": get(cfg, "MVIT.EMBED_DIM", 96),
        "heads": get(cfg, "MVIT.NUM_HEADS", 1),
        "stages": changes,
        "kv_stride": kv_stride(cfg, path),
        "mlp_ratio": get(cfg, "MVIT.MLP_RATIO", 4.0),
        "pool_q_everywhere": everywhere,
        "residual_q": bool(get(cfg, "MVIT.RESIDUAL_POOLING", False)),
        "drop_path": get(cfg, "MVIT.DROPPATH_RATE", 0.1),
        "backbone_args": {
            "class_token": bool(get(cfg, "MVIT.CLS_EMBED_ON", True)),
            "mean_pooling": bool(get(cfg, "MVIT.USE_MEAN_POOLING", False)),
            "relative_space": bool(get(cfg, "MVIT.REL_POS_SPATIAL", False)),
            "relative_time": bool(get(cfg, "MVIT.REL_POS_TEMPORAL", False)),
            "absolute": ("separate" if separate else "joint") if absolute else "none",
            "separate_qkv": bool(get(cfg, "MVIT.SEPARATE_QKV", False)),
            "qkv_bias": bool(get(cfg, "MVIT.QKV_BIAS", True)),
            "widen": "attention" if get(cfg, "MVIT.DIM_MUL_IN_ATT", False) else "mlp",
            "norm_stem": bool(get(cfg, "MVIT.NORM_STEM", False)),
        },
    }


def official_options(config: ModelConfig) -> dict[str, Any]:
    """The options of ``MVIT`` that the published code does not share: the inverse of `official_backbone`."""
    options = config.mvitv2
    pooled = range(config.depth) if config.pool_q_everywhere else config.stages
    return {
        "CLS_EMBED_ON": options.class_token,
        "USE_MEAN_POOLING": options.mean_pooling,
        "REL_POS_SPATIAL": options.relative_space,
        "REL_POS_TEMPORAL": options.relative_time,
        "USE_ABS_POS": options.absolute != "none",
        "SEP_POS_EMBED": options.absolute == "separate",
        "SEPARATE_QKV": options.separate_qkv,
        "QKV_BIAS": options.qkv_bias,
        "DIM_MUL_IN_ATT": options.widen == "attention",
        "NORM_STEM": options.norm_stem,
        "RESIDUAL_POOLING": config.residual_q,
        "POOL_Q_STRIDE": [[block, 1, *[2 if block in config.stages else 1] * 2] for block in pooled],
    }


__all__ = ["is_official", "official_backbone", "official_options"]
