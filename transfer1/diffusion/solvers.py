"""Steps of the samplers, from one noise level to a lower one.

All but the naive solvers integrate in ln(sigma) with the clean latent x0 as slope (exponential
integrators: Hochbruck and Ostermann, "Exponential integrators", 2010); the naive ones integrate
dx/dsigma = (x - x0) / sigma with the Runge-Kutta methods of the same names.

Letters: x is the float64 state [B, C, T, H, W] at noise level `sigma`, `target` the next level.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

X0 = Callable[[Tensor, float], Tensor]  # (state, noise level) -> clean latent, float64
Previous = tuple[float, Tensor]  # noise level and x0 of the call before
Solver = Callable[[X0, Tensor, float, float], Tensor]


def euler_step(x: Tensor, sigma: float, target: float, x0: Tensor) -> Tensor:
    """The step that is exact while x0 is constant."""
    return (sigma - target) / sigma * x0 + target / sigma * x


def exponential_step(
    x: Tensor, sigma: float, target: float, x0: Tensor, other_sigma: float, other_x0: Tensor
) -> Tensor:
    """The step that is exact while x0 is linear in ln(sigma), through its values at two levels."""
    step = math.log(sigma / target)
    position = math.log(sigma / other_sigma) / step  # of the other call, in steps
    phi_1 = -math.expm1(-step) / step
    phi_2 = (1 - phi_1) / step
    slope = phi_2 / position
    return math.exp(-step) * x + step * ((phi_1 - slope) * x0 + slope * other_x0)


def adams_bashforth_step(
    x: Tensor, sigma: float, target: float, x0: Tensor, previous: Previous | None = None
) -> Tensor:
    """2ab: x0 is linear through this and the previous call; without `previous` an Euler step."""
    if previous is None:
        return euler_step(x, sigma, target, x0)
    return exponential_step(x, sigma, target, x0, *previous)


def euler(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """1euler."""
    return euler_step(x, sigma, target, x0_at(x, sigma))


def midpoint(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """2mid: x0 is linear through the start and the middle in ln(sigma)."""
    x0, middle, x0_middle = _middle(x0_at, x, sigma, target)
    return exponential_step(x, sigma, target, x0, middle, x0_middle)


def stable_midpoint(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """2mid_stable: an Euler step with x0 of the middle."""
    _, _, x0_middle = _middle(x0_at, x, sigma, target)
    return euler_step(x, sigma, target, x0_middle)


def heun(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """2heun_edm: an Euler step with the mean of x0 at both ends."""
    x0 = x0_at(x, sigma)
    x0_end = x0_at(euler_step(x, sigma, target, x0), target)
    return euler_step(x, sigma, target, (x0 + x0_end) / 2)


def naive_heun(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """2heun_naive: as the original computes it, for parity with its samples.

    Its first slope is taken at the end of the Euler step instead of its start, so that the method
    is of first order; `heun` is the one to use.
    """
    x0 = x0_at(x, sigma)
    end = euler_step(x, sigma, target, x0)
    slopes = (end - x0) / sigma + (end - x0_at(end, target)) / target
    return x + (target - sigma) / 2 * slopes


def naive_kutta(x0_at: X0, x: Tensor, sigma: float, target: float) -> Tensor:
    """3kutta_naive: Kutta's third-order method."""
    step, middle = target - sigma, (sigma + target) / 2

    def slope(state: Tensor, level: float) -> Tensor:
        return (state - x0_at(state, level)) / level

    first = slope(x, sigma)
    second = slope(x + step / 2 * first, middle)
    third = slope(x + step * (2 * second - first), target)
    return x + step / 6 * (first + 4 * second + third)


def _middle(x0_at: X0, x: Tensor, sigma: float, target: float) -> tuple[Tensor, float, Tensor]:
    """x0 at the start, the level halfway in ln(sigma), and x0 there."""
    x0, middle = x0_at(x, sigma), math.sqrt(sigma * target)
    return x0, middle, x0_at(euler_step(x, sigma, middle, x0), middle)


ADAMS_BASHFORTH = "2ab"
RUNGE_KUTTA: dict[str, Solver] = {
    "1euler": euler,
    "2mid": midpoint,
    "2mid_stable": stable_midpoint,
    "2heun_edm": heun,
    "2heun_naive": naive_heun,
    "3kutta_naive": naive_kutta,
}
