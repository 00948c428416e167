"""Edges. Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3]."""

from __future__ import annotations

import numpy as np

from transfer1.data.controls.base import ComputedControl, shrink_to_grid


class Edge(ComputedControl):
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

    def __call__(self, frames_THW3: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        import cv2  # see shrink

        lower, upper = self.THRESHOLDS[self.preset] if rng is None else self.draw_thresholds(rng)
        edges = [cv2.Canny(frame, lower, upper) for frame in shrink_to_grid(frames_THW3)]
        return np.stack(edges)[..., None]

    @staticmethod
    def draw_thresholds(rng: np.random.Generator) -> tuple[int, int]:
        """Draw the lower threshold from 20..99 and the upper one 50..149 above it, at most 255."""
        lower = int(rng.integers(20, 100))
        return lower, min(255, lower + int(rng.integers(50, 150)))
