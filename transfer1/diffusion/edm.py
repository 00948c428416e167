"""The EDM diffusion process: noise levels, preconditioning and noising, all in float32.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.

Letters: B batch; x and noise are [B, C, T, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draws import Draws


class Coefficients(NamedTuple):
    """Preconditioning at given noise levels; each float32 [B]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor  # what the network is told about the noise level


@dataclass(frozen=True)
class EDMScaling:
    """x0 = c_skip x_t + c_out network(c_in x_t, c_noise), with unit-variance input and target."""

    sigma_data: float = 0.5

    def __call__(self, sigma_B: Tensor) -> Coefficients:
        """Coefficients in float32, whatever the precision of sigma."""
        sigma = sigma_B.float()
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / total.sqrt(),
            c_in=1 / total.sqrt(),
            c_noise=sigma.log() / 4,
        )

    def loss_weight(self, sigma_B: Tensor) -> Tensor:
        """Weight of the squared error of x0 that makes it the network's own squared error, [B]."""
        sigma = sigma_B.float()
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class NoiseDistribution:
    """Log-normal noise levels of training: ln(sigma) has mean p_mean and deviation p_std.

    sigma_max and sigma_min bound the levels of sampling; training draws are not cut off.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_max: float = 80.0
    sigma_min: float = 0.002

    def sigma(self, uniform_B: Tensor) -> Tensor:
        """Noise levels at quantiles `uniform_B` (float64, in [0, 1)), float32 [B]."""
        # The clamp keeps a draw of exactly 0 from becoming a noise level of 0.
        quantile = uniform_B.double().clamp(min=2.0**-53)
        return (self.p_mean + self.p_std * torch.special.ndtri(quantile)).exp().float()


def draw_noise(
    distribution: NoiseDistribution,
    shape: Sequence[int],
    draws: Draws,
    sigma_multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Noise level and noise of every sample of a batch, both float32 on the CPU.

    Args:
        shape: of the latent, [B, C, T, H, W].
        sigma_multiplier: the square root of the number of latent frames for clips under
            `adjust_video_noise`, since redundant frames average noise away.

    Returns:
        sigma [B] and noise of `shape`.
    """
    noise = draws.normal("noise", shape)
    sigma_B = distribution.sigma(draws.uniform("sigma", shape[0])) * sigma_multiplier
    return sigma_B, noise


def add_noise(x0: Tensor, sigma_B: Tensor, noise: Tensor) -> Tensor:
    """x_t = x0 + sigma noise, float32."""
    return x0.float() + per_sample(sigma_B, x0) * noise.float()


def per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    """Values [B] shaped to broadcast over tensors like `like` [B, ...]."""
    return values_B.reshape(-1, *[1] * (like.ndim - 1))


def seeded_normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 on the CPU that is the same on every machine and torch version."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape))).float()
