"""Sampling: from noise to a clean latent in a few denoising calls.

Letters: B batch; latents are [B, C, T, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .draws import Draws
from .edm import seeded_normal
from .solvers import ADAMS_BASHFORTH, RUNGE_KUTTA, Previous, adams_bashforth_step

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, sigma [B]) -> x0

SOLVERS = (ADAMS_BASHFORTH, *RUNGE_KUTTA)


def sample(
    denoiser: Denoiser,
    x_t: Tensor,
    *,
    num_steps: int = 35,
    sigma_min: float = 0.002,
    sigma_max: float = 70.0,
    rho: float = 7.0,
    solver: str = "2ab",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    draws: Draws | None = None,
) -> Tensor:
    """Integrate from sigma_max to sigma_min, then take the denoiser's word: one more call.

    A solver of order k, the first character of its name, calls the denoiser k times per step and
    makes num_steps // k steps; "2ab" keeps the call before instead, and makes num_steps.

    The state is float64; the denoiser is called in the dtype of `x_t`, with sigma in no less than
    float32.

    Args:
        denoiser: x0 prediction, guidance included.
        x_t: latent with noise of level sigma_max.
        num_steps: calls to spend on the steps.
        solver: "2ab", the second-order exponential Adams-Bashforth method, or a name of
            `solvers.RUNGE_KUTTA`.
        s_churn, s_min, s_max, s_noise: noise that is added again per step, at levels between s_min
            and s_max (Karras et al. 2022, algorithm 2); 0 = deterministic.
        draws: of that noise, purpose "sampler_noise.<step>".

    Raises:
        ValueError: unknown solver, or fewer calls than one of its steps takes.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver}: choose one of {', '.join(SOLVERS)}")

    calls_per_step = 1 if solver == ADAMS_BASHFORTH else int(solver[0])
    if num_steps < calls_per_step:
        raise ValueError(
            f"num_steps={num_steps}: solver={solver} needs at least {calls_per_step} for one step"
        )

    sigma_dtype = torch.promote_types(x_t.dtype, torch.float32)

    def x0_at(x: Tensor, sigma: float) -> Tensor:
        sigma_B = torch.full((len(x),), sigma, dtype=sigma_dtype, device=x.device)
        return denoiser(x.to(x_t.dtype), sigma_B).double()

    levels = noise_levels(num_steps // calls_per_step, sigma_min, sigma_max, rho)
    churn = min(s_churn / len(levels), math.sqrt(1.2) - 1)
    x = x_t.double()
    previous: Previous | None = None
    for index, (sigma, target) in enumerate(pairwise(levels)):
        if churn > 0 and s_min < sigma < s_max:
            assert draws is not None, "added noise is drawn"
            raised = sigma * (1 + churn)
            noise = draws.normal(f"sampler_noise.{index}", x.shape).to(x)
            x = x + math.sqrt(raised**2 - sigma**2) * s_noise * noise
            sigma = raised
        if solver == ADAMS_BASHFORTH:
            x0 = x0_at(x, sigma)
            x = adams_bashforth_step(x, sigma, target, x0, previous)
            previous = (sigma, x0)
        else:
            x = RUNGE_KUTTA[solver](x0_at, x, sigma, target)
    return x0_at(x, levels[-1]).to(x_t.dtype)


def noise_levels(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> list[float]:
    """num_steps + 1 levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / num_steps * (low - high)) ** rho for i in range(num_steps + 1)]


def initial_noise(shape: Sequence[int], sigma_max: float, seed: int) -> Tensor:
    """Noise of level sigma_max, float32 on the CPU, the same on every machine."""
    return seeded_normal(shape, seed) * sigma_max


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance; 0 = the conditional prediction."""
    return conditional + guidance * (conditional - unconditional)
