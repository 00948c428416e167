"""The video, blurred. Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from transfer1.data.controls.base import ComputedControl, shrink, shrink_to_grid
from transfer1.data.controls.blur import BLURS, Bilateral, Blur
from transfer1.data.resize import resize


@dataclass(frozen=True)
class Softening:
    """What takes the detail out of a clip: blurs at a smaller size, then down and up again.

    Attributes:
        blurs: applied one after the other.
        downscale: how many times smaller the frames are while they are blurred.
        factor: how many times smaller they are made afterwards, and enlarged again.
    """

    blurs: Sequence[Blur]
    downscale: int = 1
    factor: int = 1

    def __call__(self, frames_THW3: np.ndarray) -> np.ndarray:
        """Return the softened clip, of the same size."""
        height, width = frames_THW3.shape[1:3]
        softened = frames_THW3
        if self.downscale > 1:
            softened = shrink(softened, height // self.downscale, width // self.downscale)
        for blur in self.blurs:
            softened = blur(softened)
        if self.downscale > 1:
            softened = enlarge(softened, height, width)
        small = max(1, int(height / self.factor)), max(1, int(width / self.factor))
        clip = torch.from_numpy(softened).permute(3, 0, 1, 2)
        return resize(resize(clip, small), (height, width)).permute(1, 2, 3, 0).numpy()

    def fast(self) -> Softening:
        """Return an approximation that blurs at half the size, where a bilateral filter is slow.

        Its cost grows with the fourth power of the size: with the frames and with the filter, which
        shrink together. What is lost is mostly detail that `factor` takes away anyway. On frames of
        three 720p videos (`python -m bench.data --blurs`) the result was 7 to 20 times as fast and
        within a PSNR of 44 dB of the exact one at downscale 1, and of 37 dB at downscale 2. Frames
        that are smaller still are blurred exactly.
        """
        slow = any(isinstance(blur, Bilateral) for blur in self.blurs) and self.downscale <= 2
        if self.factor < 4 or not slow:
            return self
        blurs = [blur.shrunk(2) for blur in self.blurs]
        return replace(self, blurs=blurs, downscale=2 * self.downscale)


class Vis(ComputedControl):
    """The video without its detail.

    Args:
        preset: strength outside training.
        combinations: blurs to choose from in training, names of `BLURS` joined by +, and how
            probable each choice is.
        exact: blur as the original does; otherwise `Softening.fast` in training. Presets are
            always exact.

    Raises:
        ValueError: an unknown blur, or probabilities that do not add up to 1.
    """

    # preset -> bilateral filter, downscale, factor
    STRENGTHS = {
        "none": Softening([Bilateral(1, 1, 1)]),
        "very_low": Softening([Bilateral(15, 100, 50)], factor=4),
        "low": Softening([Bilateral(15, 100, 50)], downscale=4, factor=4),
        "medium": Softening([Bilateral(30, 150, 100)], downscale=2, factor=10),
        "high": Softening([Bilateral(50, 300, 150)], factor=16),
        "very_high": Softening([Bilateral(50, 300, 150)], downscale=4, factor=16),
    }
    DOWNSCALES = (1, 2, 3, 4)
    COMBINATIONS: Mapping[str, float] = {
        "bilateral": 0.5,
        "gaussian": 0.3,
        "bilateral+gaussian": 0.2,
    }

    def __init__(
        self,
        preset: str = "medium",
        combinations: Mapping[str, float] | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(preset)
        self.combinations = dict(combinations or self.COMBINATIONS)
        self.exact = exact
        for names in self.combinations:
            for name in names.split("+"):
                if name not in BLURS:
                    raise ValueError(
                        f"vis.combinations: {name!r} of {names!r} is no blur; choose "
                        f"{', '.join(BLURS)}, joined by +"
                    )
        total = sum(self.combinations.values())
        if abs(total - 1) > 1e-6 or min(self.combinations.values()) < 0:
            raise ValueError(
                f"vis.combinations={self.combinations}: the probabilities add up to {total:g}; "
                f"give numbers >= 0 that add up to 1"
            )

    def __call__(self, frames_THW3: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        if rng is None:
            softening = self.STRENGTHS[self.preset]
        else:
            softening = self.draw(rng)
            softening = softening if self.exact else softening.fast()
        return softening(shrink_to_grid(frames_THW3))

    def draw(self, rng: np.random.Generator) -> Softening:
        """Draw factor, combination of blurs, downscale, and the parameters of every blur."""
        factor = int(rng.integers(4, 18))
        names = list(self.combinations)
        chosen = names[int(rng.choice(len(names), p=list(self.combinations.values())))]
        downscale = int(rng.choice(self.DOWNSCALES))
        return Softening([BLURS[name].draw(rng) for name in chosen.split("+")], downscale, factor)


def enlarge(frames_THW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """Interpolate frames to a larger size (OpenCV's INTER_LINEAR)."""
    import cv2  # see shrink

    return np.stack(
        [cv2.resize(f, (width, height), interpolation=cv2.INTER_LINEAR) for f in frames_THW3]
    )
