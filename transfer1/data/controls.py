"""Control inputs: what the network is told about the video it shall make.

A control modality is one class and one row in `CONTROLS`, whose name is the key of the batch. A
control is computed from the frames of the video, or read from a clip stored beside it (`folder`).

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from transfer1.data.resize import RESOLUTIONS, nearest_aspect_ratio

PRESETS = ("none", "very_low", "low", "medium", "high", "very_high")


class Control(ABC):
    """One control modality.

    Attributes:
        folder: folder of the dataset that holds one clip per video, as long as the video; None
            when the control is computed from the video.
    """

    folder: str | None = None

    def __init__(self, preset: str = "medium") -> None:
        if preset not in PRESETS:
            raise ValueError(f"control_strength={preset}: choose one of {', '.join(PRESETS)}")
        self.preset = preset

    @abstractmethod
    def __call__(
        self,
        frames_THW3: np.ndarray,
        stored_THW3: np.ndarray | None,
        rng: np.random.Generator | None,
    ) -> np.ndarray:
        """Return the control of a clip, uint8 [T, H', W', 3], or [T, H', W', 1] if it is grey.

        Args:
            frames_THW3: frames of the video, contiguous.
            stored_THW3: frames of the stored clip, None for a control without `folder`.
            rng: source of random strengths in training; None uses the preset.
        """


class Edge(Control):
    """Canny edges of the colour image, grey."""

    # preset -> lower and upper threshold of the gradient
    THRESHOLDS = {
        "none": (20, 50),
        "very_low": (20, 50),
        "low": (50, 100),
        "medium": (100, 200),
        "high": (200, 300),
        "very_high": (300, 400),
    }

    def __call__(
        self,
        frames_THW3: np.ndarray,
        stored_THW3: np.ndarray | None,
        rng: np.random.Generator | None,
    ) -> np.ndarray:
        import cv2  # slow to import, and whoever composes a configuration imports this module

        lower, upper = self.THRESHOLDS[self.preset] if rng is None else self.draw_thresholds(rng)
        edges = [cv2.Canny(frame, lower, upper) for frame in shrink_to_grid(frames_THW3)]
        return np.stack(edges)[..., None]

    @staticmethod
    def draw_thresholds(rng: np.random.Generator) -> tuple[int, int]:
        """Draw the lower threshold from 20..99 and the upper one 50..149 above it, at most 255."""
        lower = int(rng.integers(20, 100))
        return lower, min(255, lower + int(rng.integers(50, 150)))


class StoredClip(Control):
    """A clip made beforehand and stored in `folder`, passed through."""

    def __call__(
        self,
        frames_THW3: np.ndarray,
        stored_THW3: np.ndarray | None,
        rng: np.random.Generator | None,
    ) -> np.ndarray:
        assert stored_THW3 is not None, f"the clip of {self.folder}/ was not read"
        return stored_THW3


class Depth(StoredClip):
    """Depth as brightness."""

    folder = "depth"


# key in the batch -> its control
CONTROLS: dict[str, type[Control]] = {"control_input_edge": Edge, "control_input_depth": Depth}


def build_control(hint_key: str, preset: str = "medium") -> Control:
    """Return the control of a batch key.

    Raises:
        ValueError: unknown key or preset.
    """
    if hint_key not in CONTROLS:
        raise ValueError(f"hint_key={hint_key}: choose one of {', '.join(sorted(CONTROLS))}")
    return CONTROLS[hint_key](preset)


def shrink_to_grid(frames_THW3: np.ndarray) -> np.ndarray:
    """Shrink frames to the 720 frame size of their aspect ratio; smaller ones stay as they are."""
    height, width = frames_THW3.shape[1:3]
    target_height, target_width = RESOLUTIONS["720"][nearest_aspect_ratio(height, width)]
    scale = min(target_width / width, target_height / height)
    if scale >= 1:
        return frames_THW3
    import cv2  # see Edge

    size = int(width * scale + 0.5), int(height * scale + 0.5)
    return np.stack(
        [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames_THW3]
    )
