"""Noise levels, preconditioning and noising."""

from __future__ import annotations

import math

import pytest
import torch

from transfer1.diffusion.draws import Draws
from transfer1.diffusion.edm import (
    EDMScaling,
    NoiseDistribution,
    add_noise,
    draw_noise,
    seeded_normal,
)

SIGMA = torch.logspace(-3, 2, 11)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_input_and_target_have_unit_variance(sigma_data: float) -> None:
    """The three conditions that define the preconditioning (Karras et al. 2022, appendix B.6)."""
    scaling = EDMScaling(sigma_data)
    c = scaling(SIGMA)
    ones = torch.ones_like(SIGMA)
    torch.testing.assert_close(c.c_in**2 * (SIGMA**2 + sigma_data**2), ones)
    target_variance = (1 - c.c_skip) ** 2 * sigma_data**2 + (c.c_skip * SIGMA) ** 2
    torch.testing.assert_close(target_variance, c.c_out**2)
    torch.testing.assert_close(scaling.loss_weight(SIGMA) * c.c_out**2, ones)


def test_coefficients_are_float32_for_bfloat16_levels() -> None:
    sigma = SIGMA.bfloat16()
    for name, value in EDMScaling()(sigma)._asdict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, getattr(EDMScaling()(sigma.float()), name)), name
    assert EDMScaling().loss_weight(sigma).dtype == torch.float32


def test_noise_levels_are_log_normal() -> None:
    distribution = NoiseDistribution(p_mean=-0.7, p_std=1.3)
    normal_cdf = [0.5, 0.8413447460685429, 0.15865525393145707]
    levels = distribution.sigma(torch.tensor(normal_cdf, dtype=torch.float64))
    expected = torch.tensor([math.exp(-0.7 + k * 1.3) for k in (0, 1, -1)])
    torch.testing.assert_close(levels, expected)


def test_noise_level_of_a_zero_draw_is_usable() -> None:
    sigma = NoiseDistribution().sigma(torch.zeros(1, dtype=torch.float64))
    assert sigma.item() > 0
    assert all(value.isfinite().all() for value in EDMScaling()(sigma))


def test_draws_belong_to_samples_not_to_the_batch_layout() -> None:
    shape = (4, 2, 3, 2, 2)
    sigma, noise = draw_noise(NoiseDistribution(), shape, Draws(seed=3, iteration=5))
    part = Draws(seed=3, iteration=5, samples=[2, 3])
    sigma_part, noise_part = draw_noise(NoiseDistribution(), (2, *shape[1:]), part)
    assert torch.equal(sigma_part, sigma[2:])
    assert torch.equal(noise_part, noise[2:])


def test_sigma_multiplier_scales_the_level_alone() -> None:
    shape = (2, 1, 3, 2, 2)
    sigma, noise = draw_noise(NoiseDistribution(), shape, Draws(seed=0))
    stretched, same_noise = draw_noise(NoiseDistribution(), shape, Draws(seed=0), math.sqrt(3))
    torch.testing.assert_close(stretched, sigma * math.sqrt(3))
    assert torch.equal(noise, same_noise)


def test_noise_is_added_per_sample() -> None:
    x0 = torch.randn(2, 3, 2, 2, 2)
    x_t = add_noise(x0, torch.tensor([0.0, 2.0]), torch.ones_like(x0))
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], x0[1] + 2.0)


def test_seeded_normal_depends_on_the_seed_only() -> None:
    torch.manual_seed(0)
    first = seeded_normal((3, 2), seed=1)
    torch.manual_seed(1)
    assert torch.equal(first, seeded_normal((3, 2), seed=1))
    assert not torch.equal(first, seeded_normal((3, 2), seed=2))
