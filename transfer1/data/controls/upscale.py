"""The video without its resolution. Shapes: T frames, H rows, W columns; uint8 [T, H, W, 3]."""

from __future__ import annotations

import numpy as np
import torch

from transfer1.data.augment import Box
from transfer1.data.controls.base import ComputedControl, grid_size
from transfer1.data.resize import resize


class Upscale(ComputedControl):
    """The video at a fraction of its resolution, enlarged again.

    In training, a sample shows a random part of the size of the 720 frame, which is shrunk by a
    random fraction. Otherwise it shows the middle of the video, cut to the fraction of the preset
    and enlarged to the 720 frame.
    """

    FRACTIONS = (1 / 6, 1 / 3, 1 / 2)
    PROBABILITIES = (0.3, 0.5, 0.2)
    PRESET_FRACTION = {"low": 1 / 2, "medium": 1 / 3}  # others: 1/6

    def reframe(self, size: tuple[int, int], rng: np.random.Generator | None) -> Box:
        """Return a random part of the size of the 720 frame, or the middle at the preset."""
        grid = grid_size(*size)
        if rng is None:
            fraction = self.PRESET_FRACTION.get(self.preset, 1 / 6)
            height, width = (
                min(int(fraction * n), have) for n, have in zip(grid, size, strict=True)
            )
            return Box((size[0] - height) // 2, (size[1] - width) // 2, height, width, size)
        height, width = (min(n, have) for n, have in zip(grid, size, strict=True))
        top, left = (
            int(rng.integers(have - n + 1)) for n, have in zip((height, width), size, strict=True)
        )
        return Box(top, left, height, width, size)

    def __call__(self, frames_THW3: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        clip = torch.from_numpy(frames_THW3).permute(3, 0, 1, 2)
        height, width = frames_THW3.shape[1:3]
        if rng is None:
            height, width = grid_size(height, width)
        else:
            fraction = self.draw_fraction(rng)
            clip = resize(clip, (max(1, int(height * fraction)), max(1, int(width * fraction))))
        return resize(clip, (height, width), "bilinear").permute(1, 2, 3, 0).numpy()

    @classmethod
    def draw_fraction(cls, rng: np.random.Generator) -> float:
        """Draw by how much the frames are shrunk."""
        return float(rng.choice(cls.FRACTIONS, p=cls.PROBABILITIES))
