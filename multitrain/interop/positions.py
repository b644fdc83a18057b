"""Interpolation of position tables to another clip size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.state_dict_report import POSITION_TABLES

if TYPE_CHECKING:
    import torch


def resized_config(config: ModelConfig, frames: int | None, crop: int | None) -> ModelConfig:
    """`config` for clips of another size (frames, pixels). Raises ConfigError if the size is invalid."""
    values = config.model_dump() | {"frames": frames or config.frames, "crop": crop or config.crop}
    try:
        return ModelConfig.model_validate(values)
    except ValueError as error:
        size = f"{values['frames']} × {values['crop']}²"
        raise ConfigError(f"clips of {size} are not possible: {' '.join(str(error).split())[:200]}") from None


def resize_positions(
    state: Mapping[str, torch.Tensor], config: ModelConfig, frames: int, crop: int
) -> dict[str, torch.Tensor]:
    """`state` with its position tables interpolated for clips of `frames` × `crop`²: bicubic in space, linear in time.

    Args:
        state: tensors of a model of `config`; not changed.
        config: the network of `state`.
        frames, crop: clip size of the tables returned (frames, pixels).
    """
    from torch.nn import functional as F

    spatial, temporal = (state[name].float() for name in POSITION_TABLES)
    old, new = config.crop // 4, crop // 4
    if new != old:
        grid = spatial.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        spatial = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).contiguous()
    if frames != config.frames:
        temporal = (
            F.interpolate(temporal.transpose(1, 2), size=frames // 2, mode="linear", align_corners=False)
            .transpose(1, 2)
            .contiguous()
        )
    changed = {name: t.to(state[name].dtype) for name, t in zip(POSITION_TABLES, (spatial, temporal))}
    return {name: changed.get(name, tensor) for name, tensor in state.items()}


__all__ = ["resize_positions", "resized_config"]
