"""Augmentation on the device: normalise, erase and mix clips, and compute their soft labels.

No result depends on the micro-batch: noise is keyed by the clip, λ and box by the first sample number of the mix group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from multitrain.config import AugmentConfig, DataConfig, ModelConfig
from multitrain.data.random import KeyedRNG
from multitrain.data.spatial import MEAN, STD, Box, network_pixels


class BatchLike(Protocol):
    """The attributes of a batch of N clips that `finalize_batch` reads; see `multitrain.data.loader.Batch`."""

    clips: Tensor
    dataset: Tensor
    labels: list[tuple[int, ...]]
    boxes: Tensor
    keys: Tensor
    start: int


@dataclass
class DeviceBatch:
    """A batch of N clips on the device: the input of model and loss."""

    clips: Tensor
    """float32 [N, 3, T, S, S], normalised, erased and mixed."""
    targets: dict[str, Tensor]
    """Soft labels by dataset, in head order: float32 [N, K]. Rows of other datasets' clips are ignored."""
    dataset: Tensor
    """Position in `targets` of each clip's dataset: int64 [N]."""
    keys: Tensor
    """Key of each clip's dropout masks: int64 [N]."""


class Mixing(NamedTuple):
    """Parameters of the mixing in one mix group."""

    share: float
    """λ: the weight of a clip's own pixels; for CutMix, corrected for the clipped box."""
    box: Box | None
    """The box that CutMix copies from the partner; None for mixup."""


def finalize_batch(
    batch: BatchLike,
    data: DataConfig,
    datasets: dict[str, int],
    augment: AugmentConfig,
    device: torch.device | str,
    seed: int,
    model: ModelConfig | None = None,
) -> DeviceBatch:
    """Copy a batch to the device, and normalise, erase and mix it there; the batch itself is not changed.

    Args:
        datasets: class count by name, in head order; all are datasets of `data`.
        model: the network, if its clips may be normalised by other values or have another order of channels.
    """
    clips = for_network(normalise(batch.clips.to(device, non_blocking=True)), model)
    targets = one_hot(batch.labels, batch.dataset, datasets)
    erase(clips, batch.boxes, batch.keys)
    multi_label = [name for name in datasets if data.datasets[name].multi_label]
    smooth(targets, batch.dataset, augment, multi_label)
    mix(clips, targets, batch.dataset, batch.start, augment, seed)
    return DeviceBatch(
        clips=clips,
        targets={name: rows.to(device, non_blocking=True) for name, rows in targets.items()},
        dataset=batch.dataset.to(device, non_blocking=True),
        keys=batch.keys.to(device, non_blocking=True),
    )


def normalise(clips: Tensor) -> Tensor:
    """(x / 255 − 0.45) / 0.225: uint8 [N, T, S, S, 3] to float32 [N, 3, T, S, S], contiguous."""
    out = clips.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return out.div_(255.0).sub_(MEAN).div_(STD)


def for_network(clips: Tensor, model: ModelConfig | None) -> Tensor:
    """Normalised clips float32 [N, 3, T, S, S] with the mean, standard deviation and order of channels of the network; may change them."""
    wanted = None if model is None else network_pixels(model)
    if wanted is None:
        return clips
    scale, shift = (torch.tensor(values, device=clips.device).view(3, 1, 1, 1) for values in wanted[:2])
    clips.mul_(scale).add_(shift)
    return clips.flip(1) if wanted[2] else clips


def erase(clips: Tensor, boxes: Tensor, keys: Tensor) -> None:
    """Fill each clip's box in place with N(0, 1) noise, drawn per frame, pixel and channel from the clip's key.

    Args:
        clips: float32 [N, 3, T, S, S], normalised.
        boxes: int32 [N, 4] (top, left, height, width; zeros for none).
        keys: int64 [N].
    """
    generator = torch.Generator(clips.device)
    for clip, box, key in zip(clips, boxes.tolist(), keys.tolist()):
        top, left, height, width = box
        if height and width:
            generator.manual_seed(key)
            shape = (*clip.shape[:2], height, width)
            noise = torch.randn(shape, generator=generator, device=clips.device, dtype=clips.dtype)
            clip[:, :, top : top + height, left : left + width] = noise


