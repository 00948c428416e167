"""Skeletons of people on black.

Shapes: T frames, H rows, W columns, P points; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transfer1.data.controls.base import Drawn, Source, StoredControl
from transfer1.data.controls.skeleton import (
    COCO_WHOLEBODY,
    NUM_BODY_POINTS,
    NUM_HAND_POINTS,
    OPENPOSE,
    mirror,
    to_openpose,
)
from transfer1.data.pickles import load_pickle

RADIUS = 2
PARTS = {"body-keypoints": NUM_BODY_POINTS, "hand-keypoints": NUM_HAND_POINTS}
EXPECTED = (
    "expected {frame: [{'body-keypoints': array [91, 3], 'hand-keypoints': array [42, 3]}, ...]} "
    "for every frame from 0 on, x and y as shares of width and height, then a score"
)


class Keypoint(StoredControl):
    """133 points of every person (COCO-WholeBody) drawn as circles and lines, or a drawn video.

    Args:
        preset: without effect.
        use_openpose_format: draw the 134 points, links and colours of OpenPose.
        kpt_thr: least score of a point that is drawn, and of both ends of a line.
        human_kpt_line_width: width of the lines, in pixels.
    """

    folder = "keypoint"
    suffixes = (".pickle", ".pkl", ".mp4")

    def __init__(
        self,
        preset: str = "medium",
        use_openpose_format: bool = True,
        kpt_thr: float = 0.6,
        human_kpt_line_width: int = 4,
    ) -> None:
        super().__init__(preset)
        self.use_openpose_format = use_openpose_format
        self.kpt_thr = kpt_thr
        self.human_kpt_line_width = human_kpt_line_width

    def open_data(self, path: Path) -> Source:
        return KeypointFile(path, self)

    def draw_person(self, frame_HW3: np.ndarray, points_P3: np.ndarray) -> None:
        """Draw one person (133 rows of x, y in pixels and score) into a frame."""
        import cv2  # slow to import, and whoever composes a configuration imports this package

        skeleton = OPENPOSE if self.use_openpose_format else COCO_WHOLEBODY
        points = to_openpose(points_P3) if self.use_openpose_format else points_P3
        places = [(int(x), int(y)) for x, y in points[:, :2]]
        visible = points[:, 2] >= self.kpt_thr
        for place, color, shown in zip(places, skeleton.point_colors, visible, strict=True):
            if shown:
                cv2.circle(frame_HW3, place, RADIUS, color, -1)
        for (a, b), color in zip(skeleton.links, skeleton.link_colors, strict=True):
            if visible[a] and visible[b]:
                width = self.human_kpt_line_width
                cv2.line(frame_HW3, places[a], places[b], color, thickness=width)


class KeypointFile:
    """The people of one video, a pickle (`EXPECTED`), read each time anew to save memory.

    Raises:
        ValueError: the file holds anything else. Names the file and the frame.
    """

    def __init__(self, path: Path, control: Keypoint) -> None:
        self.path, self.control = path, control
        self.num_frames = len(self._read())

    def draw(
        self,
        window: Sequence[int],
        size: tuple[int, int],
        mirrored: bool,
        rng: np.random.Generator | None,
    ) -> Drawn:
        height, width = size
        frames = np.zeros((len(window), height, width, 3), np.uint8)
        people = self._read()
        for frame, i in zip(frames, window, strict=True):
            for person_P3 in people[i]:
                points_P3 = mirror(person_P3) if mirrored else person_P3
                self.control.draw_person(frame, points_P3 * [width, height, 1])
        return Drawn(frames)

    def _read(self) -> list[list[np.ndarray]]:
        """Return the people of every frame, each float64 [133, 3]."""
        content = load_pickle(self.path)
        if not isinstance(content, dict) or not content:
            held = f"an empty {type(content).__name__}" if not content else type(content).__name__
            raise ValueError(f"{self.path}: holds {held}; {EXPECTED}")
        missing = [i for i in range(len(content)) if i not in content]
        if missing:
            raise ValueError(f"{self.path}: has no frame {missing[0]}; {EXPECTED}")
        return [self._read_frame(i, content[i]) for i in range(len(content))]

    def _read_frame(self, index: int, people: Any) -> list[np.ndarray]:
        try:
            parts = [[np.asarray(person[name], float) for name in PARTS] for person in people]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: frame {index}: {type(error).__name__} {error}; {EXPECTED}"
            ) from error
        shapes = [(count, 3) for count in PARTS.values()]
        for person in parts:
            if [part.shape for part in person] != shapes:
                raise ValueError(
                    f"{self.path}: frame {index}: {' and '.join(PARTS)} have the shapes "
                    f"{[list(part.shape) for part in person]}; {EXPECTED}"
                )
        return [np.concatenate(person) for person in parts]
