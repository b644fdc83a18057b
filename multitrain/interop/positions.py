"""Interpolation of position tables to another clip size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from multitrain.config import ConfigError, ModelConfig
from multitrain.interop.layout import layout
from multitrain.interop.state_dict_report import Shape, is_position_table

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
    """`state` with its position tables interpolated for clips of `frames` × `crop`².

    Separate tables: bicubic in space, linear in time. A joint table of the official networks: trilinear. Relative positions: linear.

    Args:
        state: tensors of a model of `config`; not changed.
        config: the network of `state`.
        frames, crop: clip size of the tables returned (frames, pixels).
    """
    wanted = layout(resized_config(config, frames, crop), {"any": 1})
    if config.own_backbone:
        other = [
            name
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape and "heads" not in name
        ]
        if other:
            raise ConfigError(
                f"clips of {frames} × {crop}² give {other[0]} of model.backbone another shape; start a new run"
            )
        return dict(state)
    out = {}
    for name, tensor in state.items():
        shape = wanted.get(name, tuple(tensor.shape))
        if is_position_table(name) and tuple(tensor.shape) != shape:
            tensor = _resized(name, tensor.float(), shape, config, frames, crop).to(tensor.dtype)
        out[name] = tensor
    return out


def _resized(name: str, table: torch.Tensor, shape: Shape, config: ModelConfig, frames: int, crop: int) -> torch.Tensor:
    """A position table in the shape of clips of another size."""
    from torch.nn import functional as F

    old, new = config.crop // 4, crop // 4
    if name == "pos_embed_spatial":
        grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        return grid.permute(0, 2, 3, 1).reshape(shape).contiguous()
    if name == "pos_embed_temporal":
        table = F.interpolate(table.transpose(1, 2), size=shape[1], mode="linear", align_corners=False)
        return table.transpose(1, 2).contiguous()
    if name == "pos_embed":
        import torch

        own = table.shape[1] - config.frames // 2 * old * old
        volume = table[:, own:].reshape(1, config.frames // 2, old, old, -1).permute(0, 4, 1, 2, 3)
        volume = F.interpolate(volume, size=(frames // 2, new, new), mode="trilinear", align_corners=False)
        return torch.cat([table[:, :own], volume.flatten(2).transpose(1, 2)], 1).contiguous()
    return resize_relative(table, shape[0])


def resize_relative(table: torch.Tensor, length: int) -> torch.Tensor:
    """A table of relative positions [L, d] as one of another length, by linear interpolation: [length, d]."""
    from torch.nn import functional as F

    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T.contiguous()


__all__ = ["resize_positions", "resize_relative", "resized_config"]
