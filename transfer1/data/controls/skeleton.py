"""The 133 points of COCO-WholeBody and the 134 of OpenPose, their links and colours.

A person is 17 points of the body, 6 of the feet, 68 of the face and 21 of each hand. OpenPose adds
the neck and has its own order of the body. Colours are RGB, those of the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Color = tuple[int, int, int]

GREEN, ORANGE, BLUE = (0, 255, 0), (255, 128, 0), (51, 153, 255)
PINK, SKY, RED, WHITE = (255, 153, 255), (102, 178, 255), (255, 51, 51), (255, 255, 255)

BODY = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder"),
    *("right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip"),
    *("right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
OPENPOSE_BODY = (
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder"),
    *("left_elbow", "left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip"),
    *("left_knee", "left_ankle", "right_eye", "left_eye", "right_ear", "left_ear"),
)
FEET = tuple(f"{s}_{part}" for s in ("left", "right") for part in ("big_toe", "small_toe", "heel"))
FACE = tuple(f"face-{i}" for i in range(68))
FINGERS = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
HANDS = tuple(
    f"{side}_{part}"
    for side in ("left", "right")
    for part in ("hand_root", *(f"{finger}{i}" for finger in FINGERS for i in range(1, 5)))
)
NUM_BODY_POINTS, NUM_HAND_POINTS = len(BODY) + len(FEET) + len(FACE), len(HANDS)


@dataclass(frozen=True)
class Skeleton:
    """Points in the order in which they are drawn, and the links drawn over them."""

    names: tuple[str, ...]
    point_colors: tuple[Color, ...]
    links: tuple[tuple[int, int], ...]
    link_colors: tuple[Color, ...]


def finger_links(root: int) -> list[tuple[int, int]]:
    """Links of a hand whose root is point `root`: five fingers of four links."""
    return [
        (root + 4 * finger + i if i else root, root + 4 * finger + i + 1)
        for finger in range(5)
        for i in range(4)
    ]


def _coco() -> Skeleton:
    sides = [GREEN if name.startswith("left") else ORANGE for name in BODY[5:]]
    fingers = [color for color in (ORANGE, PINK, SKY, RED, GREEN) for _ in range(4)]
    names = (*BODY, *FEET, *FACE, *HANDS)
    body = [
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7)),
        *((6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
    ]
    feet = [(15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22)]
    legs = (GREEN, GREEN, ORANGE, ORANGE, *[BLUE] * 4, GREEN, ORANGE, GREEN, ORANGE, *[BLUE] * 7)
    left, right = names.index("left_hand_root"), names.index("right_hand_root")
    return Skeleton(
        names,
        (*[BLUE] * 5, *sides, *[ORANGE] * 6, *[WHITE] * 68, *[WHITE, *fingers] * 2),
        (*body, *feet, *finger_links(left), *finger_links(right)),
        (*legs, *[GREEN] * 3, *[ORANGE] * 3, *fingers, *fingers),
    )


def _openpose() -> Skeleton:
    names = (*OPENPOSE_BODY, *FEET, *FACE, *HANDS)
    body_points: tuple[Color, ...] = (
        *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
        *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
        *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
    )
    body = [
        *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11)),
        *((11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
    ]
    body_links: tuple[Color, ...] = (
        *body_points[:9],
        (0, 255, 225),  # so in the original; the wheel of hues has (0, 255, 255) here
        *body_points[10:13],
        (255, 0, 170),
        *body_points[14:17],
    )
    hue_wheel: tuple[Color, ...] = (
        *((255, 0, 0), (255, 76, 0), (255, 153, 0), (255, 230, 0), (204, 255, 0), (128, 255, 0)),
        *((51, 255, 0), (0, 255, 26), (0, 255, 102), (0, 255, 178), (0, 255, 255), (0, 178, 255)),
        *((0, 102, 255), (0, 26, 255), (51, 0, 255), (128, 0, 255), (204, 0, 255), (255, 0, 230)),
        *((255, 0, 153), (255, 0, 76)),
    )
    # The right hand's eleventh link is white in the original.
    right_hand = (*hue_wheel[:10], WHITE, *hue_wheel[11:])
    left, right = names.index("left_hand_root"), names.index("right_hand_root")
    return Skeleton(
        names,
        (*body_points, *[(0, 0, 0)] * 6, *[WHITE] * 68, *[(0, 0, 255)] * 42),
        (*body, *finger_links(left), *finger_links(right)),
        (*body_links, *hue_wheel, *right_hand),
    )


COCO_WHOLEBODY = _coco()
OPENPOSE = _openpose()


def to_openpose(points_P3: np.ndarray) -> np.ndarray:
    """Return the 134 OpenPose points of 133 COCO-WholeBody points (x, y, score).

    The neck is the mean of the shoulders, with the lower of their scores.
    """
    names = [*COCO_WHOLEBODY.names, "neck"]
    shoulders = points_P3[[names.index("left_shoulder"), names.index("right_shoulder")]]
    neck = shoulders.mean(axis=0)
    neck[2] = shoulders[:, 2].min()
    order = [names.index(name) for name in OPENPOSE.names]
    return np.concatenate([points_P3, neck[None]])[order]


def mirror(points_P3: np.ndarray) -> np.ndarray:
    """Exchange left and right of a COCO-WholeBody person, as its mirror image shows them.

    Points of the face have no side in their names; they all are drawn alike.
    """
    names = COCO_WHOLEBODY.names
    other = {"left": "right", "right": "left"}
    exchanged = [
        f"{other[side]}_{part}" if (side := name.partition("_")[0]) in other else name
        for name, part in ((name, name.partition("_")[2]) for name in names)
    ]
    return points_P3[[names.index(name) for name in exchanged]]
