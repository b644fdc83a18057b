"""Name and shape of every tensor of a model, without its memory, and its name in the published code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.state_dict_report import Shape, shapes
from multitrain.model.heads import escape


def require_possible(path: Path, config: ModelConfig, datasets: Mapping[str, int], tensors: int) -> None:
    """Raise ConfigError if a file describes more blocks or heads than it has tensors.

    Cheap for any numbers, unlike :func:`layout`, whose time and memory grow with them.
    """
    blocks = 0 if config.own_backbone else config.depth
    if max(blocks, len(datasets)) > tensors:
        raise ConfigError(
            f"{path}: describes {blocks} blocks and {len(datasets)} heads, but holds {tensors} tensors; copy it again"
        )


def layout(config: ModelConfig, datasets: Mapping[str, int]) -> dict[str, Shape]:
    """Shape of every tensor of the model by MultiTrain's names, in the published order.

    Networks with another backbone than the published one are built on the meta device.
    """
    if config.backbone is not None:
        return _built(config, datasets)
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
    for source, target in pairs(config, datasets):
        out[f"projections.{escape(source)}.{escape(target)}.weight"] = (datasets[target], datasets[source])
    if config.expander:
        _affine(out, "expander.fc1", config.expander_hidden, wide)
        _affine(out, "expander.fc2", wide, config.expander_hidden)
    return out


def _built(config: ModelConfig, datasets: Mapping[str, int]) -> dict[str, Shape]:
    import torch

    from multitrain.model.multitrain import MultiTrain

    with torch.device("meta"):
        return shapes(MultiTrain(config, dict(datasets)).state_dict())


def name_map(config: ModelConfig, datasets: Mapping[str, int], *, single: bool) -> dict[str, str]:
    """Published name → MultiTrain's name of every tensor, in the published order.

    Args:
        config, datasets: of the model.
        single: whether the one head is called ``head.projection`` (``USE_MULTI_HEAD: false``).

    Raises:
        ConfigError: two projections have the same published name, because of the datasets' names.
    """
    theirs: dict[str, str] = {}
    for ours in layout(config, datasets):
        theirs[ours] = ours
        for name in datasets:
            prefix = f"heads.{escape(name)}."
            if ours.startswith(prefix):
                theirs[ours] = ("head.projection." if single else f"head.heads.{name}.") + ours.removeprefix(prefix)
    for source, target in pairs(config, datasets):
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


def pairs(config: ModelConfig, datasets: Mapping[str, int]) -> list[tuple[str, str]]:
    """(source, target) of every projection, in the published order: for each target, its sources."""
    if not config.projections:
        return []
    return [(source, target) for target in datasets for source in datasets if source != target]


__all__ = ["layout", "name_map", "pairs", "require_possible"]
