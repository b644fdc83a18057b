"""Weights of an image network (MViTv2 on ImageNet-21k) for a video network: convolutions get a third axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from multitrain.interop.state_dict_report import Shape

if TYPE_CHECKING:
    import torch

PATCHES = "patch_embed.proj.weight"
CLASS_TOKEN = "cls_token"


def is_of_images(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the patch embedding of these tensors is a convolution of images."""
    return PATCHES in state and state[PATCHES].dim() == 4


def inflate(state: Mapping[str, torch.Tensor], wanted: Mapping[str, Shape]) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors of an image network as those of a video network, a note about it).

    A 2-D convolution [C, c, H, W] becomes a 3-D one [C, c, T, H, W] of T equal taps, each 1/T of it, as PySlowFast's
    ``TRAIN.CHECKPOINT_INFLATE`` does; relative positions in time are zero, so that attention begins without them.

    Args:
        state: tensors by name.
        wanted: shapes of the video network's tensors by name.
    """
    import torch

    found = dict(state)
    flat = [n for n, t in state.items() if len(wanted.get(n, ())) == 5 and t.shape == (*wanted[n][:2], *wanted[n][3:])]
    for name in flat:
        shape = wanted[name]
        found[name] = (state[name][:, :, None] / shape[2]).expand(shape).contiguous()
    times = [n for n in wanted if n.endswith(".rel_pos_t") and n not in state]
    found |= {name: torch.zeros(wanted[name]) for name in times}
    note = f"inflated from images: {len(flat)} convolutions; {len(times)} tables of relative positions in time are 0"
    if CLASS_TOKEN in wanted and CLASS_TOKEN not in state:
        note += f"; {CLASS_TOKEN} keeps its initial value"
    return found, note


__all__ = ["CLASS_TOKEN", "inflate", "is_of_images"]