def one_hot(labels: Sequence[Sequence[int]], dataset: Tensor, datasets: dict[str, int]) -> dict[str, Tensor]:
    """One-hot (or multi-hot) labels, float32 [N, K], for each dataset; rows of other datasets' clips are zeros."""
    names = list(datasets)
    out = {name: torch.zeros(len(labels), classes) for name, classes in datasets.items()}
    for row, (classes, own) in enumerate(zip(labels, dataset.tolist())):
        out[names[own]][row, list(classes)] = 1.0
    return out


def smooth(
    targets: dict[str, Tensor], dataset: Tensor, augment: AugmentConfig, multi_label: Collection[str] = ()
) -> None:
    """Label smoothing (Szegedy et al., 2016), in place; multi-label datasets are not changed.

    With `mix_across_datasets`, the zero rows of other datasets' clips are smoothed too, as in the published code; the loss masks them.
    """
    for position, (name, rows) in enumerate(targets.items()):
        if name not in multi_label:
            off = augment.label_smoothing / (augment.smoothing_classes or rows.shape[1])
            rows.mul_(1.0 - augment.label_smoothing).add_(off)
            if not augment.mix_across_datasets:
                rows[dataset != position] = 0.0


def mix(
    clips: Tensor, targets: dict[str, Tensor], dataset: Tensor, start: int, augment: AugmentConfig, seed: int
) -> None:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) inside each mix group, in place.

    Args:
        clips: float32 [N, 3, T, S, S], in order of their sample numbers, which start at `start`; copies of a video are adjacent.
        targets: float32 [N, K] by dataset, on the CPU.
        dataset: int64 [N].
    """
    members = augment.mix_group * augment.copies
    for first in range(0, len(clips), members):
        group = slice(first, min(first + members, len(clips)))
        number = start + first // augment.copies
        mixing = draw_mixing(augment, clips.shape[-2], clips.shape[-1], KeyedRNG("mix", seed, number))
        if mixing.share < 1.0:
            partner = partners(dataset[group].tolist(), across=augment.mix_across_datasets)
            _mix_clips(clips[group], torch.tensor(partner, device=clips.device), mixing)
            for rows in targets.values():
                own = rows[group]
                own.copy_(own * mixing.share + own[partner] * (1.0 - mixing.share))


def partners(dataset: Sequence[int], across: bool) -> list[int]:
    """Each clip's partner in a mix group of n clips: clip n−1−i, counted over all clips or over those of its own dataset.

    A single clip, and the middle one of an odd number, is its own partner.
    """
    if across:
        return list(range(len(dataset)))[::-1]
    members: dict[int, list[int]] = {}
    for position, own in enumerate(dataset):
        members.setdefault(own, []).append(position)
    partner = {i: j for same in members.values() for i, j in zip(same, reversed(same))}
    return [partner[i] for i in range(len(dataset))]


def draw_mixing(augment: AugmentConfig, height: int, width: int, draws: KeyedRNG) -> Mixing:
    """Draw λ ~ Beta(α, α) and, for CutMix, the box: sides √(1−λ) of the clip's, uniform centre, clipped to the clip."""
    both = augment.mixup_alpha > 0 and augment.cutmix_alpha > 0
    if not draws.coin(augment.mix_probability) or not (augment.mixup_alpha > 0 or augment.cutmix_alpha > 0):
        return Mixing(1.0, None)
    cut = draws.coin(augment.cutmix_probability) if both else augment.cutmix_alpha > 0
    alpha = augment.cutmix_alpha if cut else augment.mixup_alpha
    share = draws.beta(alpha, alpha)
    if not cut:
        return Mixing(share, None)
    box = cutmix_box(height, width, share, draws.integer(0, height - 1), draws.integer(0, width - 1))
    return Mixing(1.0 - box.height * box.width / (height * width), box)


def cutmix_box(height: int, width: int, share: float, centre_y: int, centre_x: int) -> Box:
    """The box with sides √(1−λ) of the clip's around a centre, in whole pixels, clipped to height × width."""
    ratio = math.sqrt(1.0 - share)
    half_y, half_x = int(height * ratio) // 2, int(width * ratio) // 2
    top, left = max(centre_y - half_y, 0), max(centre_x - half_x, 0)
    return Box(top, left, min(centre_y + half_y, height) - top, min(centre_x + half_x, width) - left)


def _mix_clips(clips: Tensor, partner: Tensor, mixing: Mixing) -> None:
    if mixing.box is None:
        other = clips[partner].mul_(1.0 - mixing.share)
        clips.mul_(mixing.share).add_(other)
    else:
        top, left, height, width = mixing.box
        inside = clips[..., top : top + height, left : left + width]
        inside.copy_(inside[partner])
