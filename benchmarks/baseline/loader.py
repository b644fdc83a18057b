"""A training clip and test views as the published code makes them, step by step on whole frames.

Every frame of the window is decoded and converted at full size, by decord with threads of its own choosing; RandAugment is
Pillow's, frame by frame on whole frames; whole frames become float32 and are normalised; then the crop is resized with
`torch.nn.functional.interpolate`. For the test, every view decodes its video anew (Liang et al., NeurIPS 2022; PySlowFast).

What is random is drawn by `multitrain.data.augment.draw_augmentation`, so that both sides do the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multitrain.data.augment import Augmentation
from multitrain.data.frames import view_segments, window_length
from multitrain.data.randaugment import Operation
from multitrain.data.randaugment_pil import apply_one
from multitrain.data.spatial import MEAN, STD, Box

TARGET_FPS = 30.0


def window(path: Path, frames: int, rate: int, start: float | tuple[int, int]) -> Tensor:
    """The clip of a window: all its frames decoded, `frames` of them kept, uint8 [T, H, W, 3].

    start: in [0, 1), the place of a training window; (view, views) of a test.
    """
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=0)
    count = len(reader)
    length = window_length(reader.get_avg_fps(), frames, sampling_rate=rate, target_fps=TARGET_FPS)
    play = max(count - length, 0.0)
    if isinstance(start, tuple):
        view, views = start
        first = float(play // 2) if views == 1 else view * (play // (views - 1))
    else:
        first = start * play
    low = max(min(int(first), count - 2), 0)
    high = max(min(int(first + length - 1), count - 1), low)
    decoded = torch.from_numpy(reader.get_batch(np.arange(low, high + 1)).asnumpy())
    offset = max(len(decoded) - length, 0.0) // 2
    kept = torch.linspace(offset, offset + length - 1, frames).clamp(0, len(decoded) - 1).long()
    return decoded[kept]


def segments(path: Path, frames: int) -> Tensor:
    """The test clip by segments, as published for SSv2: only its frames are fetched, uint8 [T, H, W, 3]."""
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=0)
    return torch.from_numpy(reader.get_batch(view_segments(len(reader), frames)).asnumpy())


def normalised(clip: Tensor) -> Tensor:
    """float32 [3, T, H, W] of uint8 [T, H, W, 3]."""
    return ((clip.float() / 255.0 - MEAN) / STD).permute(3, 0, 1, 2)


def augmented(clip: Tensor, drawn: Augmentation, size: int) -> Tensor:
    """One augmented copy of a clip uint8 [T, H, W, 3]: float32 [3, T, size, size], normalised, erased."""
    frames = [Image.fromarray(frame.numpy()) for frame in clip]
    frames = [_changed(frame, drawn.operations) for frame in frames]
    whole = (torch.stack([_to_tensor(frame) for frame in frames]) - MEAN) / STD  # [T, 3, H, W]
    out = resized_crop(whole.permute(1, 0, 2, 3), drawn.crop, size)
    if drawn.flip:
        out = out.flip(-1)
    top, left, height, width = drawn.erase
    if height:
        out[:, :, top : top + height, left : left + width] = torch.randn(*out.shape[:2], height, width)
    return out


def _changed(frame: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    for op in operations:
        frame = apply_one(frame, op)
    return frame


def _to_tensor(frame: Image.Image) -> Tensor:
    """float32 [3, H, W], 0 … 1."""
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1).contiguous().float().div(255)


def resized_crop(clip: Tensor, crop: Box, size: int) -> Tensor:
    """The crop of float32 [3, T, H, W], resized bilinearly to [3, T, size, size]."""
    cut = clip[:, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    return torch.nn.functional.interpolate(cut, (size, size), mode="bilinear", align_corners=False)


def training_clips(
    path: Path, frames: int, rate: int, start: float, drawn: Sequence[Augmentation], size: int
) -> list[Tensor]:
    """The copies of a video, one for each of `drawn`: float32 [3, T, size, size]."""
    clip = window(path, frames, rate, start)
    return [augmented(clip, d, size) for d in drawn]


def short_side(clip: Tensor, side: int) -> Tensor:
    """Float32 [3, T, H, W] resized so that its shorter side is `side`."""
    height, width = clip.shape[-2:]
    if min(height, width) == side:
        return clip
    if width < height:
        size = int(np.floor(height / width * side)), side
    else:
        size = side, int(np.floor(width / height * side))
    return torch.nn.functional.interpolate(clip, size, mode="bilinear", align_corners=False)


def view(
    path: Path,
    frames: int,
    rate: int,
    size: int,
    place: tuple[int, int],
    crop: tuple[int, int],
    side: int | None = None,
    sampling: str = "stride",
) -> Tensor:
    """One test view, decoded for itself: float32 [3, T, size, size].

    place: (temporal view, number of them); crop: (position 0, 1 or 2, number of spatial views); side: the short side before
    the crop, as published for a crop of 224 when not given; sampling: "stride" or "segment".
    """
    position, crops = crop
    by_segments = sampling == "segment"
    side = side or (size if crops > 1 or by_segments else round(size * 256 / 224))
    clip = short_side(normalised(segments(path, frames) if by_segments else window(path, frames, rate, place)), side)
    height, width = clip.shape[-2:]
    top, left = int(np.ceil((height - size) / 2)), int(np.ceil((width - size) / 2))
    if crops > 1 and position != 1:
        if height > width:
            top = 0 if position == 0 else height - size
        else:
            left = 0 if position == 0 else width - size
    return clip[:, :, top : top + size, left : left + size].contiguous()


def views(
    path: Path,
    frames: int,
    rate: int,
    size: int,
    temporal: int,
    spatial: int,
    side: int | None = None,
    sampling: str = "stride",
) -> Tensor:
    """All test views of a video, one after another: float32 [V, 3, T, size, size]."""
    found = []
    for t in range(temporal):
        for s in range(spatial):
            crop = s if spatial > 1 else 1, spatial
            found.append(view(path, frames, rate, size, (t, temporal), crop, side, sampling))
    return torch.stack(found)
