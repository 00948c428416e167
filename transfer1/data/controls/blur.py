"""Blurs that the vis control is made of; ranges and defaults are those of the original.

Shapes: T frames, H rows, W columns; frames are uint8 RGB, [T, H, W, 3].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np


class Blur(ABC):
    """One blur with its parameters, applied frame by frame."""

    @classmethod
    @abstractmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        """Draw the parameters, as training does."""

    @abstractmethod
    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        """Blur one frame."""

    def __call__(self, frames_THW3: np.ndarray) -> np.ndarray:
        """Blur a clip."""
        return np.stack([self.frame(frame) for frame in frames_THW3])

    def shrunk(self, factor: int) -> Self:
        """Return the blur that does to frames `factor` times smaller what this one does."""
        return self


def odd(size: int) -> int:
    """The size of a kernel with a centre."""
    return size + 1 - size % 2


@dataclass(frozen=True)
class Gaussian(Blur):
    """Gaussian of standard deviation `sigma` pixels, cut to `ksize` pixels."""

    ksize: int = 25
    sigma: float = 12.5

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        return cls(int(rng.integers(21, 30)), float(rng.uniform(10.5, 14.5)))

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # slow to import, and whoever composes a configuration imports this package

        size = odd(self.ksize)
        return cv2.GaussianBlur(frame_HW3, (size, size), sigmaX=self.sigma)

    def shrunk(self, factor: int) -> Self:
        return type(self)(2 * round(self.ksize // 2 / factor) + 1, self.sigma / factor)


@dataclass(frozen=True)
class Bilateral(Blur):
    """Mean of near pixels of like colour (Tomasi and Manduchi 1998).

    Attributes:
        d: diameter of the neighbourhood in pixels.
        sigma_color, sigma_space: standard deviations of the weight in colour and in pixels.
        iterations: how often it is applied.
    """

    d: int = 30
    sigma_color: float = 150
    sigma_space: float = 100
    iterations: int = 1

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        ranges = ((15, 50), (100, 300), (50, 150), (1, 4))
        return cls(*(int(rng.integers(low, high)) for low, high in ranges))

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # see Gaussian

        for _ in range(self.iterations):
            frame_HW3 = cv2.bilateralFilter(frame_HW3, self.d, self.sigma_color, self.sigma_space)
        return frame_HW3

    def shrunk(self, factor: int) -> Self:
        diameter = 2 * max(1, round(self.d // 2 / factor)) + 1
        return type(self)(diameter, self.sigma_color, self.sigma_space / factor, self.iterations)


@dataclass(frozen=True)
class Median(Blur):
    """Median of the square of `ksize` pixels around each pixel."""

    ksize: int = 11

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        return cls(int(rng.integers(9, 16)))

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # see Gaussian

        return cv2.medianBlur(frame_HW3, odd(self.ksize))


@dataclass(frozen=True)
class Guided(Blur):
    """Fast guided filter with the frame as its own guide (He and Sun 2015, arXiv:1505.00996).

    In every window the colours of the output are a linear function of those of the guide, found by
    ridge regression at a `scale` times smaller size.

    Attributes:
        radius: of the windows, in pixels; truncated to whole pixels of the smaller size.
        eps: strength of the ridge, for colours in [0, 1].
        scale: how many times smaller.
    """

    radius: int = 45
    eps: float = 0.15
    scale: int = 10

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        radius, eps = int(rng.integers(41, 50)), float(rng.uniform(0.1, 0.2))
        return cls(radius, eps, int(rng.integers(3, 19)))

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # see Gaussian

        height, width = frame_HW3.shape[:2]
        small_size = max(1, width // self.scale), max(1, height // self.scale)
        window = 2 * int(self.radius / self.scale) + 1

        def mean(image: np.ndarray) -> np.ndarray:
            flat = image.reshape(*image.shape[:2], -1)
            return cv2.blur(flat, (window, window)).reshape(image.shape)

        def enlarge(image: np.ndarray) -> np.ndarray:
            flat = image.reshape(*image.shape[:2], -1)
            return cv2.resize(flat, (width, height)).reshape(height, width, *image.shape[2:])

        guide = frame_HW3.astype(np.float32) / 255
        small = cv2.resize(guide, small_size, interpolation=cv2.INTER_NEAREST)
        centre = mean(small)
        covariance = mean(small[..., :, None] * small[..., None, :])
        covariance -= centre[..., :, None] * centre[..., None, :]
        ridge = covariance + np.float32(self.eps) * np.eye(3, dtype=np.float32)
        slope = np.linalg.solve(ridge, covariance)
        offset = centre - np.einsum("yxkc,yxk->yxc", slope, centre)
        out = np.einsum("yxkc,yxk->yxc", enlarge(mean(slope)), guide) + enlarge(mean(offset))
        return np.clip(out * 255, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class LaplacianOfGaussian(Blur):
    """Laplacian of the blurred brightness, stretched to 0..255 in every frame.

    Attributes:
        ksize, sigma: of the Gaussian, in pixels.
        threshold: 255 above it and 0 elsewhere; None keeps the values.
    """

    ksize: int = 5
    sigma: float = 1.4
    threshold: float | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        ksize, sigma = int(rng.integers(3, 8)), float(rng.uniform(0.5, 3.0))
        return cls(ksize, sigma, float(rng.uniform(10, 30)) if rng.integers(2) else None)

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # see Gaussian

        size = odd(self.ksize)
        brightness = cv2.cvtColor(frame_HW3, cv2.COLOR_RGB2GRAY)
        blurred = cv2.GaussianBlur(brightness, (size, size), self.sigma)
        laplacian = cv2.Laplacian(blurred, cv2.CV_64F)
        edges = np.empty_like(brightness)
        cv2.normalize(laplacian, edges, 0, 255, cv2.NORM_MINMAX, dtype=cv2.CV_8U)
        if self.threshold is not None:
            edges = np.where(edges > self.threshold, np.uint8(255), np.uint8(0))
        return np.repeat(edges[..., None], 3, axis=-1)


@dataclass(frozen=True)
class Anisotropic(Blur):
    """Anisotropic diffusion (Perona and Malik 1990); needs OpenCV's contributed modules.

    Attributes:
        alpha: length of a step, 0 to 1.
        K: sensitivity to edges.
        niters: steps.
    """

    alpha: float = 0.25
    K: float = 0.15
    niters: int = 12

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Self:
        alpha, sensitivity = float(rng.uniform(0.2, 0.3)), float(rng.uniform(0.1, 0.2))
        return cls(alpha, sensitivity, int(rng.integers(10, 15)))

    def frame(self, frame_HW3: np.ndarray) -> np.ndarray:
        import cv2  # see Gaussian

        if not hasattr(cv2, "ximgproc"):
            raise ValueError(
                "blur=anisotropic needs OpenCV's contributed modules: install "
                "opencv-contrib-python-headless in the place of opencv-python-headless, or choose "
                "another blur in control_options.vis.combinations"
            )
        return cv2.ximgproc.anisotropicDiffusion(frame_HW3, self.alpha, self.K, self.niters)


# name -> blur, as `Vis.combinations` spells it
BLURS: dict[str, type[Blur]] = {
    "bilateral": Bilateral,
    "gaussian": Gaussian,
    "guided": Guided,
    "median": Median,
    "log": LaplacianOfGaussian,
    "anisotropic": Anisotropic,
}
