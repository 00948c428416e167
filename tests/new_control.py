"""A control modality of one's own, in one file: `train.py --config=tests/new_control.py -- ...`."""

from __future__ import annotations

import numpy as np

from configs import config_train, control
from transfer1.config import Config
from transfer1.data.controls import CONTROLS, ComputedControl


class Negative(ComputedControl):
    """The video with its brightness upside down, weaker at random in training."""

    def __call__(self, frames_THW3: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        strength = 1.0 if rng is None else rng.uniform(0.5, 1.0)
        return (strength * (255 - frames_THW3)).astype(np.uint8)


def make_config() -> Config:
    """The groups of the package, with those of the new control."""
    CONTROLS["negative"] = Negative
    control.CONTROLS.append(control.Control("negative", dataset_dir="datasets/negative"))
    return config_train.make_config()
