"""Fitting a clip into the training frame: resize, then pad.

Shapes: C channels, T frames, H rows, W columns; clips are uint8 [C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

# aspect ratio "width,height" -> (height, width) in pixels
RESOLUTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "720": {
        "16,9": (704, 1280),
        "4,3": (704, 960),
        "1,1": (960, 960),
        "3,4": (960, 704),
        "9,16": (1280, 704),
    },
}

Resolution = str | Sequence[int]


def nearest_aspect_ratio(height: int, width: int) -> str:
    """Return the name in `RESOLUTIONS` whose ratio is nearest to width / height."""

    def distance(name: str) -> float:
        w, h = name.split(",")
        return (width / height - int(w) / int(h)) ** 2

    return min(RESOLUTIONS["720"], key=distance)


def check_resolution(resolution: Resolution) -> None:
    """Raise ValueError unless `resolution` is a name of `RESOLUTIONS` or a pair (height, width)."""
    if isinstance(resolution, str):
        valid = resolution in RESOLUTIONS
    else:
        valid = len(resolution) == 2 and all(isinstance(n, int) and n > 0 for n in resolution)
    if not valid:
        raise ValueError(
            f"resolution={resolution!r}: choose {' or '.join(map(repr, RESOLUTIONS))}, or give "
            f"[height, width] in pixels"
        )


def target_size(resolution: Resolution, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of the training frame for a clip of the given size.

    A named resolution has one frame size per aspect ratio; a pair (height, width) is the size
    itself.
    """
    if isinstance(resolution, str):
        return RESOLUTIONS[resolution][nearest_aspect_ratio(height, width)]
    return resolution[0], resolution[1]


def fit_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the largest (height, width) of the same shape as `size` that fits in `target`."""
    scale = min(target[0] / size[0], target[1] / size[1])
    return int(scale * size[0] + 0.5), int(scale * size[1] + 0.5)


def resize(clip_CTHW: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """Resize a uint8 clip to `size` = (height, width) with antialiasing, rounded.

    Args:
        mode: bicubic or bilinear.
    """
    if tuple(clip_CTHW.shape[-2:]) == tuple(size):
        return clip_CTHW
    channels, frames = clip_CTHW.shape[:2]
    out_TCHW = torch.empty((frames, channels, *size), dtype=torch.uint8)
    # Frame by frame: in floating point, a whole clip would leave the caches.
    for out_CHW, frame_CHW in zip(out_TCHW, clip_CTHW.unbind(1), strict=True):
        resized = F.interpolate(frame_CHW[None].float(), size=size, mode=mode, antialias=True)
        out_CHW.copy_(resized[0].round_().clamp_(0, 255))
    return out_TCHW.transpose(0, 1)


def pad(clip_CTHW: torch.Tensor, target: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre a clip in a frame of `target` = (height, width), mirroring its border outwards.

    Where the border is at least as wide as the clip, its outermost row or column is repeated
    instead.

    Returns:
        The padded clip [C, T, *target] and the padding mask float32 [1, *target] (1 = padding).
    """
    height, width = clip_CTHW.shape[-2:]
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    bottom, right = target[0] - height - top, target[1] - width - left
    mirrored = max(top, bottom) < height and max(left, right) < width
    around = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded = np.pad(clip_CTHW.numpy(), around, mode="reflect" if mirrored else "edge")
    mask = torch.ones(1, *target)
    mask[:, top : top + height, left : left + width] = 0
    return torch.from_numpy(padded), mask
