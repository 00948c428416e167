"""What a control modality is: computed from the frames of the video, or drawn from a stored file.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np

from transfer1.data.augment import Box
from transfer1.data.resize import RESOLUTIONS, nearest_aspect_ratio
from transfer1.data.video import Video

PRESETS = ("none", "very_low", "low", "medium", "high", "very_high")


class Control:
    """One control modality: a subclass of `ComputedControl` or `StoredControl`.

    Args:
        preset: strength where nothing is drawn at random, one of `PRESETS`.

    Raises:
        ValueError: unknown preset.
    """

    def __init__(self, preset: str = "medium") -> None:
        if preset not in PRESETS:
            raise ValueError(f"control_strength={preset}: choose one of {', '.join(PRESETS)}")
        self.preset = preset

    def reframe(self, size: tuple[int, int], rng: np.random.Generator | None) -> Box | None:
        """Return the part of a frame of `size` = (height, width) that a sample shows, None = all.

        Video and controls are cut to it. `rng` is None outside training.
        """
        return None


class ComputedControl(Control, ABC):
    """A control that is computed from the frames of the video."""

    @abstractmethod
    def __call__(self, frames_THW3: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Return the control of a clip, uint8 [T, H', W', 3], or [T, H', W', 1] if it is grey.

        Args:
            frames_THW3: frames of the video, contiguous.
            rng: source of random strengths in training; None uses the preset.
        """


class Drawn(NamedTuple):
    """Frames uint8 [T, H', W', 3] drawn from a stored file, and text to add to the sample."""

    frames: np.ndarray
    text: Mapping[str, str] = MappingProxyType({})


class Source(Protocol):
    """An open file with the control of one video."""

    path: Path
    num_frames: int

    def draw(
        self,
        window: Sequence[int],
        size: tuple[int, int],
        mirrored: bool,
        rng: np.random.Generator | None,
    ) -> Drawn:
        """Draw the frames of a window.

        Args:
            window: indices of frames, ascending.
            size: height and width of the video.
            mirrored: the frames will be flipped left to right afterwards.
            rng: source of random choices in training; None draws the same each time.
        """


OpenVideo = Callable[[Path], Video]


class StoredControl(Control):
    """A control that is stored beside the videos, one file per video and as long as it.

    Attributes:
        folder: folder of the dataset that holds the files.
        suffixes: of the files, the first that exists is read; `.mp4` is passed through.
        text_keys: what `Drawn.text` always holds.
    """

    folder: str
    suffixes: tuple[str, ...] = (".mp4",)
    text_keys: tuple[str, ...] = ()

    def open(self, path: Path, open_video: OpenVideo = Video) -> Source:
        """Open the file of one video and look it over.

        Raises:
            ValueError: missing or broken, names the file.
        """
        if path.suffix == ".mp4":
            return VideoSource(open_video(path), dict.fromkeys(self.text_keys, ""))
        return self.open_data(path)

    def open_data(self, path: Path) -> Source:
        """Open a file that is not a video."""
        raise NotImplementedError(f"{type(self).__name__} reads no {path.suffix} files")


class VideoSource:
    """A control that is stored as a video."""

    def __init__(self, video: Video, text: Mapping[str, str]) -> None:
        self.video, self.text = video, text
        self.path, self.num_frames = video.path, video.num_frames
        video.probe()

    def draw(
        self,
        window: Sequence[int],
        size: tuple[int, int],
        mirrored: bool,
        rng: np.random.Generator | None,
    ) -> Drawn:
        return Drawn(self.video.read(window), self.text)


class Depth(StoredControl):
    """Depth as brightness."""

    folder = "depth"


class HDMap(StoredControl):
    """Lanes, signs and boxes of traffic, projected into the camera."""

    folder = "hdmap"


class Lidar(StoredControl):
    """Lidar points, projected into the camera."""

    folder = "lidar"


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) of the 720 frame of the nearest aspect ratio."""
    return RESOLUTIONS["720"][nearest_aspect_ratio(height, width)]


def shrink_to_grid(frames_THW3: np.ndarray) -> np.ndarray:
    """Shrink frames to the 720 frame size of their aspect ratio; smaller ones stay as they are."""
    height, width = frames_THW3.shape[1:3]
    target_height, target_width = grid_size(height, width)
    scale = min(target_width / width, target_height / height)
    if scale >= 1:
        return frames_THW3
    return shrink(frames_THW3, int(height * scale + 0.5), int(width * scale + 0.5))


def shrink(frames_THW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Average frames down to a smaller size (OpenCV's INTER_AREA)."""
    import cv2  # slow to import, and whoever composes a configuration imports this package

    return np.stack(
        [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in frames_THW3]
    )
