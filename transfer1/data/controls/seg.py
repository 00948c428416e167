"""Segmentation: every object in a colour of its own.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from transfer1.data.controls.base import Drawn, Source, StoredControl
from transfer1.data.controls.rle import decode, run_lengths
from transfer1.data.pickles import load_pickle

# 23 colours that are easy to tell apart, those of the original
PALETTE = np.array(
    [
        *([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]),
        *([255, 140, 0], [255, 105, 180], [0, 0, 139], [0, 128, 128], [75, 0, 130]),
        *([128, 0, 128], [255, 69, 0], [34, 139, 34], [128, 128, 0], [70, 130, 180]),
        *([255, 215, 0], [255, 222, 173], [144, 238, 144], [255, 99, 71], [221, 160, 221]),
        *([0, 255, 127], [255, 255, 255]),
    ],
    np.uint8,
)

PHRASES = "segmentation_phrase_all"
EXPECTED = (
    "expected a list of {'phrase': str, 'segmentation_mask_rle': {'data': {'counts': str or bytes, "
    "'size': [T * H * W, 1]}, 'mask_shape': [T, H, W]}}"
)


class Seg(StoredControl):
    """Masks of objects painted from the largest to the smallest on black, or a painted video.

    In training a random number of masks is painted, none to all. Otherwise all of them are, in the
    colours of `PALETTE`.

    Args:
        preset: without effect.
        use_fixed_color_list: colours of `PALETTE` in random order; otherwise random colours.
        num_masks_max: most masks to paint.
        random_sample_num_masks: draw how many masks are painted in training; otherwise all are.
    """

    folder = "seg"
    suffixes = (".pickle", ".pkl", ".mp4")
    text_keys = (PHRASES,)

    def __init__(
        self,
        preset: str = "medium",
        use_fixed_color_list: bool = False,
        num_masks_max: int = 100,
        random_sample_num_masks: bool = True,
    ) -> None:
        super().__init__(preset)
        if num_masks_max < 1:
            raise ValueError(f"seg.num_masks_max={num_masks_max}: give 1 or more")
        self.use_fixed_color_list = use_fixed_color_list
        self.num_masks_max = num_masks_max
        self.random_sample_num_masks = random_sample_num_masks

    def open_data(self, path: Path) -> Source:
        return MaskFile(path, self)

    def choose(self, count: int, rng: np.random.Generator | None) -> list[int]:
        """Choose which of `count` masks are painted, and in which order of equals."""
        if rng is None:
            return list(range(count))
        chosen = count
        if self.random_sample_num_masks:
            chosen = int(rng.integers(0, min(self.num_masks_max, count) + 1))
        return [int(i) for i in rng.choice(count, chosen, replace=False)] if count else []

    def colors(self, count: int, rng: np.random.Generator | None) -> np.ndarray:
        """Return a colour for each of `count` masks, uint8 [count, 3]."""
        if rng is None or self.use_fixed_color_list:
            order = np.arange(len(PALETTE)) if rng is None else rng.permutation(len(PALETTE))
            return PALETTE[order][np.arange(count) % len(PALETTE)]
        ranges = ((0, 1), (0.1, 1), (0.2, 1))  # hue, saturation, value
        hsv = [[float(rng.uniform(*limits)) for limits in ranges] for _ in range(count)]
        rgb = [colorsys.hsv_to_rgb(*color) for color in hsv]
        return (np.array(rgb).reshape(count, 3) * 255).astype(np.uint8)

    def paint(self, masks: Sequence[np.ndarray], rng: np.random.Generator | None) -> np.ndarray:
        """Paint masks, each bool [T, H, W] and at least one, from the largest to the smallest."""
        ordered = sorted(masks, key=np.count_nonzero, reverse=True)
        painted = np.zeros((*ordered[0].shape, 3), np.uint8)
        for mask, color in zip(ordered, self.colors(len(ordered), rng), strict=True):
            painted[mask] = color
        return painted


@attrs.frozen
class Mask:
    """One object: what it is, its size over the clip, and its coded pixels."""

    phrase: str
    shape: tuple[int, int, int]
    runs: np.ndarray = attrs.field(eq=False)

    def read(self, window: Sequence[int]) -> np.ndarray:
        """Return the mask in the frames of a window, bool [T, H, W]."""
        _, height, width = self.shape
        first, pixels = window[0], height * width
        frames = decode(self.runs, first * pixels, (window[-1] + 1) * pixels)
        return frames.reshape(-1, height, width)[[i - first for i in window]]


class MaskFile:
    """The masks of one video, a pickle (`EXPECTED`), read each time anew to save memory.

    Raises:
        ValueError: the file holds anything else. Names the file and the mask.
    """

    def __init__(self, path: Path, control: Seg) -> None:
        self.path, self.control = path, control
        self.num_frames = self._read()[0].shape[0]

    def draw(
        self,
        window: Sequence[int],
        size: tuple[int, int],
        mirrored: bool,
        rng: np.random.Generator | None,
    ) -> Drawn:
        stored = self._read()
        masks = [stored[i] for i in self.control.choose(len(stored), rng)]
        text = {PHRASES: ";".join(mask.phrase for mask in masks)}
        if not masks:
            return Drawn(np.zeros((len(window), *stored[0].shape[1:], 3), np.uint8), text)
        return Drawn(self.control.paint([mask.read(window) for mask in masks], rng), text)

    def _read(self) -> list[Mask]:
        content = load_pickle(self.path)
        if not isinstance(content, list) or not content:
            held = f"an empty {type(content).__name__}" if not content else type(content).__name__
            raise ValueError(f"{self.path}: holds {held}; {EXPECTED}")
        masks = [self._read_mask(i, entry) for i, entry in enumerate(content)]
        shapes = {mask.shape for mask in masks}
        if len(shapes) > 1:
            raise ValueError(
                f"{self.path}: masks of different shapes {sorted(shapes)}; make them again"
            )
        return masks

    def _read_mask(self, index: int, entry: Any) -> Mask:
        try:
            coded = entry["segmentation_mask_rle"]
            frames, height, width = (int(n) for n in coded["mask_shape"])
            counts, size = coded["data"]["counts"], [int(n) for n in coded["data"]["size"]]
            phrase = str(entry["phrase"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{self.path}: mask {index}: {type(error).__name__} {error}; {EXPECTED}"
            ) from error
        column = [frames * height * width, 1]
        if size != column:
            raise ValueError(
                f"{self.path}: mask {index} has size {size} for the shape "
                f"{[frames, height, width]}; expected {column}: make it again"
            )
        try:
            runs = run_lengths(counts)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.path}: mask {index}: {error}; make it again") from error
        if runs.sum() != size[0]:
            raise ValueError(
                f"{self.path}: mask {index} codes {runs.sum()} pixels, but its size is {size[0]}; "
                f"make it again"
            )
        return Mask(phrase, (frames, height, width), runs)
