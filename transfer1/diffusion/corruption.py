"""Damage to control videos in training, so that a model does not rely on flawless ones.

All draws are keyed per sample: what happens to a clip depends neither on its batch nor its rank.

Letters: B batch, C = 3K colours of K conditions, F frames, Y X pixel rows and columns. Pixels are
in [-1, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws
from .tokenizer import dct_matrix

BLOCK = 8  # rows and columns of a JPEG block

# Quantisation tables of luminance and chrominance at quality 50: ITU-T T.81, tables K.1 and K.2.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# R, G, B -> Y, Cb, Cr: ITU-T T.871, section 7.
YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


class PixelCorruptor(ABC):
    """Damages each clip with a probability, by an amount that is uniform between two bounds.

    Args:
        low, high: bounds of the amount; what it is, each kind says.
        probability: share of clips that are damaged.

    Raises:
        ValueError: bounds or a probability outside what the kind allows.
    """

    least: float  # allowed range of the amount
    most: float = math.inf

    def __init__(self, low: float, high: float, probability: float = 0.5) -> None:
        if not self.least <= low <= high <= self.most:
            raise ValueError(
                f"low={low}, high={high}: need {self.least} <= low <= high"
                + (f" <= {self.most}" if self.most < math.inf else "")
            )
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability}: not in [0, 1]")
        self.low, self.high = low, high
        self.probability = probability

    @torch.no_grad()
    def __call__(self, video_BCFYX: Tensor, draws: Draws) -> Tensor:
        """Return the videos, some of them damaged.

        Args:
            draws: purposes "pixel_corruptor.chosen", "pixel_corruptor.amount" and, for noise,
                "pixel_corruptor.noise".
        """
        batch = len(video_BCFYX)
        chosen_B = draws.uniform("pixel_corruptor.chosen", batch) < self.probability
        share_B = draws.uniform("pixel_corruptor.amount", batch)
        amount_B = self.low + (self.high - self.low) * share_B.float()
        damaged = self.damage(video_BCFYX, amount_B.to(video_BCFYX.device), draws)
        chosen = chosen_B.to(video_BCFYX.device).view(-1, 1, 1, 1, 1)
        return torch.where(chosen, damaged.clamp(-1, 1), video_BCFYX)

    @abstractmethod
    def damage(self, video_BCFYX: Tensor, amount_B: Tensor, draws: Draws) -> Tensor:
        """Return every video damaged by its amount, values beyond [-1, 1] included."""


class Blur(PixelCorruptor):
    """Gaussian blur; the amount is the standard deviation in pixels."""

    least = 0.1

    def damage(self, video_BCFYX: Tensor, amount_B: Tensor, draws: Draws) -> Tensor:
        """See the class."""
        pairs = zip(video_BCFYX, amount_B.tolist(), strict=True)
        return torch.stack([gaussian_blur(clip, sigma) for clip, sigma in pairs])


class Compression(PixelCorruptor):
    """Quantised 8 x 8 block DCTs as in JPEG with full chroma; the amount is the quality."""

    least, most = 1, 100

    def damage(self, video_BCFYX: Tensor, amount_B: Tensor, draws: Draws) -> Tensor:
        """See the class."""
        B, _, _, Y, X = video_BCFYX.shape
        device = video_BCFYX.device
        to_ycbcr = torch.tensor(YCBCR, device=device)
        rgb = video_BCFYX.float().unflatten(1, (-1, 3))  # [B, K, 3, F, Y, X]
        levels = torch.einsum("dc,bkcfyx->bkdfyx", to_ycbcr, rgb * 127.5)
        levels[:, :, 0] -= 0.5  # luminance 0..255 is coded as -128..127
        levels = F.pad(levels.flatten(0, 2), (0, -X % BLOCK, 0, -Y % BLOCK), mode="replicate")
        levels = levels.unflatten(0, (B, -1, 3))

        dct = dct_matrix(BLOCK).float().to(device)
        blocks = levels.unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
        coefficients = torch.einsum("uy,bkcfiyjx,vx->bkcfiujv", dct, blocks, dct)
        steps = quantisation_steps(amount_B)[:, None, :, None, None, :, None]
        coefficients = torch.round(coefficients / steps) * steps
        blocks = torch.einsum("uy,bkcfiujv,vx->bkcfiyjx", dct, coefficients, dct)

        levels = blocks.flatten(-2).flatten(-3, -2)[..., :Y, :X]
        levels[:, :, 0] += 0.5
        rgb = torch.einsum("cd,bkdfyx->bkcfyx", torch.linalg.inv(to_ycbcr), levels) / 127.5
        return rgb.flatten(1, 2).to(video_BCFYX.dtype)


class Noise(PixelCorruptor):
    """Gaussian noise, new in every pixel; the amount is its standard deviation."""

    least = 0.0

    def damage(self, video_BCFYX: Tensor, amount_B: Tensor, draws: Draws) -> Tensor:
        """See the class."""
        noise = draws.normal("pixel_corruptor.noise", video_BCFYX.shape).to(video_BCFYX)
        return video_BCFYX + amount_B.to(video_BCFYX).view(-1, 1, 1, 1, 1) * noise


class Downscale(PixelCorruptor):
    """Shrunk by averaging and stretched back bilinearly; the amount is the factor."""

    least = 1.0

    def damage(self, video_BCFYX: Tensor, amount_B: Tensor, draws: Draws) -> Tensor:
        """See the class."""
        size = video_BCFYX.shape[-2:]
        clips = []
        for clip_CFYX, factor in zip(video_BCFYX, amount_B.tolist(), strict=True):
            small = [max(1, round(length / factor)) for length in size]
            shrunk = F.interpolate(clip_CFYX, small, mode="area")
            clips.append(F.interpolate(shrunk, size, mode="bilinear", align_corners=False))
        return torch.stack(clips)


def gaussian_blur(clip_CFYX: Tensor, sigma: float) -> Tensor:
    """Blur rows and columns; the border is continued."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=clip_CFYX.device, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).to(clip_CFYX.dtype)
    padded = F.pad(clip_CFYX, (radius, radius, radius, radius), mode="replicate")
    images = padded.flatten(0, 1)[:, None]
    images = F.conv2d(F.conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return images[:, 0].unflatten(0, clip_CFYX.shape[:2])


def quantisation_steps(quality_B: Tensor) -> Tensor:
    """Steps of the coefficients of Y, Cb and Cr at a quality of 1 to 100, [B, 3, 8, 8].

    The tables are those of quality 50, scaled as the reference implementation of the Independent
    JPEG Group does: by 50 / quality below 50 and by 2 - quality / 50 above.
    """
    quality_B = quality_B.float()
    scale = torch.where(quality_B < 50, 50 / quality_B, 2 - quality_B / 50)
    table = torch.tensor((LUMINANCE, CHROMINANCE, CHROMINANCE), device=quality_B.device)
    return torch.floor(table * scale.view(-1, 1, 1, 1) + 0.5).clamp(1, 255)
