"""Every sampler on problems with a known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfer1.diffusion.draws import Draws
from transfer1.diffusion.sampler import guided, initial_noise, noise_levels, sample

SIGMA_MAX = 80.0
SHAPE = (2, 1, 2, 3, 3)


def gaussian(variance: float):
    """The ideal denoiser of zero-mean Gaussian data."""

    def denoiser(x: Tensor, sigma_B: Tensor) -> Tensor:
        noise = sigma_B.to(x).reshape(-1, 1, 1, 1, 1) ** 2
        return variance / (variance + noise) * x

    return denoiser


def test_path_to_a_single_clean_latent_is_straight() -> None:
    """With one possible answer the noise shrinks in proportion to its level, at any step size."""
    clean = torch.randn(SHAPE, dtype=torch.float64)
    x_t = clean + initial_noise(SHAPE, SIGMA_MAX, seed=0)
    levels = iter(noise_levels(6, 0.002, SIGMA_MAX))

    def denoiser(x: Tensor, sigma_B: Tensor) -> Tensor:
        torch.testing.assert_close(x, clean + (x_t - clean) * next(levels) / SIGMA_MAX)
        return clean

    result = sample(denoiser, x_t, num_steps=6, sigma_max=SIGMA_MAX)
    assert torch.equal(result, clean)
    assert next(levels, None) is None, "one call per level"


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        ("2ab", 2),
        ("1euler", 1),
        ("2mid", 2),
        ("2mid_stable", 2),
        ("2heun_edm", 2),
        ("2heun_naive", 1),
        ("3kutta_naive", 3),
    ],
)
def test_error_falls_with_the_order_of_the_solver(solver: str, order: int) -> None:
    """Along the exact trajectory of Gaussian data x / sqrt(variance + sigma^2) is constant."""
    variance, sigma_min = 0.49, 0.1
    x_t = initial_noise(SHAPE, SIGMA_MAX, seed=1).double()
    at_end = x_t * ((variance + sigma_min**2) / (variance + SIGMA_MAX**2)) ** 0.5
    exact = gaussian(variance)(at_end, torch.full((2,), sigma_min, dtype=torch.float64))
    errors = []
    for steps in (120, 240):
        result = sample(
            gaussian(variance),
            x_t,
            num_steps=steps if solver == "2ab" else steps * int(solver[0]),
            sigma_min=sigma_min,
            sigma_max=SIGMA_MAX,
            solver=solver,
        )
        errors.append((result - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_too_few_steps_for_a_solver() -> None:
    with pytest.raises(ValueError, match="num_steps=2: solver=3kutta_naive needs at least 3"):
        sample(gaussian(1.0), torch.zeros(SHAPE), num_steps=2, solver="3kutta_naive")


def test_calls_use_the_grid_and_the_dtype_of_the_input() -> None:
    calls: list[tuple[float, torch.dtype, torch.dtype]] = []

    def denoiser(x: Tensor, sigma_B: Tensor) -> Tensor:
        calls.append((sigma_B[0].item(), x.dtype, sigma_B.dtype))
        return torch.zeros_like(x)

    result = sample(denoiser, torch.zeros(SHAPE, dtype=torch.bfloat16), num_steps=5)
    assert result.dtype == torch.bfloat16
    assert {call[1:] for call in calls} == {(torch.bfloat16, torch.float32)}
    levels = noise_levels(5, 0.002, 70.0)
    assert [call[0] for call in calls] == pytest.approx(levels, rel=1e-6)
    assert (levels[0], levels[-1]) == pytest.approx((70.0, 0.002))


def test_churn_adds_noise_to_every_step() -> None:
    noise = initial_noise(SHAPE, SIGMA_MAX, seed=2)
    options = {"num_steps": 8, "sigma_max": SIGMA_MAX, "s_churn": 4.0}
    first, again = (sample(gaussian(0.49), noise, draws=Draws(0), **options) for _ in range(2))
    other = sample(gaussian(0.49), noise, draws=Draws(1), **options)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    within_no_level = sample(gaussian(0.49), noise, draws=Draws(0), s_min=1e3, **options)
    plain = sample(gaussian(0.49), noise, num_steps=8, sigma_max=SIGMA_MAX)
    assert torch.equal(within_no_level, plain)


def test_unknown_solver_lists_the_known() -> None:
    with pytest.raises(ValueError, match="solver=3heun: choose one of 2ab, 1euler, .*3kutta_naive"):
        sample(gaussian(1.0), torch.zeros(SHAPE), solver="3heun")


def test_guidance() -> None:
    conditional, unconditional = torch.tensor([1.0]), torch.tensor([0.5])
    assert guided(conditional, unconditional, 0.0) == 1.0
    assert guided(conditional, unconditional, 3.0) == 2.5
