"""Random changes of a training clip, the same for its video and its stored control.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """What may be changed at random; the defaults change nothing but the start of the window.

    Attributes:
        flip_probability: mirror left and right.
        min_crop: least share of height and width that a crop keeps, 1 = never cropped. The share
            is uniform in [min_crop, 1], the same for both sides, the place uniform.
        frame_strides: playback speeds to choose from; stride s takes every s-th frame, and the
            frame rate of the sample is divided by s. Strides that a clip is too short for are left
            out.
        random_start: draw the first frame; otherwise it is frame 0.

    Raises:
        ValueError: a value outside its range.
    """

    flip_probability: float = 0.0
    min_crop: float = 1.0
    frame_strides: Sequence[int] = (1,)
    random_start: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"augmentation.flip_probability={self.flip_probability}: give 0 to 1")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"augmentation.min_crop={self.min_crop}: give more than 0, at most 1")
        if not self.frame_strides or min(self.frame_strides) < 1:
            raise ValueError(
                f"augmentation.frame_strides={list(self.frame_strides)}: give one or more "
                f"integers >= 1"
            )

    def least_frames(self, num_frames: int) -> int:
        """Frames that a clip must have to give a window of `num_frames`."""
        return (num_frames - 1) * min(self.frame_strides) + 1

    def window(self, clip_frames: int, num_frames: int, rng: np.random.Generator) -> range:
        """Draw the frames to take from a clip of `clip_frames` (at least `least_frames`)."""
        spans = {stride: (num_frames - 1) * stride + 1 for stride in self.frame_strides}
        strides = [stride for stride in self.frame_strides if spans[stride] <= clip_frames]
        stride = strides[int(rng.integers(len(strides)))]
        start = int(rng.integers(clip_frames - spans[stride] + 1)) if self.random_start else 0
        return range(start, start + spans[stride], stride)

    def view(self, rng: np.random.Generator) -> View:
        """Draw the crop and the flip."""
        size, top, left, flip = rng.random(4)
        share = self.min_crop + (1 - self.min_crop) * size
        return View(share, top, left, flip < self.flip_probability)


@dataclass(frozen=True)
class View:
    """A crop and a flip, relative to the frame size.

    Attributes:
        share: height and width of the crop, as a share of the frame's.
        top, left: place of the crop, as a share of the room it leaves.
        flip: mirror left and right after cropping.
    """

    share: float
    top: float
    left: float
    flip: bool

    def __call__(self, frames_THW3: np.ndarray) -> np.ndarray:
        """Return the view of the frames, contiguous."""
        height, width = (max(1, round(n * self.share)) for n in frames_THW3.shape[1:3])
        top = round(self.top * (frames_THW3.shape[1] - height))
        left = round(self.left * (frames_THW3.shape[2] - width))
        cropped = frames_THW3[:, top : top + height, left : left + width]
        return np.ascontiguousarray(cropped[:, :, ::-1] if self.flip else cropped)


@dataclass(frozen=True)
class Box:
    """A part of a frame.

    Attributes:
        top, left, height, width: the part, in pixels.
        frame: height and width of the frame it was chosen in.
    """

    top: int
    left: int
    height: int
    width: int
    frame: tuple[int, int]

    def __call__(self, frames_THW3: np.ndarray) -> np.ndarray:
        """Return the part, contiguous; frames of another size are cut at the same places."""
        rows, columns = (
            slice(round(first * scale), max(round((first + length) * scale), 1))
            for first, length, scale in (
                (self.top, self.height, frames_THW3.shape[1] / self.frame[0]),
                (self.left, self.width, frames_THW3.shape[2] / self.frame[1]),
            )
        )
        return np.ascontiguousarray(frames_THW3[:, rows, columns])
